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

// C = A · B, or +=, over the units k0 … k1-1, both multiples of 8: C is 16 × 16·NT, and with TALL, for a right factor that is the larger
// one and so is read once for all rows, 16·NT × 16.
template <int NT, bool TALL>
static inline __attribute__((always_inline)) void tiles(const float* a, long lda, const float* b, long ldb, More more, int k0, int k1,
                                                        float* c, long ldc, bool accumulate) {
  const long sa = lda * 4, sb = ldb * 4, sc = ldc * 4, next = TALL ? 16 * ldc : 16, step = TALL ? 16 * lda : 16;
  if (accumulate) {
    _tile_loadd(0, c, sc);
    if (NT > 1) { _tile_loadd(1, c + next, sc); }
    if (NT > 2) { _tile_loadd(2, c + 2 * next, sc); }
    if (NT > 3) { _tile_loadd(3, c + 3 * next, sc); }
  } else {
    _tile_zero(0);
    if (NT > 1) { _tile_zero(1); }
    if (NT > 2) { _tile_zero(2); }
    if (NT > 3) { _tile_zero(3); }
  }
  // One factor stays for a step, the other moves along.
#define PRODUCT(i, left, right)                                                                            \
  if (NT > i) {                                                                                            \
    if (TALL) { _tile_loadd(left, moving + i * step, sa); } else { _tile_loadd(right, moving + i * step, sb); } \
    _tile_dpbf16ps(i, left, right);                                                                        \
  }
#define STEP(left, right)                                                                                  \
  {                                                                                                        \
    const float* moving = TALL ? a + k : b + k * ldb;                                                      \
    if (TALL) { _tile_loadd(right, b + k * ldb, sb); } else { _tile_loadd(left, a + k, sa); }              \
    PRODUCT(0, left, right) PRODUCT(1, left, right) PRODUCT(2, left, right) PRODUCT(3, left, right)        \
  }
  for (;; a = more.a, b = more.b, more = {}) {
    int k = k0;
    for (; k + 16 <= k1; k += 16) STEP(4, 5)
    if (k < k1) STEP(6, 7)
    if (!more.any()) break;
  }
#undef STEP
#undef PRODUCT
  _tile_stored(0, c, sc);
  if (NT > 1) { _tile_stored(1, c + next, sc); }
  if (NT > 2) { _tile_stored(2, c + 2 * next, sc); }
  if (NT > 3) { _tile_stored(3, c + 3 * next, sc); }
}

// The same for a number of tiles that is known when this runs; of none there is nothing to do.
template <bool TALL>
static inline void tiles(int count, const float* a, long lda, const float* b, long ldb, More more, int k0, int k1, float* c, long ldc,
                         bool accumulate) {
  switch (count) {
    case 4: return tiles<4, TALL>(a, lda, b, ldb, more, k0, k1, c, ldc, accumulate);
    case 3: return tiles<3, TALL>(a, lda, b, ldb, more, k0, k1, c, ldc, accumulate);
    case 2: return tiles<2, TALL>(a, lda, b, ldb, more, k0, k1, c, ldc, accumulate);
    case 1: return tiles<1, TALL>(a, lda, b, ldb, more, k0, k1, c, ldc, accumulate);
  }
}

// As `gemm`. What a band leaves out is left out in whole tiles, so a band's summands must be 0 up to their ends.
static void gemm_tiles(int M, int N, int K, Lhs a, const float* b, long ldb, float* c, long ldc, bool accumulate, Band band, More more) {
  auto second = [&](long rows, int column) { return more.any() ? More{more.a + rows, more.b + column} : More{}; };
  if (N > M && M <= 64 && whole(band)) {
    for (int n = 0; n < N; n += 16)
      tiles<true>(M / 16, a.p, a.rs, b + n, ldb, second(0, n), 0, up16(K) / 2, c + n, ldc, accumulate);
    return;
  }
  for (int n = 0; n < N; n += 64)
    for (int i = 0; i < M; i += 16) {
      const int k0 = std::max({0, i + band.k_lo, n - band.k_after}) & ~15;
      const int k1 = up16(std::min({K, i + 16 + band.k_hi, std::min(N, n + 64) + band.k_before}));
      const int first = std::max(n, i + band.out_lo) & ~15, last = std::min({N, n + 64, up16(i + 16 + band.out_hi)});
      const long rows = i * a.rs;
      tiles<false>((last - first) / 16, a.p + rows, a.rs, b + first, ldb, second(rows, first), k0 / 2, k1 / 2, c + i * ldc + first, ldc,
                   accumulate);
    }
}
#else
struct Tiles {};
static void gemm_tiles(int, int, int, Lhs, const float*, long, float*, long, bool, Band, More) {}
#endif
