// Log-features of keys and queries, ℓ(x) = P·x - a - ½‖N·x - b‖².
#pragma once
#include "rows.h"

// Rows as `RowReader` returns them, as operands: as they are, and their transpose. `to` is scratch.
template <bool BF16> static inline Lhs rows_lhs(const float* x, int width) { return {x, BF16 ? width / 2 : width, 1}; }
template <bool BF16> static inline Rhs rows_rhs(const float* x, int np, int width, float* to) {
  if (!BF16) return {x, width};
  pack_column_pairs_bf16(x, width / 2, np, width, to, width);
  return {to, width};
}
template <bool BF16> static inline Rhs rows_rhs_t(const float* x, int np, int width, float* to) {
  const int units = BF16 ? width / 2 : width;
  transpose(x, units, np, pad16(units), to, np);  // half a block too many where `width` is an odd multiple of 16
  return {to, np};
}

// Operands packed into scratch memory: from float32 matrices, and from rows as `RowReader` returns them.
template <bool BF16> struct Operands {
  static float* take(size_t n) { return scratch().take(n); }
  static Lhs lhs(const float* a, long ld, int rows, int k) { return ::lhs<BF16>(a, ld, rows, k, BF16 ? take(rows * k / 2) : nullptr); }
  static Lhs lhs_t(const float* a, long ld, int rows, int k) {
    return ::lhs_t<BF16>(a, ld, rows, k, BF16 ? take(rows * pad16(k / 2)) : nullptr, BF16 ? take(rows * pad16(k / 2)) : nullptr);
  }
  static Rhs rhs(const float* a, long ld, int k, int cols) { return ::rhs<BF16>(a, ld, k, cols, BF16 ? take(k / 2 * cols) : nullptr); }
  static Rhs rhs_t(const float* a, long ld, int cols, int k) {
    return ::rhs_t<BF16>(a, ld, cols, k, take((BF16 ? pad16(k / 2) : k) * cols), BF16 ? take(pad16(k / 2) * cols) : nullptr);
  }
  static Rhs rows_rhs(const float* x, int np, int width) { return ::rows_rhs<BF16>(x, np, width, BF16 ? take(np / 2 * width) : nullptr); }
  static Rhs rows_rhs_t(const float* x, int np, int width) { return ::rows_rhs_t<BF16>(x, np, width, take(np * (width + 16))); }
  static Lhs rows_lhs_t(const float* x, int width, int np) {
    if (!BF16) return {x, 1, width};
    const int units = pad16(np / 2);
    float *pairs = take(units * width), *to = take(units * width);
    pack_column_pairs_bf16(x, width / 2, np, width, pairs, width);
    transpose(pairs, width, units, width, to, units);
    return {to, units, 1};
  }
};

// The map of one side, x → [P·x | N·x], packed for both orders of the product. With bfloat16 it is the sum of two bfloat16
// matrices, high and low part, so that log-features keep the precision of float32.
//
// A fold (rows: inverse, offset, linear) saves the product with N. It exists where the first d rows of P, each over the length
// of its draw, are a rotation of N: then y = inverse·(P·x) - offset has the norm of N·x - b. linearᵀx is added to every
// log-feature.
template <bool BF16> struct FeatureMap {
  const float* offset;  // (map_rows): [a | b]
  const float *fold_inverse = nullptr, *fold_offset = nullptr, *fold_linear = nullptr;  // (d_pad), null without a fold
  int product_rows;     // rows that are multiplied: m_pad with a fold, else map_rows
  // Parts of the map, the second of each pair null with float32: as left operand (map_rows × d_pad), as right operand
  // (d_pad × map_rows), and as right operand (product_rows × d_pad) of the backward product.
  const float *lhs_part[2] = {}, *rhs_part[2] = {}, *backward_part[2] = {};
  int d_pad, m_pad, map_rows;
  // Without exact keys a query's norm cancels in the normaliser, and its features would lose their digits beside a long one's.
  bool has_norm = true;
  bool has_linear = false;  // whether `fold_linear` is anything but 0
  Band feature_major_band, token_major_band, backward_band;  // what an upper triangular N leaves to compute
  FeatureMap(const Call& c, const Dims& s, const float* map, const float* offsets, const float* fold, int g, bool with_lhs,
             bool with_rhs, bool with_backward = false)
      : product_rows(fold ? s.m_pad : s.map_rows), d_pad(s.d_pad), m_pad(s.m_pad), map_rows(s.map_rows) {
    float* a = scratch().take((size_t)map_rows * d_pad);
    float* o = scratch().take(map_rows);
    const long rows = s.m + s.r;
    for (int i = 0; i < map_rows; i++) {
      int from = i < s.m_pad ? (i < s.m ? i : -1) : (i - s.m_pad < s.r ? s.m + i - s.m_pad : -1);
      o[i] = from >= 0 ? offsets[g * rows + from] : i < s.m_pad ? -LOG_ZERO : 0;
      if (from >= 0) load_row(a + (size_t)i * d_pad, map, (g * rows + from) * s.d, s.d, d_pad, false);
      else memset(a + (size_t)i * d_pad, 0, d_pad * sizeof(float));
    }
    offset = o;
    // The maximum of vectors lets NaN vanish: a diverged map would give finite, wrong numbers.
    check_finite(c, a, (size_t)map_rows * d_pad, LARGEST_NUMBER), check_finite(c, o, map_rows);
    if (fold) {
      float* f = scratch().take(3 * (size_t)d_pad);
      for (int k = 0; k < 3; k++) load_row(f + (size_t)k * d_pad, fold, (g * 3L + k) * s.d, s.d, d_pad, false);
      check_finite(c, f, 3 * (size_t)d_pad);
      fold_inverse = f, fold_offset = f + d_pad, fold_linear = f + 2 * d_pad;
      for (int i = 0; i < d_pad; i++) has_linear |= fold_linear[i] != 0;
    }
    bool triangular = true;
    for (int i = 1; i < s.r; i++)
      for (int j = 0; j < std::min(i, d_pad); j++) triangular &= a[(size_t)(m_pad + i) * d_pad + j] == 0;
    if (triangular) feature_major_band.k_lo = -m_pad, token_major_band.k_after = backward_band.k_before = m_pad;
    float* part = a;
    float* low = BF16 ? scratch().take((size_t)map_rows * d_pad) : nullptr;
    float* tmp = BF16 ? scratch().take((size_t)map_rows * (d_pad + 16)) : nullptr;
    for (int h = 0; h < (BF16 ? 2 : 1); h++) {
      if (h) {
        for (int i = 0; i < map_rows * d_pad; i += VL) store(low + i, load(a + i) - round_to_bf16(load(a + i)));
        part = low;
      }
      if (with_backward) backward_part[h] = rhs<BF16>(part, d_pad, product_rows, d_pad, take_if(BF16, (size_t)map_rows * d_pad)).p;
      if (with_lhs) lhs_part[h] = lhs<BF16>(part, d_pad, map_rows, d_pad, take_if(BF16, (size_t)map_rows * d_pad)).p;
      if (with_rhs) rhs_part[h] = rhs_t<BF16>(part, d_pad, map_rows, d_pad, scratch().take((size_t)(d_pad + 16) * map_rows), tmp).p;
    }
  }
  static float* take_if(bool wanted, size_t n) { return wanted ? scratch().take(n) : nullptr; }

  // dx (np×d_pad) += D·[P; N], where D (np×product_rows) is the gradient of the map's results. With bfloat16 D is rounded, as
  // softmax attention rounds the gradient of its logits; the map is not.
  void backward(Lhs D, int np, float* dx) const {
    gemm<BF16>(np, d_pad, product_rows, D, backward_part[0], d_pad, dx, d_pad, true, backward_band, {D.p, backward_part[1]});
  }

  // Token-major: F (np×map_rows) receives P·x and, with GRADIENTS, y = N·x - b in its last rows;
  // half_norm[t] = ½‖y‖² - linearᵀx is what is to be subtracted.
  template <bool GRADIENTS> void features_by_token(Lhs x, int np, float* F, float* half_norm) const {
    gemm<BF16>(np, product_rows, d_pad, x, rhs_part[0], map_rows, F, map_rows, false, token_major_band, {x.p, rhs_part[1]});
    const float *scales = fold_inverse, *offsets = scales ? fold_offset : offset + m_pad, *slopes = has_linear ? fold_linear : nullptr;
    const int norm_rows = map_rows - m_pad, width = scales ? d_pad : norm_rows, from = scales ? 0 : m_pad, next = map_rows, to = m_pad;
    alignas(64) float sums[VL * VL];
    for (int t = 0; t < np; t += VL) {
      for (int u = 0; u < VL; u++) {
        float* f = F + (size_t)(t + u) * next;
        Vec sum = set1(0);
        for (int i = 0; i < width; i += VL) {
          const Vec y = scales ? load(scales + i) * load(f + i) - load(offsets + i) : load(f + from + i) - load(offsets + i);
          if (GRADIENTS) store(f + to + i, y);
          sum = fma(y, y, sum);
        }
        sum = sum * set1(0.5f);
        for (int i = 0; slopes && i < d_pad; i += VL) sum = sum - load(slopes + i) * load_row_vec<BF16>(x.p + (t + u) * x.rs, i);
        store(sums + u * VL, sum);
      }
      store(half_norm + t, has_norm ? reduce_rows(sums, Add()) : set1(0));
    }
  }
  // The same feature-major: F (map_rows×np). `rows` holds the tokens of `x_t` token-major.
  template <bool GRADIENTS> void features_by_feature(Rhs x_t, Lhs rows, int np, float* F, float* half_norm) const {
    gemm<BF16>(product_rows, np, d_pad, rows_lhs<BF16>(lhs_part[0], d_pad), x_t.p, x_t.ld, F, np, false, feature_major_band,
               {lhs_part[1], x_t.p});
    constexpr int MAX_VECTORS = CHUNK / VL;
    const int n = np / VL, width = fold_linear ? d_pad : map_rows - m_pad;
    const float *f = fold_linear ? F : F + (size_t)m_pad * np, *scales = fold_inverse,
                *offsets = fold_linear ? fold_offset : offset + m_pad;
    float* y_to = F + (size_t)m_pad * np;
    Vec sum[MAX_VECTORS];
    for (int j = 0; j < n; j++) sum[j] = set1(0);
    for (int i = 0; i < width; i++, f += np, y_to += np) {
      const Vec scale = scales ? set1(scales[i]) : set1(1), b = set1(offsets[i]);
      for (int j = 0; j < n; j++) {
        const Vec y = load(f + j * VL) * scale - b;
        if (GRADIENTS) store(y_to + j * VL, y);
        sum[j] = fma(y, y, sum[j]);
      }
    }
    for (int j = 0; j < n; j++) store(half_norm + j * VL, has_norm ? sum[j] * set1(0.5f) : set1(0));
    for (int t = 0; has_norm && has_linear && t < np; t++) {
      Vec dot = set1(0);
      for (int i = 0; i < d_pad; i += VL) dot = fma(load(fold_linear + i), load_row_vec<BF16>(rows.p + t * rows.rs, i), dot);
      half_norm[t] -= reduce_add(dot);
    }
  }
};
