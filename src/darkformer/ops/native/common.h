// What a call brings, packed operands, the plan of parallel work, and the log-features.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "amx.h"
#include "kernels.h"
#include "scratch.h"

constexpr int CHUNK = 64;            // tokens whose features exist at once
constexpr float LOG_ZERO = -1e30f;   // stands for log 0 in stabilisers
constexpr float MASKED = 2e30f;      // subtracted from masked log-features: below LOG_ZERO, so their exponential is 0
constexpr float UNDERFLOW_LOG = 41;  // a row whose normaliser is below e^-41 of its maximum is computed again

// Mirrors `Call` in load.py, field by field: 64-bit integers, then pointers.
struct Call {
  int64_t B, G, R, L, d, dv, m, r, window, sinks, bf16, threads;
  int64_t qs[4], ks[3], vs[3];  // strides in elements of (b, g, r, l) and (b, g, l)
  double scaling;
  void *parallel;  // GOMP_parallel of the OpenMP runtime that torch uses, or null
  int64_t *splits;
  int64_t *bad;    // set where an input, a map, a sum of the state or the output is not finite; null in a backward call
  const void *q, *k, *v;
  const float *wq, *offq, *wk, *offk;        // (G, m+r, d), (G, m+r)
  const float *values, *total, *scale;       // the state's sums, or null before the first token
  const void *recent_k, *recent_v, *sink_k, *sink_v;
  const int64_t *lengths, *count;
  const float *foldq, *foldk;                // (G, 3, d): see `Map`, or null
  void *out;                                 // (B, G, R, L, dv)
  float *lse;                                // (B, G, R, L)
  float *values_out, *total_out, *scale_out; // the first two null where nobody wants them
  const void *grad_out;
  const float *grad_values, *grad_total;     // null where nobody looked at the sums
  void *dq, *dk, *dvalue;
  float *dwq, *doffq, *dwk, *doffk;          // null, like those of the folds, where nobody wants them
  float *dvalues, *dtotal;                   // null before the first token
  void *d_recent_k, *d_recent_v, *d_sink_k, *d_sink_v;
  float *dfoldq, *dfoldk;
};

// Results of many megabytes are fresh memory, whose pages are made at the first touch: with pages of 2 MB that is a few
// faults in place of thousands. A hint; where the system knows no such pages nothing changes.
static inline void huge_pages(void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t from = ((uintptr_t)p + PAGE - 1) / PAGE * PAGE, to = ((uintptr_t)p + bytes) / PAGE * PAGE;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// Rows as `Rows` reads them (float32, or bfloat16 as it comes, two numbers in a unit) as left and right factor; their transpose as
// right factor.
template <bool BF> static inline Lhs left(const float* x, int width) { return {x, BF ? width / 2 : width, 1}; }
template <bool BF> static inline Rhs right(const float* x, int np, int width, float* to) {
  if (!BF) return {x, width};
  pair_packed(x, width / 2, np, width, to, width);
  return {to, width};
}
template <bool BF> static inline Rhs transposed(const float* x, int np, int width, float* to) {
  const int units = BF ? width / 2 : width;
  transpose(x, units, np, up16(units), to, np);  // half a block too many where rows are odd multiples of 16
  return {to, np};
}

// Operands packed into scratch: of a matrix or of its transpose, as left or as right factor (see kernels.h).
template <bool BF> struct Pack {
  static float* take(size_t n) { return scratch().take(n); }
  static Lhs l(const float* a, long ld, int rows, int k) { return lhs<BF>(a, ld, rows, k, BF ? take(rows * k / 2) : nullptr); }
  static Lhs lt(const float* a, long ld, int rows, int k) {
    return lhs_t<BF>(a, ld, rows, k, BF ? take(rows * up16(k / 2)) : nullptr, BF ? take(rows * up16(k / 2)) : nullptr);
  }
  static Rhs r(const float* a, long ld, int k, int cols) { return rhs<BF>(a, ld, k, cols, BF ? take(k / 2 * cols) : nullptr); }
  static Rhs rt(const float* a, long ld, int cols, int k) {
    return rhs_t<BF>(a, ld, cols, k, take((BF ? up16(k / 2) : k) * cols), BF ? take(up16(k / 2) * cols) : nullptr);
  }
  // The same of rows as `Rows` reads them.
  static Rhs rows(const float* x, int np, int width) { return right<BF>(x, np, width, BF ? take(np / 2 * width) : nullptr); }
  static Rhs turned(const float* x, int np, int width) { return transposed<BF>(x, np, width, take(np * (width + 16))); }
  static Lhs rows_t(const float* x, int width, int np) {
    if (!BF) return {x, 1, width};
    const int units = up16(np / 2);
    float *pairs = take(units * width), *to = take(units * width);
    pair_packed(x, width / 2, np, width, pairs, width);
    transpose(pairs, width, units, width, to, units);
    return {to, units, 1};
  }
};

// Calls body(0 … slots-1), each once, on up to `slots` threads: torch's own pool where there is one.
static void parallel(void* pool, int slots, const std::function<void(int)>& body) {
  struct Work { const std::function<void(int)>* body; std::atomic<int> next; int slots; } work{&body, {0}, slots};
  auto run = [](void* p) {
    Work& w = *(Work*)p;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // denormal numbers are 0: they cost hundreds of cycles and carry nothing here
    const Tiles tiles;
    for (int s; (s = w.next.fetch_add(1)) < w.slots;) {
      scratch().reset();
      (*w.body)(s);
    }
    _mm_setcsr(before);
  };
  if (slots == 1) return run(&work);
  if (pool) return ((void (*)(void (*)(void*), void*, unsigned, unsigned))pool)(run, &work, slots, 0);
  std::vector<std::thread> threads;
  for (int i = 1; i < slots; i++) threads.emplace_back(run, &work);
  run(&work);
  for (auto& t : threads) t.join();
}

// Sizes rounded up to whole vectors. Rows that are a power of two apart share a few sets of the cache and evict each other, so
// the rows of the sums (ldv) and of folded features (mr, whose last 16 columns then hold nothing) are 64 bytes longer.
struct Dims {
  int d, dv, m, r, dp, dvp, ldv, mp, rp, mr, sp, W, S, R;
  explicit Dims(const Call& c)
      : d(c.d), dv(c.dv), m(c.m), r(c.m ? c.r : 0), dp(up16(d)), dvp(up16(dv)), ldv(dvp % 32 ? dvp : dvp + 16), mp(up16(m)), rp(up16(r)),
        mr(mp + rp + (c.foldq && (mp + rp) % 32 == 0 ? 16 : 0)),
        sp(up16(c.sinks)), W(c.window), S(c.sinks), R(c.R) {}
};

static inline void load_row(float* to, const void* from, long at, int n, int np, bool bf16) {
  int j = 0;
  if (bf16) {
    const uint16_t* p = (const uint16_t*)from + at;
    for (; j + VL <= n; j += VL) store(to + j, from_bf16(p + j));
    for (; j < n; j++) {
      uint32_t bits = (uint32_t)p[j] << 16;
      memcpy(to + j, &bits, 4);
    }
  } else {
    const float* p = (const float*)from + at;
    for (; j + VL <= n; j += VL) store(to + j, load(p + j));
    for (; j < n; j++) to[j] = p[j];
  }
  for (; j < np; j++) to[j] = 0;
}

static inline void store_row(void* to, long at, const float* from, int n, bool bf16) {
  int j = 0;
  if (bf16) {
    uint16_t* p = (uint16_t*)to + at;
    for (; j + VL <= n; j += VL) to_bf16(p + j, load(from + j));
    for (; j < n; j++) {
      uint32_t bits;
      memcpy(&bits, from + j, 4);
      p[j] = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
  } else {
    float* p = (float*)to + at;
    for (; j + VL <= n; j += VL) store(p + j, load(from + j));
    for (; j < n; j++) p[j] = from[j];
  }
}

// Says that something is not finite, to callers that want to know.
static inline void tell(const Call& c) {
  if (c.bad) __atomic_store_n(c.bad, 1, __ATOMIC_RELAXED);
}

// Tells where one of n numbers, a multiple of a vector's, is not finite: 0·x is 0 for those that are.
static inline void watch(const Call& c, const float* x, size_t n) {
  vf sum[4] = {all(0), all(0), all(0), all(0)};  // independent of each other: they need not wait
  size_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    for (int j = 0; j < 4; j++) sum[j] = fma(load(x + i + j * VL), all(0), sum[j]);
  for (; i < n; i += VL) sum[0] = fma(load(x + i), all(0), sum[0]);
  if (hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) != 0) tell(c);
}

// The same for n units of bfloat16 numbers.
static inline void watch_packed(const Call& c, const float* x, size_t n) {
#if defined(__AVX512BF16__)
  const __m512i infinite = _mm512_set1_epi16(0x7f80);
  __mmask32 found = 0;
  size_t i = 0;
  for (; i + VL <= n; i += VL)
    found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(x + i), infinite), infinite);
  if (i < n)  // rows of 16 numbers are half a vector
    found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_maskz_loadu_epi32((1u << (n - i)) - 1, x + i), infinite), infinite);
  if (found) tell(c);
#endif
}

// Rows of numbers as a pass reads them: float32, or bfloat16 as they came, two in a unit.
template <bool BF> static inline vf load_as(const float* row, int i) {
  return BF ? from_bf16((const uint16_t*)row + i) : load(row + i);
}

// The map of one side, x → [P·x | N·x], packed for both orders of the product. With bfloat16 the map is the sum of two
// bfloat16 matrices, so that log-features keep the precision of float32.
//
// Folded (rows `inverse`, `shift`, `linear` of a fold): the first rows of P, divided by their draws' lengths, are a turned
// N, so y = inverse·(P·x) - shift has the norm of N·x - b and no product of its own; linearᵀx joins every log-feature.
template <bool BF> struct Map {
  const float* off;           // (mr)
  const float *inverse = nullptr, *shift = nullptr, *linear = nullptr;  // (dp), null if not folded
  int own;                    // rows that are multiplied: mp if folded, else mr
  // In units, the second of each null with float32: left (mr × dp) and right (dp × mr) operand, right operand (own × dp) of the
  // product that ends in gradients of x.
  const float *row[2] = {}, *col[2] = {}, *back[2] = {};
  int dp, mp, mr;
  bool sloped = false;        // whether `linear` is anything but 0
  Band rows, columns, input;  // what N leaves to do where it is upper triangular: with P and N as rows, columns, factor
  Map(const Call& c, const Dims& s, const float* w, const float* offset, const float* fold, int g, bool by_row, bool by_column,
      bool gradients = false)
      : own(fold ? s.mp : s.mr), dp(s.dp), mp(s.mp), mr(s.mr) {
    float* a = scratch().take((size_t)mr * dp);
    float* o = scratch().take(mr);
    const long given = s.m + s.r;
    for (int i = 0; i < mr; i++) {
      int from = i < s.mp ? (i < s.m ? i : -1) : (i - s.mp < s.r ? s.m + i - s.mp : -1);
      o[i] = from >= 0 ? offset[g * given + from] : i < s.mp ? -LOG_ZERO : 0;
      if (from >= 0) load_row(a + (size_t)i * dp, w, (g * given + from) * s.d, s.d, dp, false);
      else memset(a + (size_t)i * dp, 0, dp * sizeof(float));
    }
    off = o;
    // A vector maximum passes NaN over: diverged maps would lead to finite, wrong numbers.
    watch(c, a, (size_t)mr * dp), watch(c, o, mr);
    if (fold) {
      float* f = scratch().take(3 * (size_t)dp);
      for (int k = 0; k < 3; k++) load_row(f + (size_t)k * dp, fold, (g * 3L + k) * s.d, s.d, dp, false);
      watch(c, f, 3 * (size_t)dp);
      inverse = f, shift = f + dp, linear = f + 2 * dp;
      for (int i = 0; i < dp; i++) sloped |= linear[i] != 0;
    }
    bool triangular = true;
    for (int i = 1; i < s.r; i++)
      for (int j = 0; j < std::min(i, dp); j++) triangular &= a[(size_t)(mp + i) * dp + j] == 0;
    if (triangular) rows.k_lo = -mp, columns.k_after = input.k_before = mp;
    float* part = a;
    float* rest = BF ? scratch().take((size_t)mr * dp) : nullptr;
    float* tmp = BF ? scratch().take((size_t)mr * (dp + 16)) : nullptr;
    for (int h = 0; h < (BF ? 2 : 1); h++) {
      if (h) {
        for (int i = 0; i < mr * dp; i += VL) store(rest + i, load(a + i) - round_bf16(load(a + i)));
        part = rest;
      }
      if (gradients) back[h] = rhs<BF>(part, dp, own, dp, scratch_if(BF, (size_t)mr * dp)).p;
      if (by_row) row[h] = lhs<BF>(part, dp, mr, dp, scratch_if(BF, (size_t)mr * dp)).p;
      if (by_column) col[h] = rhs_t<BF>(part, dp, mr, dp, scratch().take((size_t)(dp + 16) * mr), tmp).p;
    }
  }
  // dX (np×dp) += D · [P; N], D (np×own) the gradient of what the map gives, packed as left factor. With bfloat16 D is rounded, as
  // softmax attention's own gradient of its logits is, and the map is not.
  void backwards(Lhs d, int np, float* dX) const {
    gemm<BF>(np, dp, own, d, back[0], dp, dX, dp, true, input, {d.p, back[1]});
  }
  static float* scratch_if(bool wanted, size_t n) { return wanted ? scratch().take(n) : nullptr; }

  // F (np×mr), token-major: P·x and, for gradients, y = N·x - off; half[t] = ½‖y‖² - linearᵀx.
  template <bool GRADIENTS> void tokens(Lhs x, int np, float* F, float* half) const {
    gemm<BF>(np, own, dp, x, col[0], mr, F, mr, false, columns, {x.p, col[1]});
    const float *scales = inverse, *shifts = scales ? shift : off + mp, *slopes = sloped ? linear : nullptr;
    const int rest = mr - mp, width = scales ? dp : rest, from = scales ? 0 : mp, next = mr, to = mp;
    alignas(64) float sums[VL * VL];
    for (int t = 0; t < np; t += VL) {
      for (int u = 0; u < VL; u++) {
        float* f = F + (size_t)(t + u) * next;
        vf sum = all(0);
        for (int i = 0; i < width; i += VL) {
          const vf y = scales ? load(scales + i) * load(f + i) - load(shifts + i) : load(f + from + i) - load(shifts + i);
          if (GRADIENTS) store(f + to + i, y);
          sum = fma(y, y, sum);
        }
        sum = sum * all(0.5f);
        for (int i = 0; slopes && i < dp; i += VL) sum = sum - load(slopes + i) * load_as<BF>(x.p + (t + u) * x.rs, i);
        store(sums + u * VL, sum);
      }
      store(half + t, across(sums, Add()));
    }
  }
  // The same feature-major: F (mr×np), half (np). `given` holds the same numbers as x, token-major.
  template <bool GRADIENTS> void features(Rhs x, Lhs given, int np, float* F, float* half) const {
    gemm<BF>(own, np, dp, left<BF>(row[0], dp), x.p, x.ld, F, np, false, rows, {row[1], x.p});
    constexpr int MOST = CHUNK / VL;
    const int n = np / VL, width = linear ? dp : mr - mp;
    const float *f = linear ? F : F + (size_t)mp * np, *scales = inverse, *shifts = linear ? shift : off + mp;
    float* y_to = F + (size_t)mp * np;
    vf sum[MOST];
    for (int j = 0; j < n; j++) sum[j] = all(0);
    for (int i = 0; i < width; i++, f += np, y_to += np) {
      const vf scale = scales ? all(scales[i]) : all(1), less = all(shifts[i]);
      for (int j = 0; j < n; j++) {
        const vf y = load(f + j * VL) * scale - less;
        if (GRADIENTS) store(y_to + j * VL, y);
        sum[j] = fma(y, y, sum[j]);
      }
    }
    for (int j = 0; j < n; j++) store(half + j * VL, sum[j] * all(0.5f));
    for (int t = 0; sloped && t < np; t++) {
      vf along = all(0);
      for (int i = 0; i < dp; i += VL) along = fma(load(linear + i), load_as<BF>(given.p + t * given.rs, i), along);
      half[t] -= hsum(along);
    }
  }
};

// A (batch row, kv head) pair with the tokens [begin, end) of it that one task computes.
struct Task {
  int b, g, begin, end, segment, segments;
  long pair(const Call& c) const { return (long)b * c.G + g; }
};

// Whole pairs where they divide evenly among the threads; the rest is cut into segments.
static std::vector<Task> plan(const Call& c, int& slots) {
  const int pairs = c.B * c.G, T = std::max<int64_t>(1, c.threads);
  int rest = pairs % T, segments = 1;
  if (rest) {
    int a = rest, b = T;
    while (b) std::swap(a %= b, b);
    segments = T / a;
  }
  std::vector<Task> tasks;
  for (int i = 0; i < pairs; i++) {
    const int b = i / c.G, g = i % c.G, n = c.lengths[b];
    const int S = i < pairs - rest ? 1 : std::max(1, std::min(segments, n / (4 * CHUNK)));
    const int chunks = (n + CHUNK - 1) / CHUNK;
    for (int s = 0; s < S; s++)
      tasks.push_back({b, g, chunks * s / S * CHUNK, s + 1 < S ? chunks * (s + 1) / S * CHUNK : n, s, S});
  }
  slots = std::min<int>(T, tasks.size());
  return tasks;
}

// What the tokens of one chunk see: geometry of the window's band and validity of keys.
struct Span {
  int t0, n, np, start, lowest, far_from, cols, ncp, base;
  bool near;
  // start: index of the far key of the first token. lowest: the first key index that is neither sink nor forgotten.
  // Columns of the window: key indices base … base+cols-1, base = start rounded up where no earlier keys exist.
  Span(const Dims& s, int t0, int n, int64_t count) : t0(t0), n(n), np(up16(n)), start(t0 - s.W) {
    int have = (int)std::min<int64_t>(count, s.W);
    lowest = std::max<int>(-have, (int)std::max<int64_t>(s.S - count, -FAR_AWAY));
    far_from = std::max(0, lowest - start);
    int skip = s.W ? std::max(0, lowest - start) & ~15 : 0;
    skip = std::min(skip, (s.W + n) & ~15);
    base = start + skip;
    cols = s.W + n - skip;
    near = s.W > 0 && cols > 0;
    ncp = near ? up16(cols) : 0;
  }
  bool has_far() const { return far_from < n; }
};
