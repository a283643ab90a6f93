// The forward pass: outputs in the order of the tokens, chunk by chunk.
//
// A row of logits has three parts: features of far keys (those in the state and those of this chunk), the window, the sinks. All
// are exponentiated below one maximum a row and share one normaliser.
#pragma once
#include "key_scan.h"

template <bool BF16> struct ForwardPass : KeyScan<BF16> {
  using Base = KeyScan<BF16>;
  using Base::c, Base::s, Base::reader, Base::state, Base::K, Base::V, Base::V_rhs, Base::key_features, Base::key_rhs, Base::state_rhs;
  FeatureMap<BF16> query_map;
  float *Q, *O;                            // (CHUNK×d_pad), (CHUNK×dv_pad)
  float *query_features, *query_lhs;       // (np×map_rows), and packed (np×m_pad)
  float *query_half_norm, *query_offset;   // (np): ½‖y‖², and with the row's maximum added, what is subtracted of its features
  float *log_scale_offset;                 // (m_pad): log_scale - offset, what is added to every query's features
  float *scores, *scores_lhs;              // (np×np): the queries' features times those of this chunk's far keys
  float *window_K, *window_V, *window_K_t, *window_V_rhs, *window_logits, *window_lhs;
  float *sink_logits, *sink_lhs;
  float *row_max, *normalizer;             // (np), and (np×VL): vectors whose sum is the row's normaliser
  Rhs sink_keys, sink_values;

  ForwardPass(const Call& call, int b, int g)
      : Base(call, b, g),
        query_map(Base::same_map(c) ? this->key_map : FeatureMap<BF16>(c, s, c.map_q, c.offset_q, c.fold_q, g, false, true)) {
    query_map.has_norm = s.has_exact;
    auto take = [](size_t n) { return scratch().take(n); };
    Q = take(CHUNK * s.d_pad), query_features = take(CHUNK * s.map_rows), query_lhs = take(CHUNK * s.m_pad);
    query_half_norm = take(CHUNK), scores = take(CHUNK * CHUNK), scores_lhs = take(CHUNK * CHUNK);
    O = take(CHUNK * s.dv_pad), row_max = take(CHUNK), normalizer = take(CHUNK * VL), log_scale_offset = take(s.m_pad);
    const size_t columns = s.W ? CHUNK + std::min<int64_t>(s.W, c.L + s.W) + 32 : 0;
    window_K = take(columns * s.d_pad), window_V = take(columns * s.dv_pad);
    window_K_t = take(columns * (s.d_pad + 16)), window_V_rhs = take(columns * s.dv_pad);
    window_logits = take(columns * CHUNK), window_lhs = take(columns * CHUNK);
    float *sink_K_t = take(s.sinks_pad * (s.d_pad + 16)), *sink_V_rhs = take(s.sinks_pad * s.dv_pad);
    sink_logits = take(CHUNK * s.sinks_pad), sink_lhs = take(CHUNK * s.sinks_pad), query_offset = take(CHUNK);
    if (s.S) {
      float *sink_K = take(s.sinks_pad * s.d_pad), *sink_V = take(s.sinks_pad * s.dv_pad);
      reader.sinks(sink_K, sink_V);
      check_rows(sink_K, s.sinks_pad * s.d_pad, LARGEST_NUMBER), check_rows(sink_V, s.sinks_pad * s.dv_pad);
      sink_keys = rows_rhs_t<BF16>(sink_K, s.sinks_pad, s.d_pad, sink_K_t);
      sink_values = rows_rhs<BF16>(sink_V, s.sinks_pad, s.dv_pad, sink_V_rhs);
    }
  }

  void run(int t0, int n) {
    if (chunk(t0, n)) return;
    __atomic_fetch_add(c.splits, 1, __ATOMIC_RELAXED);
    this->restore_state();
    run(t0, (n + 1) / 2);
    run(t0 + (n + 1) / 2, n / 2);
  }

  // Checks n numbers as `RowReader` returned them.
  void check_rows(const float* x, size_t n, float limit = INFINITY) const {
    if (BF16) check_finite_bf16(c, x, n / 2, limit);
    else check_finite(c, x, n, limit);
  }

  // Returns false if a row's normaliser underflowed: its maximum belongs to a key that it does not see. The state must then be
  // restored and the chunk split.
  bool chunk(int t0, int n) {
    const ChunkSpan a(s, t0, n, reader.count);
    this->raised.clear();
    reader.prefetch(t0 + CHUNK);
    const bool far = s.m && (a.has_far() || state.holds_keys(s));
    Rhs window_keys{}, window_values{}, far_values{}, far_features{}, state_values{};
    const bool far_keys_in_window = a.has_window && a.window_base == a.first_key;
    const float *keys = nullptr, *values = nullptr;
    if (a.has_window) {
      keys = reader.keys(window_K, a.window_base, a.min_key, a.window_cols, a.window_pad);
      values = reader.values(window_V, a.window_base, a.min_key, a.window_cols, a.window_pad);
      check_rows(keys, a.window_pad * s.d_pad, LARGEST_NUMBER), check_rows(values, a.window_pad * s.dv_pad);
      window_keys = rows_rhs_t<BF16>(keys, a.window_pad, s.d_pad, window_K_t);
      window_values = rows_rhs<BF16>(values, a.window_pad, s.dv_pad, window_V_rhs);
    }
    if (far) {
      if (!far_keys_in_window) {
        keys = reader.keys(K, a.first_key, a.min_key, a.n, a.np), values = reader.values(V, a.first_key, a.min_key, a.n, a.np);
        check_rows(keys, a.np * s.d_pad, LARGEST_NUMBER), check_rows(values, a.np * s.dv_pad);
      }
      this->compute_features(a, keys, true);
      // A long query could make up for what the keys have lost.
      if (!s.has_exact && !(state.highest(s) >= -LARGEST_LOGIT)) set_non_finite(c);
      far_values = far_keys_in_window ? window_values : rows_rhs<BF16>(values, a.np, s.dv_pad, V_rhs);
      far_features = {BF16 ? key_rhs : key_features, a.np};
      state_values = rhs<BF16>(state.values, s.values_ld, s.m_pad, s.dv_pad, state_rhs);
      for (int i = 0; i < s.m_pad; i += VL) store(log_scale_offset + i, load(state.log_scale + i) - load(query_map.offset + i));
    }
    for (int r = 0; r < s.R; r++) {
      const float* queries = reader.queries(Q, r, t0, n, a.np);
      check_rows(queries, a.np * s.d_pad, LARGEST_NUMBER);
      compute_logits(a, rows_lhs<BF16>(queries, s.d_pad), far, window_keys);
      exponentiate_logits(a, far);
      if (far) {
        const Lhs e = BF16 ? Lhs{query_lhs, s.m_pad / 2, 1} : Lhs{query_features, s.map_rows, 1};
        gemm<BF16>(a.np, a.np, s.m_pad, e, far_features.p, far_features.ld, scores, a.np, false, {.out_hi = 0});
        mask_scores(a.np);
        gemm<BF16>(a.np, s.dv_pad, s.m_pad, e, state_values.p, state_values.ld, O, s.dv_pad, false);
        gemm<BF16>(a.np, s.dv_pad, a.np, BF16 ? Lhs{scores_lhs, a.np / 2, 1} : Lhs{scores, a.np, 1}, far_values.p, far_values.ld, O,
                   s.dv_pad, true, {.k_hi = 0});
      }
      if (a.has_window) {
        const int lo = a.first_key - a.window_base;
        gemm<BF16>(a.np, s.dv_pad, a.window_pad, BF16 ? Lhs{window_lhs, a.window_pad / 2, 1} : Lhs{window_logits, a.window_pad, 1},
                   window_values.p, window_values.ld, O, s.dv_pad, far, {.k_lo = lo + 1, .k_hi = lo + s.W});
      }
      if (s.S)
        gemm<BF16>(a.np, s.dv_pad, s.sinks_pad, lhs<BF16>(sink_logits, s.sinks_pad, a.np, s.sinks_pad, sink_lhs), sink_values.p,
                   sink_values.ld, O, s.dv_pad, far || a.has_window);
      if (!write_output(a, r)) return false;
    }
    if (far && a.has_far()) this->add_keys(a, far_values);
    return true;
  }

  // Causal mask of the scores, which also join the normalisers.
  void mask_scores(int np) {
    float *x = scores, *const sums = normalizer;
    uint16_t* packed = (uint16_t*)scores_lhs;
    for (int t = 0; t < np; t++, x += np, packed += np) {
      const int last = t / VL * VL;
      Vec sum = load(sums + t * VL);
      auto keep = [&](int j, Vec w) {
        sum += w;
        if (BF16) store_bf16(packed + j, w);
      };
      for (int j = 0; j < last; j += VL) keep(j, load(x + j));
      const Vec w = keep_first(load(x + last), t - last + 1);
      keep(last, w);
      if (!BF16) store(x + last, w);
      store(sums + t * VL, sum);
    }
  }

  // Logits of the window and the sinks, log-features, and the maximum of each row over all of them.
  void compute_logits(const ChunkSpan& a, Lhs q, bool far, Rhs window_keys) {
    const int np = a.np;
    for (int t = 0; t < np; t += VL) store(row_max + t, set1(LOG_ZERO));
    if (a.has_window) {
      const int lo = a.first_key - a.window_base;
      gemm<BF16>(np, a.window_pad, s.d_pad, q, window_keys.p, window_keys.ld, window_logits, a.window_pad, false,
                 {.out_lo = lo + 1, .out_hi = lo + s.W});
      for (int t = 0; t < np; t++)
        row_max[t] = scale_window_row(window_logits + (size_t)t * a.window_pad, t & ~(TILE_ROWS<BF16> - 1), a, first_col(a, t),
                                      last_col(a, t));
    }
    if (s.S) {
      gemm<BF16>(np, s.sinks_pad, s.d_pad, q, sink_keys.p, sink_keys.ld, sink_logits, s.sinks_pad, false);
      for (int t = 0; t < np; t++)
        for (int j = 0; j < visible_sinks(a, t); j++)
          sink_logits[t * s.sinks_pad + j] *= (float)c.scaling, row_max[t] = std::max(row_max[t], sink_logits[t * s.sinks_pad + j]);
    }
    if (!far) return;
    query_map.template features_by_token<false>(q, np, query_features, query_half_norm);
    check_finite(c, query_half_norm, np);
    const int m_pad = s.m_pad, map_rows = s.map_rows;
    const float *f = query_features, *const add = log_scale_offset, *const half_norm = query_half_norm;
    float *const highest = row_max, *const offset = query_offset;
    alignas(64) float partial[VL * VL];
    for (int t = 0; t < np; t += VL) {
      for (int u = 0; u < VL; u++, f += map_rows) {
        Vec high = load(f) + load(add);
        for (int i = VL; i < m_pad; i += VL) high = vmax(high, load(f + i) + load(add + i));
        store(partial + u * VL, high);
      }
      const Vec half = load(half_norm + t), top = vmax(load(highest + t), reduce_rows(partial, Max()) - half);
      store(highest + t, top);
      store(offset + t, half + top);
    }
  }
  // The window's columns that row t sees.
  int first_col(const ChunkSpan& a, int t) const { return std::max({0, t + 1 + a.first_key - a.window_base, a.min_key - a.window_base}); }
  int last_col(const ChunkSpan& a, int t) const { return t < a.n ? t + s.W + a.first_key - a.window_base : -1; }
  int visible_sinks(const ChunkSpan& a, int t) const {
    return t < a.n ? (int)std::min<int64_t>(s.S, reader.count + a.t0 + t + 1) : 0;
  }

  // Exponentials below the rows' maxima, and the normalisers but for the part of this chunk's far keys.
  void exponentiate_logits(const ChunkSpan& a, bool far) {
    const int np = a.np, m_pad = s.m_pad, map_rows = s.map_rows;
    float *f = query_features, *const sums = normalizer;
    uint16_t* packed = (uint16_t*)query_lhs;
    const float *const total = state.sum, *const add = log_scale_offset, *const offset = query_offset;
    for (int t = 0; t < np; t++, f += map_rows, packed += m_pad) {
      Vec sum = set1(0);
      if (far) {
        const Vec high = exp_offset<BF16>(set1(offset[t]));
        for (int i = 0; i < m_pad; i += VL) {
          const Vec e = vexp_minus<BF16>(load(f + i) + load(add + i), high);
          if (BF16) store_bf16(packed + i, e);
          else store(f + i, e);
          sum = fma(e, load(total + i), sum);
        }
      }
      if (a.has_window)
        sum += exponentiate_window_row(window_logits + (size_t)t * a.window_pad, window_lhs + (size_t)t * a.window_pad / 2,
                                       t & ~(TILE_ROWS<BF16> - 1), a, set1(row_max[t]));
      store(sums + t * VL, sum);
    }
    for (int t = 0; s.S && t < np; t++)
      for (int j = 0, visible = visible_sinks(a, t); j < s.sinks_pad; j++) {
        float* x = sink_logits + t * s.sinks_pad + j;
        *x = j < visible ? std::exp(*x - row_max[t]) : 0;
        sums[t * VL] += *x;
      }
  }
  // The columns that gemm computed for the rows of a tile, which begins at row `tile`.
  int tile_begin(const ChunkSpan& a, int tile) const { return vec_floor(tile + a.first_key - a.window_base + 1); }
  int tile_end(const ChunkSpan& a, int tile) const {
    return std::min(a.window_pad, vec_ceil(tile + TILE_ROWS<BF16> + a.first_key - a.window_base + s.W));
  }
  // Scales the logits of columns first … last, masks the tile's others, and returns the maximum.
  float scale_window_row(float* x, int tile, const ChunkSpan& a, int first, int last) const {
    const int lo = tile_begin(a, tile), end = tile_end(a, tile);
    // A tile may have no columns at all: its band can end before the first key that is not a sink.
    for (int j = lo; j < std::min(first, end); j++) x[j] = LOG_ZERO;
    for (int j = std::max(lo, last + 1); j < end; j++) x[j] = LOG_ZERO;
    Vec high = set1(LOG_ZERO);
    for (int j = lo; j < end; j += VL) {
      const Vec l = load(x + j) * set1((float)c.scaling);
      store(x + j, l);
      high = vmax(high, l);
    }
    return last < 0 ? LOG_ZERO : reduce_max(high);
  }
  Vec exponentiate_window_row(float* x, float* packed, int tile, const ChunkSpan& a, Vec high) const {
    Vec sum = set1(0);
    for (int j = tile_begin(a, tile), end = tile_end(a, tile); j < end; j += VL) {
      const Vec e = vexp<BF16>(load(x + j) - high);
      if (BF16) store_bf16((uint16_t*)packed + j, e);
      else store(x + j, e);
      sum += e;
    }
    return sum;
  }

  // Divides by the normalisers. False if one of them underflowed.
  bool write_output(const ChunkSpan& a, int r) {
    alignas(64) float norm[CHUNK], lse[CHUNK], inverse[CHUNK];
    const long first = reader.head(r) + a.t0;
    bool fits = true;
    for (int t = 0; t < a.np; t += VL) {
      const Vec sum = reduce_rows(normalizer + t * VL, Add());
      store(lse + t, load(row_max + t) + vlog(sum));
      store(norm + t, sum);
    }
    for (int t = 0; t < a.n; t++) {
      fits &= norm[t] >= 1e-18f;
      if (!(norm[t] > 0)) lse[t] = LOG_ZERO;
      inverse[t] = norm[t] > 0 ? 1 / norm[t] : 1;
    }
    if (!fits && a.n > 1) return false;
    // A query that sees a key has a normaliser, and a maximum with digits.
    for (int t = 0; (s.m || s.has_exact) && t < a.n; t++)
      if (!fits || !(std::fabs(row_max[t]) <= LARGEST_LOGIT)) set_non_finite(c);
    memcpy(c.lse + first, lse, a.n * sizeof(float));
    const int width = s.d_v, width_pad = s.dv_pad;
    const bool bf16 = c.bf16;
    float* o = O;
    Vec zero = set1(0);  // stays 0 if all numbers are finite
    for (int t = 0; t < a.n; t++, o += width_pad) {
      for (int j = 0; j < width_pad; j += VL) {
        const Vec x = load(o + j) * set1(inverse[t]);
        zero = fma(x, set1(0), zero);
        store(o + j, x);
      }
      store_row(c.out, (first + t) * width, o, width, bf16);
    }
    if (reduce_add(zero) != 0) set_non_finite(c);
    return true;
  }
};

// The state before each segment of the pairs that were cut; empty for whole pairs. One entry a task.
template <bool BF16> static std::vector<std::vector<float>> segment_states(const Call& c, const std::vector<Task>& tasks) {
  const Dims s(c);
  std::vector<std::vector<float>> before(tasks.size());
  struct Part { Task task; int index; std::vector<float> state; };  // part of task `index`, and the sums over its keys alone
  std::vector<Part> parts;
  for (size_t i = 0; i < tasks.size(); i++)
    if (s.m && tasks[i].segment + 1 < tasks[i].segments) {
      const int count = std::min<int>(c.threads, (tasks[i].end - tasks[i].begin + CHUNK - 1) / CHUNK);
      const int chunks = (tasks[i].end - tasks[i].begin) / CHUNK;
      for (int p = 0; p < count; p++) {
        Task t = tasks[i];
        t.end = t.begin + chunks * (p + 1) / count * CHUNK;
        t.begin += chunks * p / count * CHUNK;
        parts.push_back({t, (int)i, std::vector<float>(State::size(s))});
      }
    }
  const int workers = std::min<int>(c.threads, parts.size());
  if (workers)
    parallel(c.omp_parallel, workers, [&](int worker) {
      for (size_t p = worker; p < parts.size(); p += workers) {
        scratch().reset();
        KeyScan<BF16> scan(c, parts[p].task.b, parts[p].task.g);
        scan.state.clear(s);
        scan.accumulate(parts[p].task.begin, parts[p].task.end);
        memcpy(parts[p].state.data(), scan.state.values, State::size(s) * sizeof(float));
      }
    });
  size_t p = 0;
  for (size_t i = 0; i < tasks.size(); i++) {
    if (tasks[i].segments == 1 || !s.m) continue;
    before[i].resize(State::size(s));
    State state(before[i].data(), s);
    if (tasks[i].segment == 0) state.read(c, s, tasks[i].pair(c));
    else {
      memcpy(before[i].data(), before[i - 1].data(), State::size(s) * sizeof(float));
      for (; p < parts.size() && parts[p].index == (int)i - 1; p++) state.merge(State(parts[p].state.data(), s), s);
    }
  }
  return before;
}

template <bool BF16> static Status forward(const Call& c) {
  int workers;
  use_huge_pages(c.out, c.B * c.G * c.R * c.L * c.d_v * (c.bf16 ? 2 : 4));
  const auto tasks = plan(c, workers);
  const auto before = segment_states<BF16>(c, tasks);
  parallel(c.omp_parallel, workers, [&](int worker) {
    for (size_t i = worker; i < tasks.size(); i += workers) {
      const Task& t = tasks[i];
      scratch().reset();
      ForwardPass<BF16> pass(c, t.b, t.g);
      const Dims& s = pass.s;
      pass.state.start(c, s, t.pair(c), before[i]);
      for (int at = t.begin; at < t.end; at += CHUNK) pass.run(at, std::min(CHUNK, t.end - at));
      if (t.segment + 1 < t.segments) continue;
      pass.state.write(c, s, t.pair(c));
      const size_t width = s.d_v * (c.bf16 ? 2 : 4);
      for (int r = 0; r < s.R; r++)
        for (int at = pass.reader.length; at < c.L; at++) {  // padding
          memset((char*)c.out + (pass.reader.head(r) + at) * width, 0, width);
          c.lse[pass.reader.head(r) + at] = LOG_ZERO;
        }
    }
  });
  return (Status)c.status;
}
