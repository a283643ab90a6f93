// One token a row after a state, which is changed in place. All arithmetic in float32: a token is too little for products
// of matrices, so that reading maps and sums once is what it costs.
#pragma once
#include "common.h"

// Mirrors `_StepCall` in step.py.
struct StepCall {
  int64_t B, G, R, d, dv, m, r, window, sinks, bf16, threads;
  int64_t head;                       // the slot of the ring that holds the oldest key, and takes the new one
  int64_t qs[2], ks[2], vs[2];        // strides in elements of (b, h) and (b, g)
  double scaling, softcap;            // softcap 0: none
  void* parallel;
  const void *q, *k, *v;
  const float *wq, *offq, *wk, *offk;  // (G, m+r, d), (G, m+r)
  float *values, *total, *scale;       // (B, G, m, dv), (B, G, m)
  void *recent_k, *recent_v;           // (B, G, window, d or dv): rings
  void *sink_k, *sink_v;
  int64_t* count;                      // (B)
  void* out;                           // (B, G·R, 1, dv)
};

// Element `at` of a row, vectors and single numbers.
template <bool BF> static inline vf vector_at(const void* p, long at) {
  return BF ? from_bf16((const uint16_t*)p + at) : load((const float*)p + at);
}
template <bool BF> static inline float number_at(const void* p, long at) {
  if (!BF) return ((const float*)p)[at];
  const uint32_t bits = (uint32_t)((const uint16_t*)p)[at] << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
template <bool BF> static inline float dot(const float* x, const void* row, long at, int n) {
  vf even = all(0), odd = all(0);
  int j = 0;
  for (; j + 2 * VL <= n; j += 2 * VL) {
    even = fma(load(x + j), vector_at<BF>(row, at + j), even);
    odd = fma(load(x + j + VL), vector_at<BF>(row, at + j + VL), odd);
  }
  for (; j + VL <= n; j += VL) even = fma(load(x + j), vector_at<BF>(row, at + j), even);
  float sum = hsum(even + odd);
  for (; j < n; j++) sum += x[j] * number_at<BF>(row, at + j);
  return sum;
}
// y += Σ_i w_i · row i, the rows `n` numbers long and `count` of them from element `at` on.
template <bool BF> static void add_rows(const float* w, int count, const void* rows, long at, int n, float* y) {
  int j = 0;
  for (; j + 4 * VL <= n; j += 4 * VL) {
    vf s[4];
    for (int v = 0; v < 4; v++) s[v] = load(y + j + v * VL);
    for (int i = 0; i < count; i++)
      for (int v = 0; v < 4; v++) s[v] = fma(all(w[i]), vector_at<BF>(rows, at + (long)i * n + j + v * VL), s[v]);
    for (int v = 0; v < 4; v++) store(y + j + v * VL, s[v]);
  }
  for (; j + VL <= n; j += VL) {
    vf s = load(y + j);
    for (int i = 0; i < count; i++) s = fma(all(w[i]), vector_at<BF>(rows, at + (long)i * n + j), s);
    store(y + j, s);
  }
  for (; j < n; j++)
    for (int i = 0; i < count; i++) y[j] += w[i] * number_at<BF>(rows, at + (long)i * n + j);
}

template <bool BF> struct StepPair {
  const StepCall& c;
  const int b, g, d, dv, m, mp, W, S;
  const long pair;
  const int64_t position;
  float *x, *lf, *lw, *ls, *carry, *higher, *value, *o;

  StepPair(const StepCall& c, int b, int g)
      : c(c), b(b), g(g), d(c.d), dv(c.dv), m(c.m), mp(up16(c.m)), W(c.window), S(c.sinks), pair((long)b * c.G + g),
        position(c.count[b]) {
    auto take = [](size_t n) { return scratch().take(n); };
    x = take(up16(d)), lf = take(mp), carry = take(mp), higher = take(mp), lw = take(up16(W)), ls = take(up16(S));
    value = take(up16(dv)), o = take(up16(dv));
  }

  // lf: log-features of x, P·x - a - ½‖N·x - b‖²; padding features are LOG_ZERO.
  void features(const float* w, const float* off) {
    const long own = m + c.r;
    w += g * own * d, off += g * own;
    float half = 0;
    for (int i = m; i < own; i++) {
      const float y = dot<false>(x, w, (long)i * d, d) - off[i];
      half += 0.5f * y * y;
    }
    for (int i = 0; i < m; i++) lf[i] = dot<false>(x, w, (long)i * d, d) - off[i] - half;
    std::fill(lf + m, lf + mp, LOG_ZERO);
  }

  // The key that leaves the window enters the sums.
  void absorb() {
    if (!m || position - W < S) return;
    const void *k = W ? c.recent_k : c.k, *v = W ? c.recent_v : c.v;
    const long ring = pair * W + c.head;
    load_row(x, k, W ? ring * d : b * c.ks[0] + g * c.ks[1], d, up16(d), BF);
    load_row(value, v, W ? ring * dv : b * c.vs[0] + g * c.vs[1], dv, up16(dv), BF);
    features(c.wk, c.offk);
    float *scale = c.scale + pair * m, *total = c.total + pair * m;
    load_row(carry, scale, 0, m, mp, false);
    for (int i = 0; i < mp; i += VL) {
      const vf old = load(carry + i), l = load(lf + i), top = vmax(old, l);
      store(higher + i, top), store(carry + i, vexp<false>(old - top)), store(lf + i, vexp<false>(l - top));
    }
    memcpy(scale, higher, m * sizeof(float));
    for (int i = 0; i < m; i++) {
      total[i] = carry[i] * total[i] + lf[i];
      float* row = c.values + (pair * m + i) * dv;
      int j = 0;
      for (; j + VL <= dv; j += VL) store(row + j, fma(all(lf[i]), load(value + j), all(carry[i]) * load(row + j)));
      for (; j < dv; j++) row[j] = lf[i] * value[j] + carry[i] * row[j];
    }
  }

  void remember() {
    const size_t size = BF ? 2 : 4;
    auto put = [&](void* to, long row, const void* from, long at, int n) {
      memcpy((char*)to + row * n * size, (const char*)from + at * size, n * size);
    };
    const long k = b * c.ks[0] + g * c.ks[1], v = b * c.vs[0] + g * c.vs[1];
    if (W) put(c.recent_k, pair * W + c.head, c.k, k, d), put(c.recent_v, pair * W + c.head, c.v, v, dv);
    if (position < S) put(c.sink_k, pair * S + position, c.k, k, d), put(c.sink_v, pair * S + position, c.v, v, dv);
  }

  float logit(const void* rows, long at) const {
    const float l = (float)c.scaling * dot<BF>(x, rows, at, d);
    return c.softcap ? (float)c.softcap * std::tanh(l / (float)c.softcap) : l;
  }

  // Whether the output is finite.
  bool query(int r) {
    const int h = g * c.R + r;
    load_row(x, c.q, b * c.qs[0] + h * c.qs[1], d, up16(d), BF);
    float top = LOG_ZERO;
    if (m) {
      features(c.wq, c.offq);
      for (int i = 0; i < m; i++) top = std::max(top, lf[i] += c.scale[pair * m + i]);
    }
    for (int i = 0; i < W; i++) {
      const int64_t age = (c.head - i + W) % W;
      lw[i] = position - age >= S ? logit(c.recent_k, (pair * W + i) * d) : LOG_ZERO;
      top = std::max(top, lw[i]);
    }
    const int sinks = (int)std::min<int64_t>(S, position + 1);
    for (int i = 0; i < sinks; i++) top = std::max(top, ls[i] = logit(c.sink_k, (pair * S + i) * d));
    const float norm = weigh(lf, m, top, m ? c.total + pair * m : nullptr) + weigh(lw, W, top, nullptr) +
                       weigh(ls, sinks, top, nullptr);
    std::fill(o, o + up16(dv), 0.0f);
    add_rows<false>(lf, m, c.values, pair * m * dv, dv, o);
    add_rows<BF>(lw, W, c.recent_v, pair * W * dv, dv, o);
    add_rows<BF>(ls, sinks, c.sink_v, pair * S * dv, dv, o);
    const vf inverse = all(norm > 0 ? 1 / norm : 1);
    vf zero = all(0);
    for (int j = 0; j < up16(dv); j += VL) {
      const vf y = load(o + j) * inverse;
      store(o + j, y);
      zero = fma(y, all(0), zero);
    }
    store_row(c.out, ((long)b * c.G * c.R + h) * dv, o, dv, BF);
    return hsum(zero) == 0;
  }
  // Logits become weights below the maximum; returns their sum, each times `factor` where there is one.
  static float weigh(float* l, int n, float top, const float* factor) {
    for (int i = n; i < up16(n); i++) l[i] = LOG_ZERO;
    for (int i = 0; i < n; i += VL) store(l + i, vexp<false>(load(l + i) - all(top)));
    float sum = 0;
    for (int i = 0; i < n; i++) sum += factor ? l[i] * factor[i] : l[i];
    return sum;
  }
};

template <bool BF> static bool finite(const void* x, const int64_t* stride, int B, int heads, int n) {
  float sum = 0;
  for (int b = 0; b < B; b++)
    for (int h = 0; h < heads; h++)
      for (int j = 0; j < n; j++) sum += 0 * number_at<BF>(x, b * stride[0] + h * stride[1] + j);
  return sum == 0;
}

// 1 where an input holds NaN or infinity, and then nothing has changed; 2 where the output does; 0 else.
template <bool BF> static int step(StepCall& c) {
  const bool good = finite<BF>(c.q, c.qs, c.B, c.G * c.R, c.d) && finite<BF>(c.k, c.ks, c.B, c.G, c.d) &&
                    finite<BF>(c.v, c.vs, c.B, c.G, c.dv);
  if (!good) return 1;
  const int pairs = c.B * c.G, slots = std::min<int>(std::max<int64_t>(1, c.threads), pairs);
  std::atomic<bool> sound{true};
  parallel(c.parallel, slots, [&](int slot) {
    for (int i = slot; i < pairs; i += slots) {
      scratch().reset();
      StepPair<BF> p(c, i / c.G, i % c.G);
      p.absorb();
      p.remember();
      for (int r = 0; r < c.R; r++) if (!p.query(r)) sound = false;
    }
  });
  for (int b = 0; b < c.B; b++) c.count[b]++;
  if (c.window) c.head = (c.head + 1) % c.window;
  return sound ? 0 : 2;
}
