// Rows of queries, keys and values: reading, writing, and which of them a chunk of tokens sees.
#pragma once
#include "call.h"

static inline void load_row(float* to, const void* from, long at, int n, int np, bool bf16) {
  int j = 0;
  if (bf16) {
    const uint16_t* p = (const uint16_t*)from + at;
    for (; j + VL <= n; j += VL) store(to + j, load_bf16(p + j));
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
    for (; j + VL <= n; j += VL) store_bf16(p + j, load(from + j));
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

// How a total of millions of summands keeps its digits: see `join` in ops/state.py. A join rounds total + summand after this
// many units of the total's last place have been added; `position` differs from join to join.
struct Dither {
  float units;  // of 2^⌊log2 |total|⌋
  explicit Dither(int64_t position) : units(((uint32_t)position * 0x9E3779B9u * 0x1p-32f - 0.5f) * 0x1p-23f) {}
  Vec join(Vec total, Vec decay, Vec summand) const { return fma(decay, total, fma(power_of_two(total), set1(units), summand)); }
  float join(float total, float decay, float summand) const {
    uint32_t bits;
    memcpy(&bits, &total, 4);
    bits &= 0x7f800000;
    float power;
    memcpy(&power, &bits, 4);
    return decay * total + (power * units + summand);
  }
};

// Elements i … i+VL-1 of a row that `RowReader` returned.
template <bool BF16> static inline Vec load_row_vec(const float* row, int i) {
  return BF16 ? load_bf16((const uint16_t*)row + i) : load(row + i);
}

// Reads rows of one (batch row, kv head) pair in the form that the passes compute with: float32, or bfloat16 as it is, two
// numbers in a unit. Keys and values are indexed relative to the first token of this call; the window's earlier ones are negative.
template <bool BF16> struct RowReader {
  static constexpr int PER_UNIT = BF16 ? 2 : 1;
  const Call& c;
  const Dims& s;
  const int b, g, length;
  const int64_t count;
  const long pair;
  RowReader(const Call& c, const Dims& s, int b, int g)
      : c(c), s(s), b(b), g(g), length(c.lengths[b]), count(c.counts[b]), pair((long)b * c.G + g) {}
  static void zero_row(float* to, int np) { memset(to, 0, np / PER_UNIT * sizeof(float)); }
  void copy_row(float* to, const void* x, long at, int n, int np) const {
    if (!BF16) return load_row(to, x, at, n, np, c.bf16);
    memcpy(to, (const uint16_t*)x + at, n * 2);
    if (np > n) memset((uint16_t*)to + n, 0, (np - n) * 2);
  }
  // Rows first … first+n-1, those below `min_key` or behind the last token as zeros, followed by zeros up to np rows. Returns a
  // pointer into the tensor if the rows lie there just so, else `to`, filled.
  const float* keys(float* to, int first, int min_key, int n, int np) const {
    return rows(to, c.k, c.k_strides, c.recent_k, first, min_key, n, np, s.d, s.d_pad);
  }
  const float* values(float* to, int first, int min_key, int n, int np) const {
    return rows(to, c.v, c.v_strides, c.recent_v, first, min_key, n, np, s.d_v, s.dv_pad);
  }
  const float* queries(float* to, int r, int t0, int n, int np) const {
    const int64_t strides[3] = {c.q_strides[0], c.q_strides[1], c.q_strides[3]};
    return rows(to, (const char*)c.q + r * c.q_strides[2] * (c.bf16 ? 2 : 4), strides, nullptr, t0, 0, n, np, s.d, s.d_pad);
  }
  const float* rows(float* to, const void* x, const int64_t* strides, const void* recent, int first, int min_key, int n, int np,
                    int width, int width_pad) const {
    const long start = b * strides[0] + g * strides[1], step = strides[2];
    // Only whole vectors of units: nothing may be read behind the last row.
    const bool packed = BF16 == bool(c.bf16) && step == width && width % (16 * PER_UNIT) == 0;
    if (packed && n == np && first >= std::max(0, min_key) && first + n <= length)
      return (const float*)((const char*)x + (start + first * step) * (BF16 ? 2 : 4));
    float* row = to;
    for (int i = 0, at = first; i < np; i++, at++, row += width_pad / PER_UNIT) {
      if (i >= n || at < min_key || at >= length) zero_row(row, width_pad);
      else if (at >= 0) copy_row(row, x, start + at * step, width, width_pad);
      else copy_row(row, recent, ((pair + 1) * s.W + at) * width, width, width_pad);
    }
    return to;
  }
  // All sinks that have been seen by the end of this call, zeros for the others.
  void sinks(float* K, float* V) const {
    for (int i = 0; i < s.sinks_pad; i++) {
      const bool seen = i < s.S && i < count + length;
      sink(K + (size_t)i * s.d_pad / PER_UNIT, c.k, c.k_strides, c.sink_k, i, seen, s.d, s.d_pad);
      sink(V + (size_t)i * s.dv_pad / PER_UNIT, c.v, c.v_strides, c.sink_v, i, seen, s.d_v, s.dv_pad);
    }
  }
  void sink(float* to, const void* x, const int64_t* strides, const void* stored, int i, bool seen, int n, int np) const {
    if (!seen) zero_row(to, np);
    else if (i < count) copy_row(to, stored, (pair * s.S + i) * n, n, np);
    else copy_row(to, x, b * strides[0] + g * strides[1] + (i - count) * strides[2], n, np);
  }
  // Prefetches the rows of the chunk that begins at token t0 into the second cache.
  void prefetch(int t0, bool gradients = false) const {
    const int n = std::min(CHUNK, length - t0), size = c.bf16 ? 2 : 4;
    if (t0 < 0) return;
    auto rows = [&](const void* x, long at, long stride, int width) {
      for (int i = 0; i < n; i++)
        for (int j = 0; j < width * size; j += 64) _mm_prefetch((const char*)x + (at + i * stride) * size + j, _MM_HINT_T1);
    };
    rows(c.k, b * c.k_strides[0] + g * c.k_strides[1] + t0 * c.k_strides[2], c.k_strides[2], s.d);
    rows(c.v, b * c.v_strides[0] + g * c.v_strides[1] + t0 * c.v_strides[2], c.v_strides[2], s.d_v);
    for (int r = 0; r < s.R; r++) {
      rows(c.q, b * c.q_strides[0] + g * c.q_strides[1] + r * c.q_strides[2] + t0 * c.q_strides[3], c.q_strides[3], s.d);
      if (gradients) rows(c.d_out, (head(r) + t0) * s.d_v, s.d_v, s.d_v);
    }
  }
  long head(int r) const { return (pair * c.R + r) * c.L; }  // first token of query head r in (B, G, R, L)
};

// The tokens t0 … t0+n-1 and what they see. Token t0+i leaves the key first_key+i behind: it is the newest "far" key, which is
// seen through its features only. Within the window, keys are columns: index window_base + column.
struct ChunkSpan {
  int t0, n, np;  // np: n rounded up to 16
  int first_key;
  int min_key;       // the first key that is stored and is no sink
  int far_begin;     // tokens from t0+far_begin on leave a key behind that is neither
  int window_cols, window_pad, window_base;  // window_base: first_key, or later where no earlier keys exist, in steps of 16
  bool has_window;
  ChunkSpan(const Dims& s, int t0, int n, int64_t count) : t0(t0), n(n), np(pad16(n)), first_key(t0 - s.W) {
    int stored = (int)std::min<int64_t>(count, s.W);
    min_key = std::max<int>(-stored, (int)std::max<int64_t>(s.S - count, -UNLIMITED));
    far_begin = std::max(0, min_key - first_key);
    int skip = s.W ? std::max(0, min_key - first_key) & ~15 : 0;
    skip = std::min(skip, (s.W + n) & ~15);
    window_base = first_key + skip;
    window_cols = s.W + n - skip;
    has_window = s.W > 0 && window_cols > 0;
    window_pad = has_window ? pad16(window_cols) : 0;
  }
  bool has_far() const { return far_begin < n; }
};
