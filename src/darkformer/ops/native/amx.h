// Products of bfloat16 on the matrix unit (AMX): tiles of 16 rows of 64 bytes. Units are packed just as a tile wants them: a left
// operand's row holds neighbouring summands, a right operand's row holds the pairs of 16 columns and more.
#pragma once
#include <algorithm>

#include "kernels.h"

#if defined(__AMX_BF16__)
// The shapes of the eight tiles: 0–3 sums; 4 and 5 left and right factor of 32 summands; 6 and 7 the same of 16, for what is left over.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};
static_assert(sizeof(TileShapes) == 64, "the processor reads 64 bytes");
static constexpr TileShapes SHAPES;  // not a local: compilers do not know that loading reads all of it, and would not write it

// While one lives, its thread has tiles of these shapes. Others who use them (torch's kernels) set their own.
struct Tiles {
  Tiles() { _tile_loadconfig(&SHAPES); }
  ~Tiles() { _tile_release(); }
};

// C (16 × 16·NT) = A · B, or +=, over the units k0 … k1-1; both are multiples of 8. Where there is a second pair of factors, its
// product is added.
template <int NT>
static inline __attribute__((always_inline)) void tiles(const float* a, const float* more_a, long lda, const float* b,
                                                        const float* more_b, long ldb, int k0, int k1, float* c, long ldc,
                                                        bool accumulate) {
  const long sa = lda * 4, sb = ldb * 4, sc = ldc * 4;
  if (accumulate) {
    _tile_loadd(0, c, sc);
    if (NT > 1) { _tile_loadd(1, c + 16, sc); }
    if (NT > 2) { _tile_loadd(2, c + 32, sc); }
    if (NT > 3) { _tile_loadd(3, c + 48, sc); }
  } else {
    _tile_zero(0);
    if (NT > 1) { _tile_zero(1); }
    if (NT > 2) { _tile_zero(2); }
    if (NT > 3) { _tile_zero(3); }
  }
#define STEP(left, right)                                                                                  \
  {                                                                                                        \
    const float* p = b + k * ldb;                                                                          \
    _tile_loadd(left, a + k, sa);                                                                          \
    _tile_loadd(right, p, sb);                                                                             \
    _tile_dpbf16ps(0, left, right);                                                                        \
    if (NT > 1) { _tile_loadd(right, p + 16, sb); _tile_dpbf16ps(1, left, right); }                        \
    if (NT > 2) { _tile_loadd(right, p + 32, sb); _tile_dpbf16ps(2, left, right); }                        \
    if (NT > 3) { _tile_loadd(right, p + 48, sb); _tile_dpbf16ps(3, left, right); }                        \
  }
  for (;; a = more_a, b = more_b, more_a = nullptr) {
    int k = k0;
    for (; k + 16 <= k1; k += 16) STEP(4, 5)
    if (k < k1) STEP(6, 7)
    if (!more_a) break;
  }
#undef STEP
  _tile_stored(0, c, sc);
  if (NT > 1) { _tile_stored(1, c + 16, sc); }
  if (NT > 2) { _tile_stored(2, c + 32, sc); }
  if (NT > 3) { _tile_stored(3, c + 48, sc); }
}

// The same for C (16·NT × 16), for a right factor that is the larger one: it is read once for all rows.
template <int NT>
static inline __attribute__((always_inline)) void tall_tiles(const float* a, const float* more_a, long lda, const float* b,
                                                             const float* more_b, long ldb, int k1, float* c, long ldc,
                                                             bool accumulate) {
  const long sa = lda * 4, sb = ldb * 4, sc = ldc * 4;
  if (accumulate) {
    _tile_loadd(0, c, sc);
    if (NT > 1) { _tile_loadd(1, c + 16 * ldc, sc); }
    if (NT > 2) { _tile_loadd(2, c + 32 * ldc, sc); }
    if (NT > 3) { _tile_loadd(3, c + 48 * ldc, sc); }
  } else {
    _tile_zero(0);
    if (NT > 1) { _tile_zero(1); }
    if (NT > 2) { _tile_zero(2); }
    if (NT > 3) { _tile_zero(3); }
  }
#define STEP(left, right)                                                                                  \
  {                                                                                                        \
    const float* p = a + k;                                                                                \
    _tile_loadd(right, b + k * ldb, sb);                                                                   \
    _tile_loadd(left, p, sa);                                                                              \
    _tile_dpbf16ps(0, left, right);                                                                        \
    if (NT > 1) { _tile_loadd(left, p + 16 * lda, sa); _tile_dpbf16ps(1, left, right); }                   \
    if (NT > 2) { _tile_loadd(left, p + 32 * lda, sa); _tile_dpbf16ps(2, left, right); }                   \
    if (NT > 3) { _tile_loadd(left, p + 48 * lda, sa); _tile_dpbf16ps(3, left, right); }                   \
  }
  for (;; a = more_a, b = more_b, more_a = nullptr) {
    int k = 0;
    for (; k + 16 <= k1; k += 16) STEP(4, 5)
    if (k < k1) STEP(6, 7)
    if (!more_a) break;
  }
#undef STEP
  _tile_stored(0, c, sc);
  if (NT > 1) { _tile_stored(1, c + 16 * ldc, sc); }
  if (NT > 2) { _tile_stored(2, c + 32 * ldc, sc); }
  if (NT > 3) { _tile_stored(3, c + 48 * ldc, sc); }
}

// As `gemm`. What a band leaves out is left out in whole tiles, so a band's summands must be 0 up to their ends.
static void gemm_tiles(int M, int N, int K, Lhs a, const float* b, long ldb, float* c, long ldc, bool accumulate, Band band,
                       const float* more_a, const float* more_b) {
  if (N > M && M <= 64 && whole(band)) {
    for (int n = 0; n < N; n += 16) {
      const float *right = b + n, *right2 = more_b + n;
      float* out = c + n;
#define TILES(n) tall_tiles<n>(a.p, more_a, a.rs, right, right2, ldb, up16(K) / 2, out, ldc, accumulate)
      switch (M / 16) {
        case 4: TILES(4); break;
        case 3: TILES(3); break;
        case 2: TILES(2); break;
        default: TILES(1); break;
      }
#undef TILES
    }
    return;
  }
  for (int n = 0; n < N; n += 64)
    for (int i = 0; i < M; i += 16) {
      const int k0 = std::max({0, i + band.k_lo, n - band.k_after}) & ~15;
      const int k1 = up16(std::min({K, i + 16 + band.k_hi, std::min(N, n + 64) + band.k_before}));
      const int first = std::max(n, i + band.out_lo) & ~15, last = std::min({N, n + 64, up16(i + 16 + band.out_hi)});
      const long rows = i * a.rs;
      const float *left = a.p + rows, *right = b + first, *left2 = more_a ? more_a + rows : nullptr, *right2 = more_b + first;
      float* out = c + i * ldc + first;
#define TILES(n) tiles<n>(left, left2, a.rs, right, right2, ldb, k0 / 2, k1 / 2, out, ldc, accumulate)
      switch ((last - first) / 16) {
        case 4: TILES(4); break;
        case 3: TILES(3); break;
        case 2: TILES(2); break;
        case 1: TILES(1); break;
        default: break;  // nothing of the band is here
      }
#undef TILES
    }
}
#else
struct Tiles {};
static void gemm_tiles(int, int, int, Lhs, const float*, long, float*, long, bool, Band, const float*, const float*) {}
#endif
