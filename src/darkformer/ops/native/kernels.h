// Packing and the matrix product every pass is made of.
//
// A "unit" is 32 bits: one float, or two neighbouring bfloat16 along the summed axis. Products then differ only in one
// instruction (fused multiply-add, or the dot product of bfloat16 pairs with float32 accumulation).
#pragma once
#include "vectors.h"

// Rows of the result that a product computes at once.
template <bool BF> constexpr int ROWS = BF && HAS_AMX ? 16 : MR;

template <bool BF> static inline vf mac(vf a, vf b, vf c) {
#if defined(__AVX512BF16__)
  if (BF) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return fma(a, b, c);
}

static inline int up16(int n) { return (n + 15) & ~15; }
// The vectors that a tile's band touches: gemm computes these columns and no others.
static inline int down(int n) { return n > 0 ? n & ~(VL - 1) : 0; }
static inline int up(int n) { return (n + VL - 1) & ~(VL - 1); }
constexpr int FAR_AWAY = 1 << 29;

// Which part of a product is wanted. Rows come in tiles of ROWS; the band is given relative to the row.
struct Band {
  int out_lo = -FAR_AWAY, out_hi = FAR_AWAY;  // columns row+out_lo … row+out_hi of the result
  int k_lo = -FAR_AWAY, k_hi = FAR_AWAY;      // summands row+k_lo … row+k_hi
  int k_after = FAR_AWAY;                     // summands from column-k_after on
  int k_before = FAR_AWAY;                    // summands up to column+k_before
};

static inline bool whole(const Band& b) {
  return b.out_lo == -FAR_AWAY && b.k_lo == -FAR_AWAY && b.out_hi == FAR_AWAY && b.k_hi == FAR_AWAY && b.k_after == FAR_AWAY &&
         b.k_before == FAR_AWAY;
}

// A left operand: element (i, k) at p[i·rs + k·cs], one of the strides being 1.
struct Lhs {
  const float* p;
  long rs, cs;
};

// A second pair of factors whose product is added, if there is one. They lie as the first pair does.
struct More {
  const float *a = nullptr, *b = nullptr;
  bool any() const { return a && b; }
};

// C (MR × NW vectors) = A · B, or +=, over the units k0 … k1-1.
template <bool BF, int NW>
static inline __attribute__((always_inline)) void tile(Lhs a, const float* b, long ldb, More more, int k0, int k1, float* c, long ldc,
                                                       bool accumulate) {
  vf s[MR][NW];
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NW; v++) s[i][v] = accumulate ? load(c + i * ldc + v * VL) : all(0);
  for (;; a.p = more.a, b = more.b, more = {}) {
    if (a.cs == 1) {
      const float *p = a.p, *p3 = a.p + 3 * a.rs, *p6 = a.p + 6 * a.rs;
      const long rs = a.rs;
#pragma GCC unroll 2
      for (int k = k0; k < k1; k++) {
        vf w[NW];
        for (int v = 0; v < NW; v++) w[v] = load(b + k * ldb + v * VL);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
          const float* row = i < 3 ? p : i < 6 ? p3 : p6;
          vf x = all(row[(i % 3) * rs + k]);
          for (int v = 0; v < NW; v++) s[i][v] = mac<BF>(x, w[v], s[i][v]);
        }
      }
    } else {
      const float* p = a.p + k0 * a.cs;
#pragma GCC unroll 2
      for (int k = k0; k < k1; k++, p += a.cs) {
        vf w[NW];
        for (int v = 0; v < NW; v++) w[v] = load(b + k * ldb + v * VL);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
          vf x = all(p[i]);
          for (int v = 0; v < NW; v++) s[i][v] = mac<BF>(x, w[v], s[i][v]);
        }
      }
    }
    if (!BF || !more.any()) break;
  }
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NW; v++) store(c + i * ldc + v * VL, s[i][v]);
}

// How many vectors of columns the next tile takes where `left` are left: never one beside a wide one.
static inline int columns_of_tile(int left) { return left >= NV && left != 4 ? NV : left < 2 ? left : 2; }

static void gemm_tiles(int M, int N, int K, Lhs a, const float* b, long ldb, float* c, long ldc, bool accumulate, Band band,
                       More more);

// C (M×N) = A (M×K) · B (K×N), or +=. M and N are multiples of 16, K counts elements; B has units in its rows.
template <bool BF>
static void gemm(int M, int N, int K, Lhs a, const float* b, long ldb, float* c, long ldc, bool accumulate,
                 Band band = {}, More more = {}) {
  if (BF && HAS_AMX) return gemm_tiles(M, N, K, a, b, ldb, c, ldc, accumulate, band, more);
  for (int n = 0, width; n < N; n += width * VL) {
    width = columns_of_tile((N - n) / VL);
    for (int i = 0; i < M; i += MR) {
      int k0 = i + band.k_lo > 0 ? i + band.k_lo : 0;
      int k1 = i + MR + band.k_hi < K ? i + MR + band.k_hi : K;
      if (n - band.k_after > k0) k0 = n - band.k_after;
      if (n + width * VL + band.k_before < k1) k1 = n + width * VL + band.k_before;
      if (BF) k0 = k0 / 2, k1 = (k1 + 1) / 2;
      const int first = (unsigned)down(i + band.out_lo - n) / VL;
      int last = up(i + MR + band.out_hi - n) / VL - 1;
      if (last >= width) last = width - 1;
      const int column = n + first * VL;
      const Lhs rows{a.p + i * a.rs, a.rs, a.cs};
      const float* right = b + column;
      const More second = more.any() ? More{more.a + i * a.rs, more.b + column} : More{};
      float* out = c + i * ldc + column;
      if (last - first == NV - 1) tile<BF, NV>(rows, right, ldb, second, k0, k1, out, ldc, accumulate);
      else if (last - first == 1) tile<BF, 2>(rows, right, ldb, second, k0, k1, out, ldc, accumulate);
      else if (last == first) tile<BF, 1>(rows, right, ldb, second, k0, k1, out, ldc, accumulate);
    }
  }
}

// b (cols×rows) = transpose of a (rows×cols); both sizes multiples of 16.
static inline void transpose(const float* a, long lda, int rows, int cols, float* b, long ldb) {
  for (int i = 0; i < rows; i += VL)
    for (int j = 0; j < cols; j += VL) transpose_block(a + i * lda + j, lda, b + j * ldb + i, ldb);
}

// Neighbouring elements of each row as bfloat16 pairs: (rows×cols) floats → (rows×cols/2) units.
static inline void pair_rows(const float* a, long lda, int rows, int cols, float* b, long ldb) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j += VL) to_bf16((uint16_t*)(b + i * ldb) + j, load(a + i * lda + j));
}

// Neighbouring rows as bfloat16 pairs: (rows×cols) floats → (rows/2×cols) units.
static inline void pair_columns(const float* a, long lda, int rows, int cols, float* b, long ldb) {
  for (int i = 0; i < rows; i += 2)
    for (int j = 0; j < cols; j += VL)
      store(b + (i / 2) * ldb + j, pair_bf16(load(a + i * lda + j), load(a + (i + 1) * lda + j)));
}

// Rows of bfloat16 as they come, two numbers a unit, need no rounding. Neighbouring rows as pairs: as `pair_columns`.
static inline void pair_packed(const float* a, long lda, int rows, int cols, float* b, long ldb) {
#if defined(__AVX512BF16__)
  for (int i = 0; i < rows; i += 2)
    for (int j = 0; j < cols; j += VL) {
      auto wide = [&](int k) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)((const uint16_t*)(a + k * lda) + j))); };
      store(b + (i / 2) * ldb + j, _mm512_castsi512_ps(_mm512_or_si512(wide(i), _mm512_slli_epi32(wide(i + 1), 16))));
    }
#endif
}

// Operands from float32 matrices. `to` is scratch, used where the operand is not the matrix itself.
template <bool BF> static inline Lhs lhs(const float* a, long lda, int rows, int k, float* to) {
  if (!BF) return {a, lda, 1};
  pair_rows(a, lda, rows, k, to, k / 2);
  return {to, k / 2, 1};
}
// The transpose of a (k×rows) as left operand. `tmp` and `to` hold rows × up16(k/2) units.
template <bool BF> static inline Lhs lhs_t(const float* a, long lda, int rows, int k, float* to, float* tmp) {
  if (!BF) return {a, 1, lda};
  pair_columns(a, lda, k, rows, tmp, rows);
  transpose(tmp, rows, up16(k / 2), rows, to, up16(k / 2));  // what is behind k/2 is not used
  return {to, up16(k / 2), 1};
}
struct Rhs {
  const float* p;
  long ld;
};
template <bool BF> static inline Rhs rhs(const float* a, long lda, int k, int cols, float* to) {
  if (!BF) return {a, lda};
  pair_columns(a, lda, k, cols, to, cols);
  return {to, cols};
}
// The transpose of a (cols×k) as right operand.
template <bool BF> static inline Rhs rhs_t(const float* a, long lda, int cols, int k, float* to, float* tmp) {
  if (!BF) {
    transpose(a, lda, cols, k, to, cols);
    return {to, cols};
  }
  pair_rows(a, lda, cols, k, tmp, up16(k / 2));
  transpose(tmp, up16(k / 2), cols, up16(k / 2), to, cols);
  return {to, cols};
}
