// Backward, first pass: in the order of the tokens, gradients of queries, sinks and the query's map. See backward.h.
#pragma once
#include "backward_context.h"

template <bool BF16> struct QueryPass : KeyScan<BF16> {
  using Base = KeyScan<BF16>;
  using Base::c, Base::s, Base::reader, Base::state, Base::key_features;
  using Ops = Operands<BF16>;
  BackwardContext& ctx;
  FeatureCache<BF16>& cache;
  FeatureMap<BF16> query_map;
  BackwardContext::MapGrads& map_grads;
  float *d_sink_k, *d_sink_v;
  float *log_scale_offset;   // (m_pad): log_scale - offset, what is added to every query's features
  float *own_key_features;   // where the features of a chunk that is not cached go
  Rhs sink_k_t{}, sink_v_t{}, sink_k{};

  QueryPass(BackwardContext& ctx, FeatureCache<BF16>& cache, int b, int g, int worker, float* d_sinks)
      : Base(ctx.c, b, g, true), ctx(ctx), cache(cache),
        query_map(Base::same_map(c) ? this->key_map : FeatureMap<BF16>(c, s, c.map_q, c.offset_q, c.fold_q, g, false, true, true)),
        map_grads(ctx.map_grads(worker, g)) {
    query_map.has_norm = s.has_exact;
    float *sink_K = Ops::take(s.sinks_pad * s.d_pad), *sink_V = Ops::take(s.sinks_pad * s.dv_pad);
    log_scale_offset = Ops::take(s.m_pad), own_key_features = key_features;
    d_sink_k = d_sinks, d_sink_v = d_sinks + (size_t)s.sinks_pad * s.d_pad;
    if (!s.S) return;
    reader.sinks(sink_K, sink_V);
    sink_k_t = Ops::rows_rhs_t(sink_K, s.sinks_pad, s.d_pad), sink_v_t = Ops::rows_rhs_t(sink_V, s.sinks_pad, s.dv_pad);
    sink_k = Ops::rows_rhs(sink_K, s.sinks_pad, s.d_pad);
  }

  void run(int t0, int n) {
    const auto mark = scratch().mark();
    const bool done = chunk(t0, n);
    scratch().release(mark);
    if (done) return;
    this->restore_state();
    run(t0, (n + 1) / 2);
    run(t0 + (n + 1) / 2, n / 2);
  }

  // Returns false if a feature would overflow: the state must then be restored and the chunk split, as in the forward pass.
  bool chunk(int t0, int n) {
    const ChunkSpan a(s, t0, n, reader.count);
    const int np = a.np;
    this->raised.clear();
    reader.prefetch(t0 + CHUNK, true);
    const bool far = s.m && (a.has_far() || state.holds_keys(s));
    typename FeatureCache<BF16>::Chunk* const cached = far ? cache.find(t0, n) : nullptr;
    const float* V = nullptr;
    Rhs v_t{}, key_features_t{}, state_t{}, window_k_t{}, window_v_t{}, window_k{};
    float *lse = Ops::take(np), *delta = Ops::take(np), *dO_rows = Ops::take(np * s.dv_pad), *Q_rows = Ops::take(np * s.d_pad);
    float *dQ = Ops::take(np * s.d_pad), *query_features = Ops::take((size_t)s.R * np * s.map_rows);
    if (far) {
      V = reader.values(Base::V, a.first_key, a.min_key, a.n, np);
      key_features = cached ? cached->keys : own_key_features;
      this->compute_features(a, reader.keys(Base::K, a.first_key, a.min_key, a.n, np), false, cached);
      if (cached) memcpy(cached->log_scale, state.log_scale, s.m_pad * sizeof(float));
      for (int i = 0; i < s.m_pad; i += VL) store(log_scale_offset + i, load(state.log_scale + i) - load(query_map.offset + i));
      for (int r = 0; r < s.R; r++)
        if (!compute_query_features(a, r, Q_rows, query_features + (size_t)r * np * s.map_rows,
                                    cached ? cached->queries + r * cache.head_size : nullptr))
          return false;
      v_t = Ops::rows_rhs_t(V, np, s.dv_pad), key_features_t = this->features_rhs_t(np);
      state_t = Ops::rhs_t(state.values, s.values_ld, s.m_pad, s.dv_pad);
    }
    if (a.has_window) {
      const float* K = reader.keys(Ops::take(a.window_pad * s.d_pad), a.window_base, a.min_key, a.window_cols, a.window_pad);
      const float* V = reader.values(Ops::take(a.window_pad * s.dv_pad), a.window_base, a.min_key, a.window_cols, a.window_pad);
      window_k_t = Ops::rows_rhs_t(K, a.window_pad, s.d_pad), window_v_t = Ops::rows_rhs_t(V, a.window_pad, s.dv_pad);
      window_k = Ops::rows_rhs(K, a.window_pad, s.d_pad);
    }
    for (int r = 0; r < s.R; r++) {
      const auto mark = scratch().mark();
      const float *Q = reader.queries(Q_rows, r, t0, n, np), *dO = load_grad_output(reader, ctx, r, t0, n, np, dO_rows, lse, nullptr);
      const Lhs q = rows_lhs<BF16>(Q, s.d_pad), d_out = rows_lhs<BF16>(dO, s.dv_pad);
      // P: logits, then weights, in place. dP: do·v, then the gradient of the logits, in place.
      float *window_P = Ops::take(np * a.window_pad), *window_dP = Ops::take(np * a.window_pad);
      float *sink_P = Ops::take(np * s.sinks_pad), *sink_dP = Ops::take(np * s.sinks_pad);
      float *head_features = query_features + (size_t)r * np * s.map_rows;
      float *value_sums = Ops::take(np * s.m_pad), *key_sums = Ops::take(np * s.m_pad), *weight_sum = Ops::take(np);
      const int lo = a.first_key - a.window_base;
      // delta_t = Σ_j p_tj do_t·v_j from the same rounded numbers as the terms it is subtracted from, not from the rounded output.
      // It is divided by Σ_j p_tj, which is 1 up to rounding, so that this rounding cancels.
      std::fill(delta, delta + np, 0.0f), std::fill(weight_sum, weight_sum + np, 0.0f), std::fill(dQ, dQ + np * s.d_pad, 0.0f);
      if (far) far_sums(a, head_features, d_out, delta, weight_sum, v_t, key_features_t, state_t, value_sums, key_sums);
      if (a.has_window) {
        const Band out{.out_lo = lo + 1, .out_hi = lo + s.W};
        gemm<BF16>(np, a.window_pad, s.d_pad, q, window_k_t.p, window_k_t.ld, window_P, a.window_pad, false, out);
        gemm<BF16>(np, a.window_pad, s.dv_pad, d_out, window_v_t.p, window_v_t.ld, window_dP, a.window_pad, false, out);
        for (int t = 0; t < np; t++) {
          const int first = std::max({0, t + 1 + lo, a.min_key - a.window_base}), last = t < n ? t + s.W + lo : -1;
          const int tile = t & ~(TILE_ROWS<BF16> - 1);
          softmax_row(window_P + (size_t)t * a.window_pad, window_dP + (size_t)t * a.window_pad, vec_floor(tile + lo + 1),
                      std::min(a.window_pad, vec_ceil(tile + TILE_ROWS<BF16> + lo + s.W)), first, last, lse[t], delta[t], weight_sum[t]);
        }
      }
      if (s.S) {
        gemm<BF16>(np, s.sinks_pad, s.d_pad, q, sink_k_t.p, sink_k_t.ld, sink_P, s.sinks_pad, false);
        gemm<BF16>(np, s.sinks_pad, s.dv_pad, d_out, sink_v_t.p, sink_v_t.ld, sink_dP, s.sinks_pad, false);
        for (int t = 0; t < np; t++) {
          const int visible = t < n ? (int)std::min<int64_t>(s.S, reader.count + t0 + t + 1) : 0;
          softmax_row(sink_P + t * s.sinks_pad, sink_dP + t * s.sinks_pad, 0, s.sinks_pad, 0, visible - 1, lse[t], delta[t], weight_sum[t]);
        }
      }
      float* const delta_out = ctx.delta(reader.pair, r) + t0;
      for (int t = 0; t < n; t++) delta_out[t] = delta[t] /= weight_sum[t] > 0 ? weight_sum[t] : 1;
      if (far) far_backward(a, head_features, Q, delta, value_sums, key_sums, dQ);
      if (a.has_window) {
        const Band sum{.k_lo = lo + 1, .k_hi = lo + s.W};
        for (int t = 0; t < np; t++) {
          const int tile = t & ~(TILE_ROWS<BF16> - 1);
          softmax_backward_row(window_P + (size_t)t * a.window_pad, window_dP + (size_t)t * a.window_pad, vec_floor(tile + lo + 1),
                               std::min(a.window_pad, vec_ceil(tile + TILE_ROWS<BF16> + lo + s.W)), delta[t]);
        }
        gemm<BF16>(np, s.d_pad, a.window_pad, Ops::lhs(window_dP, a.window_pad, np, a.window_pad), window_k.p, window_k.ld, dQ, s.d_pad,
                   true, sum);
      }
      if (s.S) {
        for (int t = 0; t < np; t++) softmax_backward_row(sink_P + t * s.sinks_pad, sink_dP + t * s.sinks_pad, 0, s.sinks_pad, delta[t]);
        gemm<BF16>(np, s.d_pad, s.sinks_pad, Ops::lhs(sink_dP, s.sinks_pad, np, s.sinks_pad), sink_k.p, sink_k.ld, dQ, s.d_pad, true);
        const Rhs q_rhs = Ops::rows_rhs(Q, np, s.d_pad), d_out_rhs = Ops::rows_rhs(dO, np, s.dv_pad);
        gemm<BF16>(s.sinks_pad, s.d_pad, np, Ops::lhs_t(sink_dP, s.sinks_pad, s.sinks_pad, np), q_rhs.p, q_rhs.ld, d_sink_k, s.d_pad, true);
        gemm<BF16>(s.sinks_pad, s.dv_pad, np, Ops::lhs_t(sink_P, s.sinks_pad, s.sinks_pad, np), d_out_rhs.p, d_out_rhs.ld, d_sink_v,
                   s.dv_pad, true);
      }
      check_finite(c, dQ, np * s.d_pad);
      for (int t = 0; t < n; t++) store_row(c.dq, (reader.head(r) + t0 + t) * s.d, dQ + (size_t)t * s.d_pad, s.d, c.bf16);
      scratch().release(mark);
    }
    if (far && a.has_far()) this->add_keys(a, Ops::rows_rhs(V, np, s.dv_pad));
    if (cached) cached->filled = true;
    return true;
  }

  // Logits P become weights: columns first … last of the tile's lo … end-1, and 0 in the others. Adds to Σ p·dP and Σ p.
  void softmax_row(float* P, const float* dP, int lo, int end, int first, int last, float lse, float& delta, float& weight_sum) const {
    for (int j = lo; j < std::min(first, end); j++) P[j] = LOG_ZERO;
    for (int j = std::max(lo, last + 1); j < end; j++) P[j] = LOG_ZERO;
    const Vec scaling = set1((float)c.scaling), l = set1(last < 0 ? -LOG_ZERO : lse);
    Vec sum = set1(0), weight = set1(0);
    for (int j = lo; j < end; j += VL) {
      const Vec p = vexp<BF16>(load(P + j) * scaling - l);
      store(P + j, p);
      sum = fma(p, load(dP + j), sum);
      weight += p;
    }
    delta += reduce_add(sum), weight_sum += reduce_add(weight);
  }
  // dP becomes the gradient of the logits before scaling, p·(dP - delta)·scaling.
  void softmax_backward_row(const float* P, float* dP, int lo, int end, float delta) const {
    for (int j = lo; j < end; j += VL) store(dP + j, load(P + j) * (load(dP + j) - set1(delta)) * set1((float)c.scaling));
  }

  // F (np×map_rows): e^{ℓq + log_scale - lse} and y; the former also into `cached`, if given. False if one would overflow.
  bool compute_query_features(const ChunkSpan& a, int r, float* Q_rows, float* F, float* cached) {
    const auto mark = scratch().mark();
    float* half_norm = Ops::take(a.np);
    const float* Q = reader.queries(Q_rows, r, a.t0, a.n, a.np);
    query_map.template features_by_token<true>(rows_lhs<BF16>(Q, s.d_pad), a.np, F, half_norm);
    const int m_pad = s.m_pad, map_rows = s.map_rows;
    const float *const lse = c.lse + reader.head(r) + a.t0, *const add = log_scale_offset;
    Vec top = set1(LOG_ZERO);
    for (int t = 0; t < a.np; t++, F += map_rows, cached += cached ? m_pad / reader.PER_UNIT : 0) {
      const float norm = half_norm[t] + (t < a.n ? lse[t] : -LOG_ZERO);
      const Vec offset = exp_offset<BF16>(set1(norm));
      Vec high = set1(LOG_ZERO);
      for (int i = 0; i < m_pad; i += VL) {
        const Vec l = load(F + i) + load(add + i);
        high = vmax(high, l);
        const Vec e = vexp_minus<BF16>(l, offset);
        store(F + i, e);
        if (cached) BF16 ? store_bf16((uint16_t*)cached + i, e) : store(cached + i, e);
      }
      top = vmax(top, high - set1(norm));
    }
    const bool fits = a.n == 1 || !any_greater(top, set1(UNDERFLOW_LOG));
    scratch().release(mark);
    return fits;
  }

  // Over the far keys j of each row t: value_sums = Σ_j e^{ℓk_ji - log_scale_i} do_t·v_j, and key_sums the same with 1 in place of
  // do_t·v_j, both (np×m_pad). Adds their products with the row's features to delta and weight_sum.
  void far_sums(const ChunkSpan& a, const float* F, Lhs d_out, float* delta, float* weight_sum, Rhs v_t, Rhs key_features_t, Rhs state_t,
                float* value_sums, float* key_sums) {
    const int np = a.np;
    float* dP = Ops::take(np * np);
    gemm<BF16>(np, s.m_pad, s.dv_pad, d_out, state_t.p, state_t.ld, value_sums, s.m_pad, false);
    gemm<BF16>(np, np, s.dv_pad, d_out, v_t.p, v_t.ld, dP, np, false, {.out_hi = 0});
    causal_minus_delta(dP, np, nullptr);
    gemm<BF16>(np, s.m_pad, np, Ops::lhs(dP, np, np, np), key_features_t.p, key_features_t.ld, value_sums, s.m_pad, true, {.k_hi = 0});
    transpose(key_features, np, s.m_pad, np, key_sums, s.m_pad);
    const float* previous = state.sum;  // row t is row t-1 plus the features of its own key
    const int m_pad = s.m_pad, map_rows = s.map_rows;
    alignas(64) float products[CHUNK * VL], weights[CHUNK * VL];
    for (int t = 0; t < np; t++, key_sums += m_pad, F += map_rows, value_sums += m_pad) {
      Vec sum = set1(0), weight = set1(0);
      for (int i = 0; i < m_pad; i += VL) {
        const Vec e = load(F + i), total = load(key_sums + i) + load(previous + i);
        store(key_sums + i, total);
        sum = fma(e, load(value_sums + i), sum);
        weight = fma(e, total, weight);
      }
      store(products + t * VL, sum), store(weights + t * VL, weight);
      previous = key_sums;
    }
    for (int t = 0; t < np; t += VL) {
      store(delta + t, load(delta + t) + reduce_rows(products + t * VL, Add()));
      store(weight_sum + t, load(weight_sum + t) + reduce_rows(weights + t * VL, Add()));
    }
  }

  // Turns F into the gradients of what the map gave: of the log-features, g = e ⊙ (value_sums - delta·key_sums), and of y,
  // -(Σ_i g_i)·y. From these dQ and the gradients of the map.
  void far_backward(const ChunkSpan& a, float* F, const float* Q, const float* delta, const float* value_sums, const float* key_sums,
                    float* dQ) {
    const int np = a.np, m_pad = s.m_pad, map_rows = s.map_rows, d_pad = s.d_pad;
    float *f = F, *const d_offset = map_grads.offset_q.data(), *const d_linear = map_grads.linear_q.data();
    alignas(64) float partial[VL * VL], total[CHUNK];
    for (int t = 0; t < np; t++, f += map_rows, value_sums += m_pad, key_sums += m_pad) {
      const Vec d = set1(delta[t]);
      Vec sum = set1(0);
      for (int i = 0; i < m_pad; i += VL) {
        const Vec g = load(f + i) * (load(value_sums + i) - d * load(key_sums + i));
        store(f + i, g);
        sum += g;
      }
      store(partial + t % VL * VL, sum);
      if (t % VL == VL - 1) store(total + t + 1 - VL, query_map.has_norm ? reduce_rows(partial, Add()) : set1(0));
    }
    for (int i = 0; i < map_rows; i += VL) {
      Vec sum = set1(0);
      f = F + i;
      if (i < m_pad)
        for (int t = 0; t < np; t++, f += map_rows) sum += load(f);
      else
        for (int t = 0; t < np; t++, f += map_rows) {
          const Vec g = set1(-total[t]) * load(f);
          store(f, g), sum += g;
        }
      store(d_offset + i, load(d_offset + i) - sum);
    }
    const float *const inverse = query_map.fold_inverse, *const linear = query_map.fold_linear, *x = Q;
    float* dx = dQ;
    f = F;
    // With a fold, y is made of the first log-features: its gradient joins theirs.
    for (int t = 0; linear && t < np; t++, f += map_rows, dx += d_pad, x += d_pad / reader.PER_UNIT)
      for (int i = 0; i < d_pad; i += VL) {
        store(f + i, fma(load(inverse + i), load(f + m_pad + i), load(f + i)));
        store(dx + i, fma(set1(total[t]), load(linear + i), load(dx + i)));
        store(d_linear + i, fma(set1(total[t]), load_row_vec<BF16>(x, i), load(d_linear + i)));
      }
    query_map.backward(Ops::lhs(F, map_rows, np, query_map.product_rows), np, dQ);
    if (!c.d_map_q) return;  // not wanted
    const Rhs grads = Ops::rhs(F, map_rows, np, query_map.product_rows);
    gemm<BF16>(d_pad, query_map.product_rows, np, Ops::rows_lhs_t(Q, d_pad, np), grads.p, grads.ld, map_grads.map_q.data(), map_rows, true);
  }
};
