// The matrix product that every pass is made of, and the packing of its operands.
//
// A "unit" is 32 bits: one float, or two bfloat16 that are neighbours along the summed axis. The float32 and the bfloat16
// product then differ in one instruction: fused multiply-add, or the dot product of bfloat16 pairs summed in float32.
#pragma once
#include "vec.h"

// Rows of the result that a micro-kernel computes.
template <bool BF16> constexpr int TILE_ROWS = BF16 && HAS_AMX ? 16 : MR;

template <bool BF16> static inline Vec mac(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  if (BF16) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return fma(a, b, c);
}

static inline int pad16(int n) { return (n + 15) & ~15; }
// Columns rounded to whole vectors: gemm computes these and no others of a tile's band.
static inline int vec_floor(int n) { return n > 0 ? n & ~(VL - 1) : 0; }
static inline int vec_ceil(int n) { return (n + VL - 1) & ~(VL - 1); }
constexpr int UNLIMITED = 1 << 29;  // added to indices, so well below the largest int

// The part of a product that is wanted, or that is not zero: what lies outside is not computed. Rows come in tiles of
// TILE_ROWS, and a tile computes what any of its rows needs.
struct Band {
  int out_lo = -UNLIMITED, out_hi = UNLIMITED;  // columns row+out_lo … row+out_hi of the result
  int k_lo = -UNLIMITED, k_hi = UNLIMITED;      // summands row+k_lo … row+k_hi
  int k_after = UNLIMITED;                      // summands from column-k_after on
  int k_before = UNLIMITED;                     // summands up to column+k_before
};

static inline bool is_full(const Band& b) {
  return b.out_lo == -UNLIMITED && b.k_lo == -UNLIMITED && b.out_hi == UNLIMITED && b.k_hi == UNLIMITED && b.k_after == UNLIMITED &&
         b.k_before == UNLIMITED;
}

// Left operand: element (i, k) is p[i·rs + k·cs], and one of the strides is 1.
struct Lhs {
  const float* p;
  long rs, cs;
};

// A second product to be added to the first, if there is one. Its operands are laid out like those of the first.
struct ExtraPair {
  const float *a = nullptr, *b = nullptr;
  bool present() const { return a && b; }
};

// C (MR × NW vectors) = A · B, or += their sum as a whole, over the units k0 … k1-1.
template <bool BF16, int NW>
static inline __attribute__((always_inline)) void micro_kernel(Lhs a, const float* b, long ldb, ExtraPair extra, int k0, int k1,
                                                               float* c, long ldc, bool accumulate) {
  Vec s[MR][NW];
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NW; v++) s[i][v] = set1(0);
  for (;; a.p = extra.a, b = extra.b, extra = {}) {
    if (a.cs == 1) {
      const float *p = a.p, *p3 = a.p + 3 * a.rs, *p6 = a.p + 6 * a.rs;
      const long rs = a.rs;
#pragma GCC unroll 2
      for (int k = k0; k < k1; k++) {
        Vec w[NW];
        for (int v = 0; v < NW; v++) w[v] = load(b + k * ldb + v * VL);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
          const float* row = i < 3 ? p : i < 6 ? p3 : p6;
          Vec x = set1(row[(i % 3) * rs + k]);
          for (int v = 0; v < NW; v++) s[i][v] = mac<BF16>(x, w[v], s[i][v]);
        }
      }
    } else {
      const float* p = a.p + k0 * a.cs;
#pragma GCC unroll 2
      for (int k = k0; k < k1; k++, p += a.cs) {
        Vec w[NW];
        for (int v = 0; v < NW; v++) w[v] = load(b + k * ldb + v * VL);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
          Vec x = set1(p[i]);
          for (int v = 0; v < NW; v++) s[i][v] = mac<BF16>(x, w[v], s[i][v]);
        }
      }
    }
    if (!BF16 || !extra.present()) break;
  }
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NW; v++) {
      float* to = c + i * ldc + v * VL;
      store(to, accumulate ? load(to) + s[i][v] : s[i][v]);
    }
}

// How many vectors wide the next tile is where `remaining` are left. Four make two tiles of two, not three and one.
static inline int tile_vectors(int remaining) { return remaining >= NV && remaining != 4 ? NV : remaining < 2 ? remaining : 2; }

static void gemm_amx(int M, int N, int K, Lhs a, const float* b, long ldb, float* c, long ldc, bool accumulate, Band band,
                     ExtraPair extra);

// C (M×N) = A (M×K) · B (K×N), or += with `accumulate`. M and N are multiples of 16. K counts elements, ldb units.
template <bool BF16>
static void gemm(int M, int N, int K, Lhs a, const float* b, long ldb, float* c, long ldc, bool accumulate,
                 Band band = {}, ExtraPair extra = {}) {
  if (BF16 && HAS_AMX) return gemm_amx(M, N, K, a, b, ldb, c, ldc, accumulate, band, extra);
  for (int n = 0, width; n < N; n += width * VL) {
    width = tile_vectors((N - n) / VL);
    for (int i = 0; i < M; i += MR) {
      int k0 = i + band.k_lo > 0 ? i + band.k_lo : 0;
      int k1 = i + MR + band.k_hi < K ? i + MR + band.k_hi : K;
      if (n - band.k_after > k0) k0 = n - band.k_after;
      if (n + width * VL + band.k_before < k1) k1 = n + width * VL + band.k_before;
      if (BF16) k0 = k0 / 2, k1 = (k1 + 1) / 2;
      const int first = (unsigned)vec_floor(i + band.out_lo - n) / VL;
      int last = vec_ceil(i + MR + band.out_hi - n) / VL - 1;
      if (last >= width) last = width - 1;
      const int column = n + first * VL;
      const Lhs rows{a.p + i * a.rs, a.rs, a.cs};
      const float* right = b + column;
      const ExtraPair second = extra.present() ? ExtraPair{extra.a + i * a.rs, extra.b + column} : ExtraPair{};
      float* out = c + i * ldc + column;
      if (last - first == NV - 1) micro_kernel<BF16, NV>(rows, right, ldb, second, k0, k1, out, ldc, accumulate);
      else if (last - first == 1) micro_kernel<BF16, 2>(rows, right, ldb, second, k0, k1, out, ldc, accumulate);
      else if (last == first) micro_kernel<BF16, 1>(rows, right, ldb, second, k0, k1, out, ldc, accumulate);
    }
  }
}

// b (cols×rows) = aᵀ of a (rows×cols); both sizes are multiples of 16.
static inline void transpose(const float* a, long lda, int rows, int cols, float* b, long ldb) {
  for (int i = 0; i < rows; i += VL)
    for (int j = 0; j < cols; j += VL) transpose_block(a + i * lda + j, lda, b + j * ldb + i, ldb);
}

// Pairs along the rows: (rows×cols) floats → (rows×cols/2) units.
static inline void pack_row_pairs(const float* a, long lda, int rows, int cols, float* b, long ldb) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j += VL) store_bf16((uint16_t*)(b + i * ldb) + j, load(a + i * lda + j));
}

// Pairs along the columns: (rows×cols) floats → (rows/2×cols) units.
static inline void pack_column_pairs(const float* a, long lda, int rows, int cols, float* b, long ldb) {
  for (int i = 0; i < rows; i += 2)
    for (int j = 0; j < cols; j += VL)
      store(b + (i / 2) * ldb + j, pair_bf16(load(a + i * lda + j), load(a + (i + 1) * lda + j)));
}

// The same of rows that hold bfloat16 already.
static inline void pack_column_pairs_bf16(const float* a, long lda, int rows, int cols, float* b, long ldb) {
#if defined(__AVX512BF16__)
  for (int i = 0; i < rows; i += 2)
    for (int j = 0; j < cols; j += VL) {
      auto widened = [&](int k) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)((const uint16_t*)(a + k * lda) + j))); };
      store(b + (i / 2) * ldb + j, _mm512_castsi512_ps(_mm512_or_si512(widened(i), _mm512_slli_epi32(widened(i + 1), 16))));
    }
#endif
}

// Operands from float32 matrices. `to` and `tmp` are scratch, used where the operand is not the matrix itself.
template <bool BF16> static inline Lhs lhs(const float* a, long lda, int rows, int k, float* to) {
  if (!BF16) return {a, lda, 1};
  pack_row_pairs(a, lda, rows, k, to, k / 2);
  return {to, k / 2, 1};
}
// The transpose of a (k×rows) as left operand; `to` and `tmp` hold rows × pad16(k/2) units.
template <bool BF16> static inline Lhs lhs_t(const float* a, long lda, int rows, int k, float* to, float* tmp) {
  if (!BF16) return {a, 1, lda};
  pack_column_pairs(a, lda, k, rows, tmp, rows);
  transpose(tmp, rows, pad16(k / 2), rows, to, pad16(k / 2));  // columns after k/2 are not used
  return {to, pad16(k / 2), 1};
}
struct Rhs {
  const float* p;
  long ld;
};
template <bool BF16> static inline Rhs rhs(const float* a, long lda, int k, int cols, float* to) {
  if (!BF16) return {a, lda};
  pack_column_pairs(a, lda, k, cols, to, cols);
  return {to, cols};
}
// The transpose of a (cols×k) as right operand.
template <bool BF16> static inline Rhs rhs_t(const float* a, long lda, int cols, int k, float* to, float* tmp) {
  if (!BF16) {
    transpose(a, lda, cols, k, to, cols);
    return {to, cols};
  }
  pack_row_pairs(a, lda, cols, k, tmp, pad16(k / 2));
  transpose(tmp, pad16(k / 2), cols, pad16(k / 2), to, cols);
  return {to, cols};
}
