// The structures that Python fills in, the status that it gets back, and sizes derived from them.
#pragma once
#include <sys/mman.h>

#include "gemm.h"
#include "scratch.h"

constexpr int CHUNK = 64;            // tokens whose features exist at the same time
constexpr float LOG_ZERO = -1e30f;   // stands for log 0 in running maxima: finite, so that differences are never NaN
constexpr float MASKED = 2e30f;      // subtracted from masked log-features: far below LOG_ZERO, so their exponential is 0
constexpr float LARGEST_NUMBER = 0x1p59f;  // of queries, keys and maps: sums of 512 products of two are finite. Also in load.py
constexpr float LARGEST_LOGIT = 0x1p21f;   // of a row: beyond it rounding decides, by a quarter and more
constexpr float UNDERFLOW_LOG = 41;  // a row whose normaliser is below e^-41 of its maximum is computed in smaller chunks

// What a kernel returns; `Status` in load.py.
enum Status : int {
  OK = 0,
  NON_FINITE_INPUT = 1,   // a step only: the state is unchanged
  NON_FINITE = 2,         // in an input, a map, the state or the output, whose contents are unspecified
  OUT_OF_MEMORY = 3,
};

// Mirrored by `Call` in load.py, field by field: 64-bit integers, then pointers. Tensors are contiguous but for the strides
// given here; B batch rows, G key/value heads, R query heads a group, L tokens.
struct Call {
  int64_t B, G, R, L, d, d_v, m, r, window, sinks, bf16, threads;
  int64_t q_strides[4], k_strides[3], v_strides[3];  // in elements, of (b, g, r, l) and (b, g, l)
  double scaling;
  void *omp_parallel;  // GOMP_parallel of the OpenMP runtime that torch uses, or null
  int64_t *splits;     // counts chunks that were split because a row's normaliser underflowed
  const void *q, *k, *v;
  const float *map_q, *offset_q, *map_k, *offset_k;  // (G, m+r, d), (G, m+r): see feature_map.h
  const float *fold_q, *fold_k;                      // (G, 3, d), or null
  const float *feature_values, *feature_sum, *log_scale;  // (B, G, m, d_v), (B, G, m): the state, or null before the first token
  const void *recent_k, *recent_v, *sink_k, *sink_v;  // (B, G, window or sinks, d or d_v)
  const int64_t *lengths, *counts;  // (B): real tokens of this call, and before it
  // Results of the forward pass; the backward pass reads `lse` and `log_scale_out`.
  void *out;                                                    // (B, G, R, L, d_v)
  float *lse;                                                   // (B, G, R, L): log-normaliser
  float *feature_values_out, *feature_sum_out, *log_scale_out;  // the first two are null if not wanted
  // Gradients that the backward pass reads.
  const void *d_out;
  const float *d_feature_values_out, *d_feature_sum_out;  // null if the sums were not wanted
  // Gradients that it writes. Those of maps and folds are null if not wanted, those of the sums before the first token.
  void *dq, *dk, *dv;
  float *d_map_q, *d_offset_q, *d_map_k, *d_offset_k, *d_fold_q, *d_fold_k;
  float *d_feature_values, *d_feature_sum;
  void *d_recent_k, *d_recent_v, *d_sink_k, *d_sink_v;
  mutable int64_t status;  // set to NON_FINITE by any thread
};

// One token for each batch row. Mirrored by `StepCall` in load.py. The state is updated in place.
// The rows of a batch lie one after another and advance together; or, with `slots`, each row's state lies in a slot of a pool
// and has its own number of tokens. The pointers to the state are then those of slot 0.
struct StepCall {
  int64_t B, G, R, d, d_v, m, r, window, sinks, bf16, threads;
  int64_t head;  // the place in the rings that holds the oldest key, and takes the new one; with slots counts[b] % window
  int64_t slot_bytes;                                // from one slot to the next
  int64_t q_strides[2], k_strides[2], v_strides[2];  // in elements, of (b, h) and (b, g)
  double scaling, softcap;                           // softcap 0: none
  void* omp_parallel;
  const void *q, *k, *v;
  const float *map_q, *offset_q, *map_k, *offset_k;  // (G, m+r, d), (G, m+r)
  float *feature_values, *feature_sum, *log_scale;   // (B, G, m, d_v), (B, G, m)
  void *recent_k, *recent_v;                         // (B, G, window, d or d_v): rings
  void *sink_k, *sink_v;
  int64_t* counts;                                   // (B): tokens seen; advanced by the call, but not with slots
  void* out;                                         // (B, G·R, 1, d_v)
  const int64_t* slots;                              // (B): each row's slot, all different; or null
};

// Sizes rounded up to whole vectors (`…_pad`). Rows a power of two apart compete for the same few sets of the cache, so the rows
// of the state's values (`values_ld`) and of folded features (`map_rows`, whose last 16 columns are then unused) get 64 bytes more.
struct Dims {
  int d, d_v, m, r, d_pad, dv_pad, values_ld, m_pad, r_pad, map_rows, sinks_pad, W, S, R;
  bool has_exact;  // keys that are seen exactly, not through features
  explicit Dims(const Call& c)
      : d(c.d), d_v(c.d_v), m(c.m), r(c.m ? c.r : 0), d_pad(pad16(d)), dv_pad(pad16(d_v)),
        values_ld(dv_pad % 32 ? dv_pad : dv_pad + 16), m_pad(pad16(m)), r_pad(pad16(r)),
        map_rows(m_pad + r_pad + (c.fold_q && (m_pad + r_pad) % 32 == 0 ? 16 : 0)),
        sinks_pad(pad16(c.sinks)), W(c.window), S(c.sinks), R(c.R), has_exact(W + S > 0) {}
};

// Results of many megabytes are fresh memory, whose pages are mapped at the first touch: with pages of 2 MB that is a few
// faults instead of thousands. Only a hint: where there are no such pages nothing changes.
static inline void use_huge_pages(void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t from = ((uintptr_t)p + PAGE - 1) / PAGE * PAGE, to = ((uintptr_t)p + bytes) / PAGE * PAGE;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

static inline void set_non_finite(const Call& c) { __atomic_store_n(&c.status, NON_FINITE, __ATOMIC_RELAXED); }

// Sets the status if one of n numbers, a multiple of a vector's, is NaN, infinite or as large as the limit, a power of two:
// scaled by what makes the limit infinite, 0·x is 0 for all others.
static inline void check_finite(const Call& c, const float* x, size_t n, float limit = INFINITY) {
  const Vec zero = set1(0), scale = set1(std::isinf(limit) ? 1 : 0x1p127f / limit * 2);
  Vec sum[4] = {zero, zero, zero, zero};  // four independent chains of additions
  size_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    for (int j = 0; j < 4; j++) sum[j] = fma(load(x + i + j * VL) * scale, zero, sum[j]);
  for (; i < n; i += VL) sum[0] = fma(load(x + i) * scale, zero, sum[0]);
  if (reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) != 0) set_non_finite(c);
}

// The same for n units of bfloat16 numbers.
static inline void check_finite_bf16(const Call& c, const float* x, size_t n, float limit = INFINITY) {
#if defined(__AVX512BF16__)
  uint32_t bits;
  memcpy(&bits, &limit, 4);
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), too_large = _mm512_set1_epi16(bits >> 16);
  __mmask32 non_finite = 0;
  size_t i = 0;
  for (; i + VL <= n; i += VL)
    non_finite |= _mm512_cmpge_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(x + i), magnitude), too_large);
  if (i < n)  // rows of 16 numbers are half a vector
    non_finite |= _mm512_cmpge_epi16_mask(_mm512_and_si512(_mm512_maskz_loadu_epi32((1u << (n - i)) - 1, x + i), magnitude), too_large);
  if (non_finite) set_non_finite(c);
#endif
}
