// What the passes of one backward call share, and what both do with rows.
#pragma once
#include "walker.h"

struct Shared {  // between the passes of one call
  const Call& c;
  const Dims s;
  int chunks;
  std::vector<float> scales, delta;  // (pairs, chunks, mp) maxima before each chunk; (B, G, R, L)
  std::vector<std::vector<float>> sinks;  // per task: (sp×dp) and (sp×dvp)
  // (dp×mr), (mr×dp), (mr), (mr), and of the folds' linear parts (dp)
  struct Weights { std::vector<float> q, k, offq, offk, linq, link; };
  std::vector<std::vector<Weights>> weights;  // per slot and kv head
  Shared(const Call& c, size_t tasks, int slots)
      : c(c), s(c), chunks((c.L + CHUNK - 1) / CHUNK), scales((size_t)c.B * c.G * chunks * s.mp),
        delta((size_t)c.B * c.G * c.R * c.L), sinks(tasks, std::vector<float>((size_t)s.sp * (s.dp + s.dvp))),
        weights(slots, std::vector<Weights>(c.G)) {}
  float* scale(long pair, int t0) { return scales.data() + (pair * chunks + t0 / CHUNK) * s.mp; }
  Weights& of(int slot, int g) {
    Weights& w = weights[slot][g];
    if (!w.offq.empty()) return w;
    w.q.resize((size_t)s.dp * s.mr), w.k.resize((size_t)s.mr * s.dp);
    w.offq.resize(s.mr), w.offk.resize(s.mr), w.linq.resize(s.dp), w.link.resize(s.dp);
    return w;
  }
};

// x - δ up to the diagonal, 0 above it.
static void zero_above_diagonal(float* x, int np, const float* delta) {
  for (int t = 0; t < np; t++, x += np) {
    const vf less = all(delta ? delta[t] : 0);
    const int last = t / VL * VL;
    for (int j = 0; j < last; j += VL) store(x + j, load(x + j) - less);
    store(x + last, first_of(load(x + last) - less, t - last + 1));
    for (int j = last + VL; j < np; j += VL) store(x + j, all(0));
  }
}

// Rows of the output's gradient (as `Rows` reads them), of the log-normaliser and δ; rows that are no query have weight 0.
template <bool BF>
static const float* cotangents(const Rows<BF>& rows, Shared& sh, int r, int t0, int n, int np, float* to, float* lse, float* delta) {
  const Dims& s = sh.s;
  const long head = rows.head(r);
  for (int i = 0; i < np; i++) {
    const bool real = i < n && t0 + i >= 0 && t0 + i < rows.length;
    lse[i] = real ? sh.c.lse[head + t0 + i] : -LOG_ZERO;
    delta[i] = real ? sh.delta[head + t0 + i] : 0;
  }
  const int64_t strides[3] = {0, 0, s.dv};
  const char* first = (const char*)sh.c.grad_out + head * s.dv * (sh.c.bf16 ? 2 : 4);
  return rows.some(to, first, strides, nullptr, t0, 0, n, np, s.dv, s.dvp);
}
