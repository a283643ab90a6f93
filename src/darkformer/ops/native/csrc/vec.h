// One vector type, `Vec`, for each instruction set; every kernel is written once against it. VL floats to a vector, and a
// matrix product's micro-kernel keeps MR × NV vectors of the result in registers.
#pragma once
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
typedef __m512 Vec;
constexpr int VL = 16, MR = 8, NV = 2;
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
static inline Vec set1(float x) { return _mm512_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
static inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
static inline Vec round_nearest(Vec a) { return _mm512_roundscale_ps(a, 0); }
// 2^⌊log2 |x|⌋; 0 for 0.
static inline Vec power_of_two(Vec x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7f800000)));
}
// p·2^n, and exactly 0 where x, the argument of the exponential, is below the smallest normal result's logarithm.
static inline Vec ldexp_or_zero(Vec p, Vec n, Vec x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-87.0f), _CMP_GE_OQ), p, n);
}
static inline Vec load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline __m512i bf16_bits(Vec x) {  // rounded to nearest even, in the low half of each element
  __m512i i = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(_mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
}
#if defined(__AVX512BF16__)
static inline void store_bf16(uint16_t* p, Vec x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
static inline Vec interleave(__m512i both) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
}
// Rounds two vectors to bfloat16 and interleaves them: element i of the result holds (low[i], high[i]).
static inline Vec pair_bf16(Vec low, Vec high) { return interleave((__m512i)_mm512_cvtne2ps_pbh(high, low)); }
// The same, and also stores each of them on its own.
static inline Vec pair_bf16(Vec low, Vec high, uint16_t* to_low, uint16_t* to_high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  _mm256_storeu_si256((__m256i*)to_low, _mm512_castsi512_si256(both));
  _mm256_storeu_si256((__m256i*)to_high, _mm512_extracti64x4_epi64(both, 1));
  return interleave(both);
}
#else
static inline void store_bf16(uint16_t* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bf16_bits(x)));
}
static inline Vec pair_bf16(Vec low, Vec high) {
  return _mm512_castsi512_ps(_mm512_or_si512(bf16_bits(low), _mm512_slli_epi32(bf16_bits(high), 16)));
}
static inline Vec pair_bf16(Vec low, Vec high, uint16_t* to_low, uint16_t* to_high) {
  store_bf16(to_low, low), store_bf16(to_high, high);
  return pair_bf16(low, high);
}
#endif
static inline Vec round_to_bf16(Vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(x), 16)); }
// Splits x = mantissa·2^n with √½ <= mantissa < √2.
static inline Vec mantissa(Vec x, Vec& n) {
  const __m512i root = _mm512_set1_epi32(0x3f3504f3), bits = _mm512_castps_si512(x);
  const __m512i power = _mm512_srai_epi32(_mm512_sub_epi32(bits, root), 23);
  n = _mm512_cvtepi32_ps(power);
  return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23)));
}
static inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// The first n elements, 0 in place of the others.
static inline Vec keep_first(Vec x, int n) { return _mm512_maskz_mov_ps(n >= 16 ? 0xffff : (1u << n) - 1, x); }
// Element i of the result is op reduced over row i of a VL × VL block.
template <class Op> static inline Vec reduce_rows(const float* rows, Op op) {
  Vec r[16];
  for (int i = 0; i < 16; i += 2) {
    const Vec a = load(rows + i * 16), b = load(rows + (i + 1) * 16);
    r[i / 2] = op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
    r[i] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int n = 2; n; n /= 2)
    for (int i = 0; i < n; i++)
      r[i] = op(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88), _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xdd));
  return r[0];
}
static inline void transpose_block(const float* a, long lda, float* b, long ldb) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(a + i * lda);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      __m512d x = _mm512_castps_pd(t[i + j]), y = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int i = 0; i < 4; i++)
    for (int h = 0; h < 2; h++) {
      t[8 * h + i] = _mm512_shuffle_f32x4(r[8 * h + i], r[8 * h + i + 4], 0x88);
      t[8 * h + i + 4] = _mm512_shuffle_f32x4(r[8 * h + i], r[8 * h + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_ps(b + i * ldb, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(b + (i + 8) * ldb, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 Vec;
constexpr int VL = 8, MR = 4, NV = 3;  // 12 accumulators, 3 vectors of B and 1 of A: all 16 registers
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
static inline Vec set1(float x) { return _mm256_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline Vec power_of_two(Vec x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000))); }
static inline Vec round_nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec ldexp_or_zero(Vec p, Vec n, Vec x) {
  // p lies between 0.7 and 1.42 and n between -126 and 126, so adding n to the exponent's bits multiplies by 2^n.
  __m256i bits = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
  return _mm256_and_ps(_mm256_cmp_ps(x, set1(-87.0f), _CMP_GE_OQ), _mm256_castsi256_ps(bits));
}
static inline Vec load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline void store_bf16(uint16_t* p, Vec x) {
  __m256i i = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  i = _mm256_srli_epi32(_mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(i, i), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
static inline Vec pair_bf16(Vec low, Vec) { return low; }  // bfloat16 products exist with AVX-512 only
static inline Vec pair_bf16(Vec low, Vec, uint16_t*, uint16_t*) { return low; }
static inline Vec round_to_bf16(Vec x) { return x; }
static inline Vec mantissa(Vec x, Vec& n) {
  const __m256i root = _mm256_set1_epi32(0x3f3504f3), bits = _mm256_castps_si256(x);
  const __m256i power = _mm256_srai_epi32(_mm256_sub_epi32(bits, root), 23);
  n = _mm256_cvtepi32_ps(power);
  return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
}
static inline bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
static inline Vec keep_first(Vec x, int n) {
  const __m256i cache = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_and_ps(x, _mm256_castsi256_ps(cache));
}
template <class Op> static inline Vec reduce_rows(const float* rows, Op op) {
  Vec r[4];
  for (int i = 0; i < 4; i++) {
    const Vec a = load(rows + 2 * i * 8), b = load(rows + (2 * i + 1) * 8);
    r[i] = op(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; i++) {
    const __m256d a = _mm256_castps_pd(r[2 * i]), b = _mm256_castps_pd(r[2 * i + 1]);
    r[i] = op(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return op(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
}
static inline void transpose_block(const float* a, long lda, float* b, long ldb) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(a + i * lda);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(b + i * ldb, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(b + (i + 4) * ldb, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#else
#error "compile with AVX-512 or with AVX2 and FMA"
#endif

// Operations for `reduce_rows`.
struct Add {
  Vec operator()(Vec a, Vec b) const { return a + b; }
};
struct Max {
  Vec operator()(Vec a, Vec b) const { return vmax(a, b); }
};

#if defined(__AVX512BF16__)
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif
#if defined(__AMX_BF16__)
constexpr bool HAS_AMX = true;
#else
constexpr bool HAS_AMX = false;
#endif
constexpr float LOG2E = 1.44269504088896341f;

#if defined(__AVX512BF16__)
// 2^t to 3e-6, a thousandth of the error of rounding to bfloat16, in half the instructions of `vexp<false>`: 2^floor(t)·2^r.
static inline Vec exp2_bf16(Vec t) {
  const Vec r = _mm512_reduce_ps(t, 9);
  Vec p = fma(set1(0.0135341678f), r, set1(0.0520114601f));
  p = fma(p, r, set1(0.241442755f));
  p = fma(p, r, set1(0.693003833f));
  return _mm512_scalef_ps(fma(p, r, set1(1.00000262f)), t);
}
#endif

// e^x to about one unit in the last place; exactly 0 below -87. Constant above 87, where only rows get that are computed
// again in smaller chunks. Minimax coefficients of the Cephes library.
template <bool BF16> static inline Vec vexp(Vec x) {
#if defined(__AVX512BF16__)
  if (BF16) return exp2_bf16(x * set1(LOG2E));
#endif
  Vec y = vmin(vmax(x, set1(-100.0f)), set1(87.0f));
  Vec n = round_nearest(y * set1(LOG2E));
  Vec r = fma(n, set1(-0.693359375f), y);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return ldexp_or_zero(fma(p, r * r, r + set1(1.0f)), n, x);
}

// ln x of positive normal numbers to about one unit in the last place; 0 gives about -88. As in the Cephes library.
static inline Vec vlog(Vec x) {
  Vec n;
  Vec f = mantissa(x, n) - set1(1.0f);
  Vec p = fma(set1(7.0376836292e-2f), f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  const Vec square = f * f;
  p = fma(p * f, square, n * set1(-2.12194440e-4f));
  return fma(n, set1(0.693359375f), f + fma(square, set1(-0.5f), p));
}

// e^(x - c) for many x and one c: vexp_minus(x, exp_offset(c)), so that c is converted once. For bfloat16 up to LARGEST_OFFSET:
// beside a larger c the products with log2 e lose digits.
constexpr float LARGEST_OFFSET = 4096;
template <bool BF16> static inline Vec exp_offset(Vec c) { return BF16 ? c * set1(-LOG2E) : c; }
template <bool BF16> static inline Vec vexp_minus(Vec x, Vec offset) {
#if defined(__AVX512BF16__)
  if (BF16) return exp2_bf16(fma(x, set1(LOG2E), offset));
#endif
  return vexp<BF16>(x - offset);
}
