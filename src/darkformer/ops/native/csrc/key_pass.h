// Backward, second pass: in the reverse order of the tokens, gradients of keys, values and the key's map. See backward.h.
#pragma once
#include "backward_context.h"

template <bool BF16> struct KeyPass {
  using Ops = Operands<BF16>;
  BackwardContext& ctx;
  FeatureCache<BF16>& cache;
  const Call& c;
  const Dims& s;
  const RowReader<BF16> reader;
  // Gradient of the state from all later queries: `values` Σ_t e^{ℓq_t - lse_t} do_t, `sum` Σ_t e^{ℓq_t - lse_t} delta_t, which is
  // minus the gradient of the state's sum; both scaled by e^{log_scale}.
  State d_state;
  FeatureMap<BF16> query_map, key_map;
  BackwardContext::MapGrads& map_grads;

  KeyPass(BackwardContext& ctx, FeatureCache<BF16>& cache, int b, int g, int worker)
      : ctx(ctx), cache(cache), c(ctx.c), s(ctx.s), reader(c, s, b, g), d_state(scratch().take(State::size(s)), s),
        query_map(c, s, c.map_q, c.offset_q, c.fold_q, g, true, false, KeyScan<BF16>::same_map(c)),
        key_map(KeyScan<BF16>::same_map(c) ? query_map
                                           : FeatureMap<BF16>(c, s, c.map_k, c.offset_k, c.fold_k, g, true, false, true)),
        map_grads(ctx.map_grads(worker, g)) {
    query_map.has_norm = s.has_exact;
  }

  void rescale_state(const float* log_scale) {
    for (int i = 0; i < s.m; i++) {
      if (log_scale[i] == d_state.log_scale[i]) continue;
      const float factor = std::exp(log_scale[i] - d_state.log_scale[i]);
      float* row = d_state.values + (size_t)i * s.values_ld;
      for (int j = 0; j < s.dv_pad; j += VL) store(row + j, set1(factor) * load(row + j));
      d_state.sum[i] *= factor, d_state.log_scale[i] = log_scale[i];
    }
  }

  // Features of one head's queries, e^{ℓq + log_scale - lse}.
  struct QueryFeatures {
    Lhs lhs;               // (m_pad×np)
    const float* cached;   // (np×m_pad) as `FeatureCache` has them, else null
    const float* computed; // (m_pad×np), with bfloat16 packed as right operand, if they are not cached
    float* delta_sum;      // (m_pad): Σ_t e_ti delta_t
  };
  QueryFeatures allocate_query_features(int np) const {
    float *e = Ops::take(s.m_pad * np / (BF16 ? 2 : 1)), *computed = BF16 ? Ops::take(pad16(s.m_pad / 2) * np) : e;
    return {{e, BF16 ? np / 2 : np, 1}, nullptr, computed, Ops::take(s.m_pad)};
  }
  QueryFeatures cached_query_features(const float* rows, int np, const float* delta) const {
    float* delta_sum = Ops::take(s.m_pad);
    for (int i = 0; i < s.m_pad; i += VL) {
      Vec sum = set1(0);
      for (int t = 0; t < np; t++) sum = fma(load_row_vec<BF16>(rows + (size_t)t * s.m_pad / (BF16 ? 2 : 1), i), set1(delta[t]), sum);
      store(delta_sum + i, sum);
    }
    return {Ops::rows_lhs_t(rows, s.m_pad, np), rows, nullptr, delta_sum};
  }
  // (np×m_pad)
  Lhs features_lhs_t(const QueryFeatures& q, int np) const {
    if (q.cached) return rows_lhs<BF16>(q.cached, s.m_pad);
    return BF16 ? rhs_as_lhs_t(q.computed, np) : Lhs{q.computed, 1, np};
  }
  // The transpose of (m_pad×np) features that are packed as right operand, as left operand.
  Lhs rhs_as_lhs_t(const float* packed, int np) const {
    const int units = pad16(s.m_pad / 2);
    float* to = Ops::take((size_t)np * units);
    transpose(packed, np, units, np, to, units);  // columns after m_pad/2 are not used
    return {to, units, 1};
  }
  // Returns false if a feature would overflow.
  bool compute_query_features(int r, int t0, int n, int np, const float* log_scale, const float* delta, const QueryFeatures& to) {
    const auto mark = scratch().mark();
    float *F = Ops::take(s.map_rows * np), *half_norm = Ops::take(np), *offset = Ops::take(np);
    const float *Q = reader.queries(Ops::take(np * s.d_pad), r, t0, n, np), *lse = c.lse + reader.head(r) + t0;
    query_map.template features_by_feature<false>(Ops::rows_rhs_t(Q, np, s.d_pad), rows_lhs<BF16>(Q, s.d_pad), np, F, half_norm);
    for (int t = 0; t < np; t++) offset[t] = half_norm[t] + (t < n ? lse[t] : -LOG_ZERO);
    const bool fits = np == CHUNK ? exponentiate_queries<CHUNK / VL>(np, F, offset, log_scale, delta, to)
                                  : exponentiate_queries<0>(np, F, offset, log_scale, delta, to);
    scratch().release(mark);
    return n == 1 || fits;
  }
  // N: vectors in a row of np floats if known at compile time, else 0.
  template <int N>
  bool exponentiate_queries(int np, const float* f, const float* row_offset, const float* log_scale, const float* delta,
                            const QueryFeatures& to) const {
    const int n = N ? N : np / VL, m_pad = s.m_pad;
    const float* const offsets = query_map.offset;
    float *e_to = (float*)to.lhs.p, *rhs_to = (float*)to.computed, *const delta_sum = to.delta_sum;
    uint16_t* packed = (uint16_t*)e_to;
    Vec high = set1(LOG_ZERO), offset[CHUNK / VL], weight[CHUNK / VL], e[2][CHUNK / VL];
    alignas(64) float partial[VL * VL];
    for (int j = 0; j < n; j++) offset[j] = load(row_offset + j * VL), weight[j] = load(delta + j * VL);
    for (int i = 0; i < m_pad; i += 2) {  // two rows at a time: they make the pairs of a right operand
      for (int h = 0; h < 2; h++, f += np) {
        const Vec scale = set1(log_scale[i + h] - offsets[i + h]);
        Vec sum = set1(0);
        for (int j = 0; j < n; j++) {
          const Vec l = load(f + j * VL) - offset[j] + scale;
          high = vmax(high, l), e[h][j] = vexp<BF16>(l), sum = fma(e[h][j], weight[j], sum);
        }
        for (int j = 0; !BF16 && j < n; j++) store(e_to + h * np + j * VL, e[h][j]);
        store(partial + (i + h) % VL * VL, sum);
      }
      for (int j = 0; BF16 && j < n; j++)
        store(rhs_to + j * VL, pair_bf16(e[0][j], e[1][j], packed + j * VL, packed + np + j * VL));
      rhs_to += np, packed += 2 * np, e_to += 2 * np;
      if (i % VL == VL - 2) store(delta_sum + i + 2 - VL, reduce_rows(partial, Add()));
    }
    return reduce_max(high) <= UNDERFLOW_LOG;
  }
  // r: the query head; t0: the first token.
  void add_queries(const QueryFeatures& q, int r, int t0, int np, Rhs d_out) {
    float* new_values = Ops::take((size_t)s.m_pad * s.dv_pad);
    gemm<BF16>(s.m_pad, s.dv_pad, np, q.lhs, d_out.p, d_out.ld, new_values, s.dv_pad, false);
    d_state.add(s, new_values, q.delta_sum, (int64_t)t0 * s.R + r);
  }
  // Only the gradient of the state before `begin`, from the queries [begin, end).
  void accumulate(int begin, int end) {
    const int last = (end - 1) / CHUNK * CHUNK;
    memcpy(d_state.log_scale, ctx.log_scale(reader.pair, last), s.m_pad * sizeof(float));
    for (int t0 = last; t0 >= begin; t0 -= CHUNK) {
      const int n = std::min(CHUNK, end - t0), np = pad16(n);
      const auto mark = scratch().mark();
      const QueryFeatures q = allocate_query_features(np);
      float *dO_rows = Ops::take(np * s.dv_pad), *lse = Ops::take(np), *delta = Ops::take(np);
      rescale_state(ctx.log_scale(reader.pair, t0));
      for (int r = 0; r < s.R; r++) {
        const float* dO = load_grad_output(reader, ctx, r, t0, n, np, dO_rows, lse, delta);
        compute_query_features(r, t0, n, np, d_state.log_scale, delta, q);
        add_queries(q, r, t0, np, Ops::rows_rhs(dO, np, s.dv_pad));
      }
      scratch().release(mark);
    }
  }

  // Features of a chunk's far keys.
  struct KeyFeatures {
    float* F;                // (map_rows×np): e^{ℓk - log_scale}, then y
    Rhs rhs;                 // the former as right operand
    const float* log_scale;  // (m_pad): the maximum over these keys and all before them
  };
  KeyFeatures compute_key_features(const ChunkSpan& a, const float* K, const float* log_scale_before) {
    float *F = Ops::take(s.map_rows * a.np), *packed = BF16 ? Ops::take(pad16(s.m_pad / 2) * a.np) : F;
    float *log_scale = Ops::take(s.m_pad), *half_norm = Ops::take(a.np);
    memcpy(log_scale, log_scale_before, s.m_pad * sizeof(float));
    key_map.template features_by_feature<true>(Ops::rows_rhs_t(K, a.np, s.d_pad), rows_lhs<BF16>(K, s.d_pad), a.np, F, half_norm);
    for (int j = 0; j < a.np; j++) if (j < a.far_begin || j >= a.n) half_norm[j] = MASKED;
    a.np == CHUNK ? exponentiate_keys<CHUNK / VL>(a.np, F, half_norm, packed, log_scale)
                  : exponentiate_keys<0>(a.np, F, half_norm, packed, log_scale);
    return {F, {packed, a.np}, log_scale};
  }
  template <int N> void exponentiate_keys(int np, float* f, const float* row_half_norm, float* packed, float* log_scale) const {
    const int n = N ? N : np / VL, m_pad = s.m_pad;
    const float* const offsets = key_map.offset;
    Vec half_norm[CHUNK / VL], e[2][CHUNK / VL];
    for (int j = 0; j < n; j++) half_norm[j] = load(row_half_norm + j * VL);
    for (int i = 0; i < m_pad; i += 2) {
      for (int h = 0; h < 2; h++, f += np) {
        const float offset = offsets[i + h];
        Vec top = set1(-MASKED);
        for (int j = 0; j < n; j++) e[h][j] = load(f + j * VL) - half_norm[j], top = vmax(top, e[h][j]);
        if (any_greater(top, set1(log_scale[i + h] + offset))) log_scale[i + h] = reduce_max(top) - offset;
        float top_of_row = log_scale[i + h] + offset;
        if (BF16 && std::fabs(top_of_row) > LARGEST_OFFSET) {
          for (int j = 0; j < n; j++) e[h][j] = e[h][j] - set1(top_of_row);
          top_of_row = 0;
        }
        const Vec scale = exp_offset<BF16>(set1(top_of_row));
        for (int j = 0; j < n; j++) e[h][j] = vexp_minus<BF16>(e[h][j], scale), store(f + j * VL, e[h][j]);
      }
      for (int j = 0; BF16 && j < n; j++) store(packed + j * VL, pair_bf16(e[0][j], e[1][j]));
      packed += np;
    }
  }

  // The chunk of the tokens t0 … t0+n-1. log_scale_before: (m_pad) before its keys; null where they are in windows only.
  void run(int t0, int n, const float* log_scale_before) {
    const auto mark = scratch().mark();
    const bool done = chunk(t0, n, log_scale_before);
    scratch().release(mark);
    if (done) return;
    const int half = (n + 1) / 2;
    const ChunkSpan a(s, t0, half, reader.count);
    const float* K = reader.keys(Ops::take(a.np * s.d_pad), a.first_key, a.min_key, a.n, a.np);
    const float* log_scale_between = compute_key_features(a, K, log_scale_before).log_scale;
    run(t0 + half, n - half, log_scale_between);
    run(t0, half, log_scale_before);
    scratch().release(mark);
  }

  // Returns false if a feature would overflow; nothing has changed then, and the chunk must be split.
  bool chunk(int t0, int n, const float* log_scale_before) {
    const ChunkSpan a(s, t0, n, reader.count);
    const int np = a.np;
    float *K_rows = Ops::take(np * s.d_pad), *V_rows = Ops::take(np * s.dv_pad);
    float *dK = Ops::take(np * s.d_pad), *dV = Ops::take(np * s.dv_pad);
    reader.prefetch(t0 - CHUNK, true);
    std::fill(dK, dK + np * s.d_pad, 0.0f), std::fill(dV, dV + np * s.dv_pad, 0.0f);
    const float *K = reader.keys(K_rows, a.first_key, a.min_key, a.n, np), *V = reader.values(V_rows, a.first_key, a.min_key, a.n, np);
    bool far = s.m && log_scale_before && a.has_far();
    for (int i = 0; s.m && log_scale_before && i < s.m && !far; i++) far = log_scale_before[i] > LOG_ZERO / 2;
    if (far && !far_backward(a, log_scale_before, K, V, dK, dV)) return false;
    if (s.W) window_backward(a, K, V, dK, dV);
    check_finite(c, dK, np * s.d_pad), check_finite(c, dV, np * s.dv_pad);
    for (int i = 0; i < n; i++) {
      const int at = a.first_key + i;
      if (at < a.min_key || at >= reader.length) continue;
      const long row = at < 0 ? reader.pair * s.W + s.W + at : reader.pair * c.L + at;
      store_row(at < 0 ? c.d_recent_k : c.dk, row * s.d, dK + (size_t)i * s.d_pad, s.d, c.bf16);
      store_row(at < 0 ? c.d_recent_v : c.dv, row * s.d_v, dV + (size_t)i * s.dv_pad, s.d_v, c.bf16);
    }
    return true;
  }

  bool far_backward(const ChunkSpan& a, const float* log_scale_before, const float* K, const float* V, float* dK, float* dV) {
    const int np = a.np;
    // d_features: gradient of the keys' features but for the part of the state's sum, which is the same for all keys: -later_sum.
    float *d_features = Ops::take(s.m_pad * np), *later_sum = Ops::take(s.m_pad);
    const auto* cached = cache.find(a.t0, a.n);
    if (cached && !cached->filled) cached = nullptr;
    const KeyFeatures keys = cached ? KeyFeatures{cached->keys, Ops::rhs(cached->keys, np, s.m_pad, np), cached->log_scale}
                                    : compute_key_features(a, K, log_scale_before);
    float* const F = keys.F;
    struct Head { QueryFeatures q; float *lse, *delta; const float* dO; };
    std::vector<Head> heads;
    for (int r = 0; r < s.R; r++) {
      heads.push_back({{}, Ops::take(np), Ops::take(np), nullptr});
      Head& h = heads.back();
      h.dO = load_grad_output(reader, ctx, r, a.t0, a.n, np, Ops::take(np * s.dv_pad), h.lse, h.delta);
      h.q = cached ? cached_query_features(cached->queries + r * cache.head_size, np, h.delta) : allocate_query_features(np);
      if (!cached && !compute_query_features(r, a.t0, a.n, np, keys.log_scale, h.delta, h.q)) return false;
    }
    rescale_state(keys.log_scale);
    const Rhs v_t = Ops::rows_rhs_t(V, np, s.dv_pad), d_values = Ops::rhs(d_state.values, s.values_ld, s.m_pad, s.dv_pad);
    gemm<BF16>(s.m_pad, np, s.dv_pad, Ops::lhs(d_state.values, s.values_ld, s.m_pad, s.dv_pad), v_t.p, v_t.ld, d_features, np, false);
    memcpy(later_sum, d_state.sum, s.m_pad * sizeof(float));
    gemm<BF16>(np, s.dv_pad, s.m_pad, BF16 ? rhs_as_lhs_t(keys.rhs.p, np) : Lhs{F, 1, np}, d_values.p, d_values.ld, dV, s.dv_pad, true);
    float *P = Ops::take(np * np), *dP = Ops::take(np * np);
    for (int r = 0; r < s.R; r++) {
      const Head& h = heads[r];
      const auto mark = scratch().mark();
      const Rhs d_out = Ops::rows_rhs(h.dO, np, s.dv_pad);
      gemm<BF16>(np, np, s.m_pad, features_lhs_t(h.q, np), keys.rhs.p, keys.rhs.ld, P, np, false, {.out_hi = 0});
      gemm<BF16>(np, np, s.dv_pad, rows_lhs<BF16>(h.dO, s.dv_pad), v_t.p, v_t.ld, dP, np, false, {.out_hi = 0});
      causal_minus_delta(P, np, nullptr);
      causal_minus_delta(dP, np, h.delta);
      gemm<BF16>(np, s.dv_pad, np, Ops::lhs_t(P, np, np, np), d_out.p, d_out.ld, dV, s.dv_pad, true, {.k_lo = 0});
      const Rhs dP_rhs = Ops::rhs(dP, np, np, np);
      gemm<BF16>(s.m_pad, np, np, h.q.lhs, dP_rhs.p, dP_rhs.ld, d_features, np, true, {.k_after = 0});
      add_queries(h.q, r, a.t0, np, d_out);
      scratch().release(mark);
    }
    log_feature_gradients(a, K, F, d_features, later_sum, dK);
    key_map.backward(Ops::lhs_t(F, np, np, key_map.product_rows), np, dK);
    if (!c.d_map_k) return true;  // not wanted
    const Rhs k = Ops::rows_rhs(K, np, s.d_pad);
    gemm<BF16>(key_map.product_rows, s.d_pad, np, Ops::lhs(F, np, key_map.product_rows, np), k.p, k.ld, map_grads.map_k.data(), s.d_pad,
               true);
    return true;
  }

  // Turns F into the gradients of what the map gave: of the log-features, g = F ⊙ (d_features - later_sum), and of y, -(Σ_i g_i)·y.
  void log_feature_gradients(const ChunkSpan& a, const float* K, float* F, const float* d_features, const float* later_sum, float* dK) {
    const int np = a.np, m_pad = s.m_pad, map_rows = s.map_rows, d_pad = s.d_pad;
    float *const d_offset = map_grads.offset_k.data(), *const total = Ops::take(np);
    alignas(64) float partial[VL * VL];
    Vec sum[CHUNK / VL];  // Σ_i g_i
    for (int j = 0; j < np; j += VL) sum[j / VL] = set1(0);
    for (int i = 0; i < map_rows; i++) {
      float* f = F + (size_t)i * np;
      const float* df = d_features + (size_t)i * np;
      Vec row_sum = set1(0);
      if (i < m_pad)
        for (int j = 0; j < np; j += VL) {
          const Vec g = load(f + j) * (load(df + j) - set1(later_sum[i]));
          store(f + j, g), sum[j / VL] += g, row_sum += g;
        }
      else
        for (int j = 0; j < np; j += VL) {
          const Vec g = load(f + j) * (set1(0) - sum[j / VL]);
          store(f + j, g), row_sum += g;
        }
      store(partial + i % VL * VL, row_sum);
      if (i % VL == VL - 1) store(d_offset + i + 1 - VL, load(d_offset + i + 1 - VL) - reduce_rows(partial, Add()));
    }
    if (!key_map.fold_linear) return;
    // With a fold, y is made of the first log-features: its gradient joins theirs.
    for (int j = 0; j < np; j += VL) store(total + j, sum[j / VL]);
    for (int i = 0; i < s.d; i++)
      for (int j = 0; j < np; j += VL) {
        float* f = F + (size_t)i * np + j;
        store(f, fma(set1(key_map.fold_inverse[i]), load(f + (size_t)m_pad * np), load(f)));
      }
    float* const d_linear = map_grads.linear_k.data();
    const float *const linear = key_map.fold_linear, *k = K;
    for (int j = 0; j < np; j++, dK += d_pad, k += d_pad / reader.PER_UNIT)
      for (int i = 0; i < d_pad; i += VL) {
        store(dK + i, fma(set1(total[j]), load(linear + i), load(dK + i)));
        store(d_linear + i, fma(set1(total[j]), load_row_vec<BF16>(k, i), load(d_linear + i)));
      }
  }

  // The chunk's keys against the queries that have them in their window: column j is query first_key + from + j.
  void window_backward(const ChunkSpan& a, const float* K, const float* V, float* dK, float* dV) {
    const int from = std::max(0, -a.first_key) & ~15, to = std::min(s.W + a.n - 1, reader.length - a.first_key);
    if (to <= from) return;
    const int cols = to - from, cols_pad = pad16(cols), np = a.np;
    const Band out{.out_lo = -from, .out_hi = s.W - 1 - from}, sum{.k_lo = -from, .k_hi = s.W - 1 - from};
    float *Q_rows = Ops::take(cols_pad * s.d_pad), *dO_rows = Ops::take(cols_pad * s.dv_pad);
    float *lse = Ops::take(cols_pad), *delta = Ops::take(cols_pad);
    // Keys by queries. P_t: logits, then weights, in place. dP_t: v·do, then the gradient of the logits, in place.
    float *P_t = Ops::take(np * cols_pad), *dP_t = Ops::take(np * cols_pad);
    const Lhs k = rows_lhs<BF16>(K, s.d_pad), v = rows_lhs<BF16>(V, s.dv_pad);
    for (int r = 0; r < s.R; r++) {
      const auto mark = scratch().mark();
      const float* Q = reader.queries(Q_rows, r, a.first_key + from, cols, cols_pad);
      const float* dO = load_grad_output(reader, ctx, r, a.first_key + from, cols, cols_pad, dO_rows, lse, delta);
      const Rhs q_t = Ops::rows_rhs_t(Q, cols_pad, s.d_pad), d_out_t = Ops::rows_rhs_t(dO, cols_pad, s.dv_pad);
      gemm<BF16>(np, cols_pad, s.d_pad, k, q_t.p, q_t.ld, P_t, cols_pad, false, out);
      gemm<BF16>(np, cols_pad, s.dv_pad, v, d_out_t.p, d_out_t.ld, dP_t, cols_pad, false, out);
      const Vec scaling = set1((float)c.scaling);
      for (int i = 0; i < np; i++) {
        const int tile = i & ~(TILE_ROWS<BF16> - 1);
        const int lo = vec_floor(tile - from), end = std::min(cols_pad, vec_ceil(tile + TILE_ROWS<BF16> + s.W - 1 - from));
        const bool real = i < a.n && a.first_key + i >= a.min_key && a.first_key + i < reader.length;
        const int first = std::max(0, i - from), last = real ? i + s.W - 1 - from : -1;
        float *p_row = P_t + (size_t)i * cols_pad, *dp_row = dP_t + (size_t)i * cols_pad;
        for (int j = lo; j < std::min(first, end); j++) p_row[j] = LOG_ZERO;
        for (int j = std::max(lo, last + 1); j < end; j++) p_row[j] = LOG_ZERO;
        for (int j = lo; j < end; j += VL) {
          const Vec p = vexp<BF16>(load(p_row + j) * scaling - load(lse + j));
          store(p_row + j, p);
          store(dp_row + j, last < 0 ? set1(0) : p * (load(dp_row + j) - load(delta + j)) * scaling);
        }
      }
      const Rhs q = Ops::rows_rhs(Q, cols_pad, s.d_pad), d_out = Ops::rows_rhs(dO, cols_pad, s.dv_pad);
      gemm<BF16>(np, s.dv_pad, cols_pad, Ops::lhs(P_t, cols_pad, np, cols_pad), d_out.p, d_out.ld, dV, s.dv_pad, true, sum);
      gemm<BF16>(np, s.d_pad, cols_pad, Ops::lhs(dP_t, cols_pad, np, cols_pad), q.p, q.ld, dK, s.d_pad, true, sum);
      scratch().release(mark);
    }
  }
};
