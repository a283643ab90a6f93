// bfloat16 products on the matrix unit (AMX), whose tiles have 16 rows of 64 bytes. Operands packed as in gemm.h are what a tile
// needs: a row of A holds consecutive summands, a row of B one pair of summands for each of 16 columns.
#pragma once
#include <algorithm>

#include "gemm.h"

#if defined(__AMX_BF16__)
// Shapes of the eight tiles. 0–3: accumulators; 4 and 5: A and B with 32 summands; 6 and 7: A and B with 16, for the remainder.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};
static_assert(sizeof(TileShapes) == 64, "the processor reads 64 bytes");
static constexpr TileShapes SHAPES;  // not a local variable: compilers miss that _tile_loadconfig reads all of it, and drop the stores

// Configures this thread's tiles for as long as it lives. Other users, such as torch's kernels, configure their own.
struct TileConfig {
  TileConfig() { _tile_loadconfig(&SHAPES); }
  ~TileConfig() { _tile_release(); }
};

// C = A · B, or +=, over the units k0 … k1-1, both multiples of 8. C is 16 × 16·NT; with TALL it is 16·NT × 16, for products
// whose B is the larger operand: it is then read once for all rows.
template <int NT, bool TALL>
static inline __attribute__((always_inline)) void amx_kernel(const float* a, long lda, const float* b, long ldb, ExtraPair extra,
                                                             int k0, int k1, float* c, long ldc, bool accumulate) {
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
  // One operand's tile stays for a step while the other moves along.
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
  for (;; a = extra.a, b = extra.b, extra = {}) {
    int k = k0;
    for (; k + 16 <= k1; k += 16) STEP(4, 5)
    if (k < k1) STEP(6, 7)
    if (!extra.present()) break;
  }
#undef STEP
#undef PRODUCT
  _tile_stored(0, c, sc);
  if (NT > 1) { _tile_stored(1, c + next, sc); }
  if (NT > 2) { _tile_stored(2, c + 2 * next, sc); }
  if (NT > 3) { _tile_stored(3, c + 3 * next, sc); }
}

// The same for a number of tiles known at run time only; 0 does nothing.
template <bool TALL>
static inline void amx_kernel(int count, const float* a, long lda, const float* b, long ldb, ExtraPair extra, int k0, int k1,
                              float* c, long ldc, bool accumulate) {
  switch (count) {
    case 4: return amx_kernel<4, TALL>(a, lda, b, ldb, extra, k0, k1, c, ldc, accumulate);
    case 3: return amx_kernel<3, TALL>(a, lda, b, ldb, extra, k0, k1, c, ldc, accumulate);
    case 2: return amx_kernel<2, TALL>(a, lda, b, ldb, extra, k0, k1, c, ldc, accumulate);
    case 1: return amx_kernel<1, TALL>(a, lda, b, ldb, extra, k0, k1, c, ldc, accumulate);
  }
}

// As `gemm`. Bands are rounded to whole tiles, so the summands between a band's end and the end of its tile must be 0.
static void gemm_amx(int M, int N, int K, Lhs a, const float* b, long ldb, float* c, long ldc, bool accumulate, Band band,
                     ExtraPair extra) {
  auto second = [&](long rows, int column) { return extra.present() ? ExtraPair{extra.a + rows, extra.b + column} : ExtraPair{}; };
  if (N > M && M <= 64 && is_full(band)) {
    for (int n = 0; n < N; n += 16)
      amx_kernel<true>(M / 16, a.p, a.rs, b + n, ldb, second(0, n), 0, pad16(K) / 2, c + n, ldc, accumulate);
    return;
  }
  for (int n = 0; n < N; n += 64)
    for (int i = 0; i < M; i += 16) {
      const int k0 = std::max({0, i + band.k_lo, n - band.k_after}) & ~15;
      const int k1 = pad16(std::min({K, i + 16 + band.k_hi, std::min(N, n + 64) + band.k_before}));
      const int first = std::max(n, i + band.out_lo) & ~15, last = std::min({N, n + 64, pad16(i + 16 + band.out_hi)});
      const long rows = i * a.rs;
      amx_kernel<false>((last - first) / 16, a.p + rows, a.rs, b + first, ldb, second(rows, first), k0 / 2, k1 / 2, c + i * ldc + first, ldc,
                   accumulate);
    }
}
#else
struct TileConfig {};
static void gemm_amx(int, int, int, Lhs, const float*, long, float*, long, bool, Band, ExtraPair) {}
#endif
