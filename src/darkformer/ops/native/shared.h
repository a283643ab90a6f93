// What the passes of one backward call share, and what both do with rows.
#pragma once
#include "walker.h"

struct Shared {  // between the passes of one call
  const Call& c;
  const Dims s;
  int chunks;
  std::vector<float*> scales, deltas;  // of the pairs at work: (chunks, mp) maxima before each chunk; (R, L)
  std::vector<std::vector<float>> sinks;  // per task: (sp×dp) and (sp×dvp)
  // (dp×mr), (mr×dp), (mr), (mr), and of the folds' linear parts (dp)
  struct Weights { std::vector<float> q, k, offq, offk, linq, link; };
  std::vector<std::vector<Weights>> weights;  // per slot and kv head
  Shared(const Call& c, size_t tasks, int slots)
      : c(c), s(c), chunks((c.L + CHUNK - 1) / CHUNK), scales(c.B * c.G), deltas(c.B * c.G),
        sinks(tasks, std::vector<float>((size_t)s.sp * (s.dp + s.dvp))), weights(slots, std::vector<Weights>(c.G)) {}
  size_t pair_size() const { return (size_t)chunks * s.mp + c.R * c.L; }
  // Work on a pair begins: its memory, `pair_size` numbers.
  void place(long pair, float* memory) { scales[pair] = memory, deltas[pair] = memory + (size_t)chunks * s.mp; }
  float* scale(long pair, int t0) { return scales[pair] + t0 / CHUNK * s.mp; }
  float* delta(long pair, int r) { return deltas[pair] + r * c.L; }
  Weights& of(int slot, int g) {
    Weights& w = weights[slot][g];
    if (!w.offq.empty()) return w;
    w.q.resize((size_t)s.dp * s.mr), w.k.resize((size_t)s.mr * s.dp);
    w.offq.resize(s.mr), w.offk.resize(s.mr), w.linq.resize(s.dp), w.link.resize(s.dp);
    return w;
  }
};

// Features of a pair's last chunks as the query pass made them: the key pass, which begins with these, need not make them again.
template <bool BF> struct Kept {
  struct Chunk {
    float *keys, *scale, *queries;  // (mr×np) e^{ℓk - scale} and y; (mp); of each head (np×mp) e^{ℓq + scale - lse}, as `Rows` has them
    bool made = false;
  };
  const Dims& s;
  const int length;   // of the pair, in tokens; 0 keeps nothing
  const size_t head;  // numbers of one head's queries
  const size_t each;  // of a chunk
  const int count;    // chunks
  std::vector<Chunk> chunks;
  // most: numbers that there is room for.
  Kept(const Dims& s, int length, size_t most = 0)
      : s(s), length(length), head((size_t)CHUNK * s.mp / (BF ? 2 : 1)), each((size_t)CHUNK * s.mr + s.mp + s.R * head),
        count(s.m ? std::min<size_t>((length + CHUNK - 1) / CHUNK, most / each) : 0) {}
  size_t size() const { return count * each; }
  void place(float* at) {
    for (int i = 0; i < count; i++, at += each) chunks.push_back({at, at + CHUNK * s.mr, at + CHUNK * s.mr + s.mp});
  }
  // The place of the tokens t0 … t0+n-1; null where there is none, as for the parts of a chunk that was cut.
  Chunk* of(int t0, int n) {
    const int at = t0 / CHUNK - ((length + CHUNK - 1) / CHUNK - count);
    return at >= 0 && t0 % CHUNK == 0 && n == std::min(CHUNK, length - t0) && at < (int)chunks.size() ? &chunks[at] : nullptr;
  }
};

// x - δ up to the diagonal, 0 above it.
static void zero_above_diagonal(float* x, int np, const float* delta) {
  for (int t = 0; t < np; t++, x += np) {
    const vf less = all(delta ? delta[t] : 0);
    const int last = t / VL * VL;
    for (int j = 0; j < last; j += VL) store(x + j, load(x + j) - less);
    store(x + last, first_of(load(x + last) - less, t - last + 1));
    for (int j = last + VL; j < np; j += VL) store(x + j, all(0));
  }
}

// Rows of the output's gradient (as `Rows` reads them), of the log-normaliser and δ; rows that are no query have weight 0.
template <bool BF>
static const float* cotangents(const Rows<BF>& rows, Shared& sh, int r, int t0, int n, int np, float* to, float* lse, float* delta) {
  const Dims& s = sh.s;
  const long head = rows.head(r);
  const float *const lses = sh.c.lse + head, *const deltas = sh.delta(rows.pair, r);
  for (int i = 0; i < np; i++) {
    const bool real = i < n && t0 + i >= 0 && t0 + i < rows.length;
    lse[i] = real ? lses[t0 + i] : -LOG_ZERO;
    delta[i] = real ? deltas[t0 + i] : 0;
  }
  const int64_t strides[3] = {0, 0, s.dv};
  const char* first = (const char*)sh.c.grad_out + head * s.dv * (sh.c.bf16 ? 2 : 4);
  return rows.some(to, first, strides, nullptr, t0, 0, n, np, s.dv, s.dvp);
}
