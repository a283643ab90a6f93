// What the two passes of a backward call share, and what both do with rows. The formulas are in backward.h.
#pragma once
#include "key_scan.h"

struct BackwardContext {
  const Call& c;
  const Dims s;
  int chunks;
  // For each pair being worked on: log_scale before each chunk, (chunks, m_pad), and delta, (R, L).
  std::vector<float*> pair_log_scale, pair_delta;
  std::vector<std::vector<float>> d_sinks;  // for each task: keys (sinks_pad×d_pad), then values (sinks_pad×dv_pad)
  struct MapGrads {
    std::vector<float> map_q, map_k;        // (d_pad×map_rows), (map_rows×d_pad)
    std::vector<float> offset_q, offset_k;  // (map_rows)
    std::vector<float> linear_q, linear_k;  // (d_pad), of the folds
  };
  std::vector<std::vector<MapGrads>> worker_map_grads;  // for each worker and kv head
  BackwardContext(const Call& c, size_t tasks, int workers)
      : c(c), s(c), chunks((c.L + CHUNK - 1) / CHUNK), pair_log_scale(c.B * c.G), pair_delta(c.B * c.G),
        d_sinks(tasks, std::vector<float>((size_t)s.sinks_pad * (s.d_pad + s.dv_pad))),
        worker_map_grads(workers, std::vector<MapGrads>(c.G)) {}
  // Floats that a pair needs, and where they are.
  size_t pair_size() const { return (size_t)chunks * s.m_pad + c.R * c.L; }
  void place_pair(long pair, float* memory) { pair_log_scale[pair] = memory, pair_delta[pair] = memory + (size_t)chunks * s.m_pad; }
  float* log_scale(long pair, int t0) { return pair_log_scale[pair] + t0 / CHUNK * s.m_pad; }
  float* delta(long pair, int r) { return pair_delta[pair] + r * c.L; }
  MapGrads& map_grads(int worker, int g) {
    MapGrads& w = worker_map_grads[worker][g];
    if (!w.offset_q.empty()) return w;
    w.map_q.resize((size_t)s.d_pad * s.map_rows), w.map_k.resize((size_t)s.map_rows * s.d_pad);
    w.offset_q.resize(s.map_rows), w.offset_k.resize(s.map_rows), w.linear_q.resize(s.d_pad), w.linear_k.resize(s.d_pad);
    return w;
  }
};

// Features of a pair's last chunks as the query pass computed them. The key pass, which runs backwards and so begins with these,
// reads them here instead of computing them again.
template <bool BF16> struct FeatureCache {
  struct Chunk {
    float* keys;       // (map_rows×np): e^{ℓk - log_scale}, then y
    float* log_scale;  // (m_pad)
    float* queries;    // for each head (np×m_pad): e^{ℓq + log_scale - lse}, as `RowReader` returns rows
    bool filled = false;
  };
  const Dims& s;
  const int length;         // of the pair, in tokens; 0 caches nothing
  const size_t head_size;   // floats of one head's queries
  const size_t chunk_size;  // floats of a chunk
  const int count;          // chunks
  std::vector<Chunk> chunks;
  // capacity: floats that there is room for.
  FeatureCache(const Dims& s, int length, size_t capacity = 0)
      : s(s), length(length), head_size((size_t)CHUNK * s.m_pad / (BF16 ? 2 : 1)),
        chunk_size((size_t)CHUNK * s.map_rows + s.m_pad + s.R * head_size),
        count(s.m ? std::min<size_t>((length + CHUNK - 1) / CHUNK, capacity / chunk_size) : 0) {}
  size_t size() const { return count * chunk_size; }
  void place(float* at) {
    for (int i = 0; i < count; i++, at += chunk_size) chunks.push_back({at, at + CHUNK * s.map_rows, at + CHUNK * s.map_rows + s.m_pad});
  }
  // The entry of the tokens t0 … t0+n-1; null if there is none, as for the parts of a chunk that was split.
  Chunk* find(int t0, int n) {
    const int at = t0 / CHUNK - ((length + CHUNK - 1) / CHUNK - count);
    return at >= 0 && t0 % CHUNK == 0 && n == std::min(CHUNK, length - t0) && at < (int)chunks.size() ? &chunks[at] : nullptr;
  }
};

// x - delta up to the diagonal, 0 above it. delta may be null.
static void causal_minus_delta(float* x, int np, const float* delta) {
  for (int t = 0; t < np; t++, x += np) {
    const Vec d = set1(delta ? delta[t] : 0);
    const int last = t / VL * VL;
    for (int j = 0; j < last; j += VL) store(x + j, load(x + j) - d);
    store(x + last, keep_first(load(x + last) - d, t - last + 1));
    for (int j = last + VL; j < np; j += VL) store(x + j, set1(0));
  }
}

// Rows of the output's gradient as `RowReader` returns them, and for each the log-normaliser and, if `delta` is given, delta. Rows
// that are no query get a log-normaliser that makes their weights 0.
template <bool BF16>
static const float* load_grad_output(const RowReader<BF16>& reader, BackwardContext& ctx, int r, int t0, int n, int np, float* to,
                                     float* lse, float* delta) {
  const Dims& s = ctx.s;
  const long head = reader.head(r);
  const float *const lses = ctx.c.lse + head, *const deltas = ctx.delta(reader.pair, r);
  for (int i = 0; i < np; i++) {
    const bool real = i < n && t0 + i >= 0 && t0 + i < reader.length;
    lse[i] = real ? lses[t0 + i] : -LOG_ZERO;
    if (delta) delta[i] = real ? deltas[t0 + i] : 0;
  }
  const int64_t strides[3] = {0, 0, s.d_v};
  const char* first = (const char*)ctx.c.d_out + head * s.d_v * (ctx.c.bf16 ? 2 : 4);
  return reader.rows(to, first, strides, nullptr, t0, 0, n, np, s.d_v, s.dv_pad);
}
