// Scans the keys of one (batch row, kv head) pair in the order of the tokens and keeps the running state.
#pragma once
#include "feature_map.h"
#include "state.h"
#include "threads.h"

template <bool BF16> struct KeyScan {
  const Call& c;
  const Dims s;
  const RowReader<BF16> reader;
  State state;
  FeatureMap<BF16> key_map;
  float *K, *V, *K_t, *V_rhs;  // rows of a chunk where they must be copied, and packed as operands
  // Features of a chunk's far keys, feature-major (m_pad×np): below, with `compute_features`, which says what they hold.
  float *key_features, *key_half_norm, *key_lhs, *key_rhs;
  float *new_values, *new_sum;  // (m_pad×dv_pad), (m_pad): sums over the chunk's far keys alone
  float *state_rhs;  // the state's values as right operand
  // Rows of the state as they were before this chunk raised their log_scale, and which rows those are.
  float *saved_values, *saved_sum, *saved_log_scale;
  std::vector<int> raised;

  // In the paper's form one map serves both sides and is packed once.
  static bool same_map(const Call& c) { return c.map_q == c.map_k && c.offset_q == c.offset_k && c.fold_q == c.fold_k; }
  KeyScan(const Call& c, int b, int g, bool gradients = false)
      : c(c), s(c), reader(c, s, b, g), state(scratch().take(State::size(s)), s),
        key_map(c, s, c.map_k, c.offset_k, c.fold_k, g, true, same_map(c), gradients && same_map(c)) {
    auto take = [](size_t n) { return scratch().take(n); };
    K = take(CHUNK * s.d_pad), V = take(CHUNK * s.dv_pad), K_t = take((s.d_pad + 16) * CHUNK), V_rhs = take(CHUNK * s.dv_pad);
    key_features = take(s.map_rows * CHUNK), key_half_norm = take(CHUNK), key_lhs = take(s.m_pad * CHUNK), key_rhs = take(s.m_pad * CHUNK);
    state_rhs = take((size_t)s.m_pad * s.dv_pad), new_values = take((size_t)s.m_pad * s.dv_pad), new_sum = take(s.m_pad);
    saved_values = take((size_t)s.m_pad * s.dv_pad), saved_sum = take(s.m_pad), saved_log_scale = take(s.m_pad);
    raised.reserve(s.m_pad);
  }

  // e^{ℓk - log_scale} of the chunk's far keys, after log_scale has been raised to their maximum; the state is rescaled with it.
  //   float32: in `key_features`.
  //   bfloat16: packed as left operand in `key_lhs`; with `as_rhs` also as right operand in `key_rhs`, and then `key_features` keeps
  //   log-features.
  // With `gradients`, y lies behind the features: rows m_pad … of `key_features`.
  void compute_features(const ChunkSpan& a, const float* K, bool as_rhs = false, bool gradients = false) {
    const Rhs k_t = rows_rhs_t<BF16>(K, a.np, s.d_pad, K_t);
    if (gradients) key_map.template features_by_feature<true>(k_t, rows_lhs<BF16>(K, s.d_pad), a.np, key_features, key_half_norm);
    else key_map.template features_by_feature<false>(k_t, rows_lhs<BF16>(K, s.d_pad), a.np, key_features, key_half_norm);
    check_finite(c, key_half_norm, a.np);
    for (int j = 0; j < a.np; j++) if (j < a.far_begin || j >= a.n) key_half_norm[j] = MASKED;
    raised.clear();
    if (a.np == CHUNK) as_rhs ? exponentiate<CHUNK / VL, true>(a.np) : exponentiate<CHUNK / VL, false>(a.np);
    else as_rhs ? exponentiate<0, true>(a.np) : exponentiate<0, false>(a.np);
  }
  // N: vectors in a row of np floats if known at compile time, else 0. Members are copied to local variables, here and elsewhere,
  // because for all the compiler knows a store through a float* may change them.
  template <int N, bool AS_RHS> void exponentiate(int np) {
    const int n = N ? N : np / VL, m_pad = s.m_pad;
    const float *const offsets = key_map.offset, *const log_scale = state.log_scale;
    float *const sum_to = new_sum, *rhs_to = key_rhs;
    uint16_t* packed = (uint16_t*)key_lhs;
    Vec half_norm[CHUNK / VL], e[2][CHUNK / VL];
    alignas(64) float partial[VL * VL];
    for (int j = 0; j < n; j++) half_norm[j] = load(key_half_norm + j * VL);
    float* f = key_features;
    for (int i = 0; i < m_pad; i += 2) {  // two rows at a time: they make the pairs of a right operand
      for (int h = 0; h < 2; h++, f += np) {
        const float offset = offsets[i + h];
        Vec top = set1(-MASKED), sum = set1(0);
        for (int j = 0; j < n; j++) e[h][j] = load(f + j * VL) - half_norm[j], top = vmax(top, e[h][j]);
        if (any_greater(top, set1(log_scale[i + h] + offset))) raise_log_scale(i + h, reduce_max(top) - offset);
        float top_of_row = log_scale[i + h] + offset;
        if (BF16 && std::fabs(top_of_row) > LARGEST_OFFSET) {
          for (int j = 0; j < n; j++) e[h][j] = e[h][j] - set1(top_of_row);
          top_of_row = 0;
        }
        const Vec scale = exp_offset<BF16>(set1(top_of_row));
        for (int j = 0; j < n; j++) e[h][j] = vexp_minus<BF16>(e[h][j], scale), sum += e[h][j];
        if (!BF16 || !AS_RHS)
          for (int j = 0; j < n; j++) store(f + j * VL, e[h][j]);
        for (int j = 0; BF16 && !AS_RHS && j < n; j++) store_bf16(packed + h * np + j * VL, e[h][j]);
        store(partial + (i + h) % VL * VL, sum);
      }
      for (int j = 0; BF16 && AS_RHS && j < n; j++)
        store(rhs_to + j * VL, pair_bf16(e[0][j], e[1][j], packed + j * VL, packed + np + j * VL));
      rhs_to += np, packed += 2 * np;
      if (i % VL == VL - 2) store(sum_to + i + 2 - VL, reduce_rows(partial, Add()));
    }
  }
  // The chunk's features as right operand with the keys as summands.
  Rhs features_rhs_t(int np) const {
    if (!BF16) return Operands<BF16>::rhs_t(key_features, np, s.m_pad, np);
    float* to = scratch().take((size_t)pad16(np / 2) * s.m_pad);
    transpose(key_lhs, np / 2, s.m_pad, pad16(np / 2), to, s.m_pad);  // rows after np/2 are not used
    return {to, s.m_pad};
  }
  __attribute__((noinline)) void raise_log_scale(int i, float log_scale) {
    float* row = state.values + (size_t)i * s.values_ld;
    memcpy(saved_values + raised.size() * s.dv_pad, row, s.dv_pad * sizeof(float));
    saved_sum[raised.size()] = state.sum[i], saved_log_scale[raised.size()] = state.log_scale[i];
    raised.push_back(i);
    const float factor = std::exp(state.log_scale[i] - log_scale);
    for (int j = 0; j < s.dv_pad; j += VL) store(row + j, set1(factor) * load(row + j));
    state.sum[i] *= factor, state.log_scale[i] = log_scale;
  }
  // The state as it was before `compute_features`, for a chunk that is to be split.
  void restore_state() {
    for (size_t k = 0; k < raised.size(); k++) {
      const int i = raised[k];
      memcpy(state.values + (size_t)i * s.values_ld, saved_values + k * s.dv_pad, s.dv_pad * sizeof(float));
      state.sum[i] = saved_sum[k], state.log_scale[i] = saved_log_scale[k];
    }
  }
  // Adds the chunk's far keys to the state.
  void add_keys(const ChunkSpan& a, Rhs values) {
    const Lhs e = BF16 ? Lhs{key_lhs, a.np / 2, 1} : Lhs{key_features, a.np, 1};
    gemm<BF16>(s.m_pad, s.dv_pad, a.np, e, values.p, values.ld, new_values, s.dv_pad, false);
    state.add(s, new_values, new_sum, reader.count + a.t0);
  }
  // Only the state, over the far keys of the tokens [begin, end).
  void accumulate(int begin, int end) {
    for (int t = begin; t < end; t += CHUNK) {
      ChunkSpan a(s, t, std::min(CHUNK, end - t), reader.count);
      if (!a.has_far() || !s.m) continue;
      compute_features(a, reader.keys(K, a.first_key, a.min_key, a.n, a.np));
      add_keys(a, rows_rhs<BF16>(reader.values(V, a.first_key, a.min_key, a.n, a.np), a.np, s.dv_pad, V_rhs));
    }
  }
};
