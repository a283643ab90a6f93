// Gradients of keys, values and the key's map, in the reverse order of the tokens: see backward.h.
#pragma once
#include "shared.h"

template <bool BF> struct KeyPass {
  using P = Pack<BF>;
  Shared& sh;
  const Call& c;
  const Dims& s;
  const Rows<BF> rows;
  Sums sums;  // of later queries: values (mp×dvp), total (mp), in units of e^-scale
  Map<BF> qmap, kmap;
  Shared::Weights& dw;

  KeyPass(Shared& sh, int b, int g, int slot)
      : sh(sh), c(sh.c), s(sh.s), rows(c, s, b, g), sums(scratch().take(Sums::size(s)), s),
        qmap(c, s, c.wq, c.offq, c.foldq, g, true, false), kmap(c, s, c.wk, c.offk, c.foldk, g, true, false), dw(sh.of(slot, g)) {}

  void to_unit(const float* scale) {
    for (int i = 0; i < s.m; i++) {
      if (scale[i] == sums.scale[i]) continue;
      const float factor = std::exp(scale[i] - sums.scale[i]);
      float* row = sums.values + (size_t)i * s.ldv;
      for (int j = 0; j < s.dvp; j += VL) store(row + j, all(factor) * load(row + j));
      sums.total[i] *= factor, sums.scale[i] = scale[i];
    }
  }
  // E (mp×np): e^{ℓq + scale - lse}; false where that would overflow.
  bool queries(int r, int t0, int n, int np, const float* scale, float* E) {
    const auto mark = scratch().mark();
    float *F = P::take(s.mr * np), *half = P::take(np);
    const float* Q = rows.queries(P::take(np * s.dp), r, t0, n, np);
    qmap.template features<false>(P::turned(Q, np, s.dp), left<BF>(Q, s.dp), np, F, half);
    for (int t = 0; t < np; t++) half[t] += t < n ? c.lse[rows.head(r) + t0 + t] : -LOG_ZERO;
    vf high = all(LOG_ZERO);
    for (int i = 0; i < s.mp; i++) {
      const vf shift = all(scale[i] - qmap.off[i]);
      for (int t = 0; t < np; t += VL) {
        const vf l = load(F + (size_t)i * np + t) + shift - load(half + t);
        high = vmax(high, l);
        store(E + (size_t)i * np + t, vexp<BF>(l));
      }
    }
    scratch().release(mark);
    return n == 1 || hmax(high) <= UNDERFLOW_LOG;
  }
  void add_queries(Lhs e, const float* E, int np, Rhs grad, const float* delta) {
    gemm<BF>(s.mp, s.dvp, np, e, grad.p, grad.ld, sums.values, s.ldv, true);
    for (int i = 0; i < s.mp; i++) {
      vf sum = all(0);
      for (int t = 0; t < np; t += VL) sum = fma(load(E + (size_t)i * np + t), load(delta + t), sum);
      sums.total[i] += hsum(sum);
    }
  }
  // Only the sums, over the queries [begin, end), for the keys before `begin`.
  void sums_of(int begin, int end) {
    const int last = (end - 1) / CHUNK * CHUNK;
    memcpy(sums.scale, sh.scale(rows.pair, last), s.mp * sizeof(float));
    for (int t0 = last; t0 >= begin; t0 -= CHUNK) {
      const int n = std::min(CHUNK, end - t0), np = up16(n);
      const auto mark = scratch().mark();
      float *E = P::take(s.mp * np), *to = P::take(np * s.dvp), *lse = P::take(np), *delta = P::take(np);
      to_unit(sh.scale(rows.pair, t0));
      for (int r = 0; r < s.R; r++) {
        queries(r, t0, n, np, sums.scale, E);
        const float* DO = cotangents(rows, sh, r, t0, n, np, to, lse, delta);
        add_queries(P::l(E, np, s.mp, np), E, np, P::rows(DO, np, s.dvp), delta);
      }
      scratch().release(mark);
    }
  }

  // Features of the far keys: F (mr×np) holds log-features and y; `scale` is raised to their maximum.
  void keys(const Span& a, const float* K, float* F, float* scale) {
    float* half = P::take(a.np);
    kmap.template features<true>(P::turned(K, a.np, s.dp), left<BF>(K, s.dp), a.np, F, half);
    for (int j = 0; j < a.np; j++) if (j < a.far_from || j >= a.n) half[j] = MASKED;
    for (int i = 0; i < s.mp; i++) {
      vf top = all(-MASKED);
      for (int j = 0; j < a.np; j += VL) {
        const vf l = load(F + (size_t)i * a.np + j) - all(kmap.off[i]) - load(half + j);
        store(F + (size_t)i * a.np + j, l);
        top = vmax(top, l);
      }
      scale[i] = std::max(scale[i], hmax(top));
    }
  }

  void run(int t0, int n, const float* before) {
    const auto mark = scratch().mark();
    const bool done = chunk(t0, n, before);
    scratch().release(mark);
    if (done) return;
    const int h = (n + 1) / 2;
    float* middle = P::take(s.mp);
    memcpy(middle, before, s.mp * sizeof(float));
    const Span a(s, t0, h, rows.count);
    float *to = P::take(a.np * s.dp), *F = P::take(s.mr * a.np);
    keys(a, rows.keys(to, a.start, a.lowest, a.n, a.np), F, middle);
    run(t0 + h, n - h, middle);
    run(t0, h, before);
    scratch().release(mark);
  }

  bool chunk(int t0, int n, const float* before) {
    const Span a(s, t0, n, rows.count);
    const int np = a.np;
    float *K_ = P::take(np * s.dp), *V_ = P::take(np * s.dvp), *dX = P::take(np * s.dp), *dV = P::take(np * s.dvp);
    rows.ahead(t0 - CHUNK, true);
    std::fill(dX, dX + np * s.dp, 0.0f), std::fill(dV, dV + np * s.dvp, 0.0f);
    const float *K = rows.keys(K_, a.start, a.lowest, a.n, np), *V = rows.values(V_, a.start, a.lowest, a.n, np);
    bool far = s.m && before && a.has_far();
    for (int i = 0; s.m && before && i < s.m && !far; i++) far = before[i] > LOG_ZERO / 2;
    if (far && !far_part(a, before, K, V, dX, dV)) return false;
    if (s.W) near_part(a, K, V, dX, dV);
    for (int i = 0; i < n; i++) {
      const int at = a.start + i;
      if (at < a.lowest || at >= rows.length) continue;
      store_row(at < 0 ? c.d_recent_k : c.dk, at < 0 ? (rows.pair * s.W + s.W + at) * s.d : (rows.pair * c.L + at) * s.d,
                dX + (size_t)i * s.dp, s.d, c.bf16);
      store_row(at < 0 ? c.d_recent_v : c.dvalue, at < 0 ? (rows.pair * s.W + s.W + at) * s.dv : (rows.pair * c.L + at) * s.dv,
                dV + (size_t)i * s.dvp, s.dv, c.bf16);
    }
    return true;
  }

  bool far_part(const Span& a, const float* before, const float* K, const float* V, float* dX, float* dV) {
    const int np = a.np;
    float *F = P::take(s.mr * np), *E = P::take((size_t)s.R * s.mp * np), *scale = P::take(s.mp), *later = P::take(s.mp), *dL = P::take(s.mp * np);
    memcpy(scale, before, s.mp * sizeof(float));
    keys(a, K, F, scale);
    for (int r = 0; r < s.R; r++) if (!queries(r, a.t0, a.n, np, scale, E + (size_t)r * s.mp * np)) return false;
    for (int i = 0; i < s.mp; i++)
      for (int j = 0; j < np; j += VL) store(F + (size_t)i * np + j, vexp<BF>(load(F + (size_t)i * np + j) - all(scale[i])));
    to_unit(scale);
    const Rhs vt = P::turned(V, np, s.dvp), fk = P::r(F, np, s.mp, np), u = P::r(sums.values, s.ldv, s.mp, s.dvp);
    gemm<BF>(s.mp, np, s.dvp, P::l(sums.values, s.ldv, s.mp, s.dvp), vt.p, vt.ld, dL, np, false);
    memcpy(later, sums.total, s.mp * sizeof(float));
    gemm<BF>(np, s.dvp, s.mp, P::lt(F, np, np, s.mp), u.p, u.ld, dV, s.dvp, true);
    float *to = P::take(np * s.dvp), *lse = P::take(np), *delta = P::take(np), *A = P::take(np * np), *B = P::take(np * np);
    for (int r = 0; r < s.R; r++) {
      const auto mark = scratch().mark();
      const float* e = E + (size_t)r * s.mp * np;
      const float* DO = cotangents(rows, sh, r, a.t0, a.n, np, to, lse, delta);
      const Rhs grad = P::rows(DO, np, s.dvp);
      const Lhs el = P::l(e, np, s.mp, np);
      gemm<BF>(np, np, s.mp, P::lt(e, np, np, s.mp), fk.p, fk.ld, A, np, false, {.out_hi = 0});
      gemm<BF>(np, np, s.dvp, left<BF>(DO, s.dvp), vt.p, vt.ld, B, np, false, {.out_hi = 0});
      zero_above_diagonal(A, np, nullptr);
      zero_above_diagonal(B, np, delta);
      gemm<BF>(np, s.dvp, np, P::lt(A, np, np, np), grad.p, grad.ld, dV, s.dvp, true, {.k_lo = 0});
      const Rhs b = P::r(B, np, np, np);
      gemm<BF>(s.mp, np, np, el, b.p, b.ld, dL, np, true, {.k_after = 0});
      add_queries(el, e, np, grad, delta);
      scratch().release(mark);
    }
    float* total = P::take(np);
    for (int j = 0; j < np; j += VL) {
      vf sum = all(0);
      for (int i = 0; i < s.mp; i++) {
        const size_t at = (size_t)i * np + j;
        const vf g = load(F + at) * (load(dL + at) - all(later[i]));
        store(F + at, g);
        sum += g;
      }
      store(total + j, sum);
      for (int i = s.mp; i < s.mr; i++) store(F + (size_t)i * np + j, load(F + (size_t)i * np + j) * (all(0) - sum));
    }
    for (int i = 0; i < s.mr; i++) {
      vf sum = all(0);
      for (int j = 0; j < np; j += VL) sum += load(F + (size_t)i * np + j);
      dw.offk[i] -= hsum(sum);
    }
    if (kmap.linear) {
      for (int i = 0; i < s.d; i++)
        for (int j = 0; j < np; j += VL) {
          float* f = F + (size_t)i * np + j;
          store(f, fma(all(kmap.inverse[i]), load(f + (size_t)s.mp * np), load(f)));
        }
      for (int j = 0; j < np; j++)
        for (int i = 0; i < s.dp; i += VL) {
          float *dx = dX + (size_t)j * s.dp + i, *lin = dw.link.data() + i;
          store(dx, fma(all(total[j]), load(kmap.linear + i), load(dx)));
          store(lin, fma(all(total[j]), load_as<BF>(K + (size_t)j * s.dp / rows.EACH, i), load(lin)));
        }
    }
    gemm<false>(np, s.dp, kmap.own, {F, 1, np}, kmap.raw, s.dp, dX, s.dp, true, kmap.input);
    const Rhs k = P::rows(K, np, s.dp);
    gemm<BF>(kmap.own, s.dp, np, P::l(F, np, kmap.own, np), k.p, k.ld, dw.k.data(), s.dp, true);
    return true;
  }

  // Keys of the span against the queries that have them in their window: column c is query start + c.
  void near_part(const Span& a, const float* K, const float* V, float* dX, float* dV) {
    const int from = std::max(0, -a.start) & ~15, to = std::min(s.W + a.n - 1, rows.length - a.start);
    if (to <= from) return;
    const int cols = to - from, ncp = up16(cols), np = a.np;
    const Band out{.out_lo = -from, .out_hi = s.W - 1 - from}, sum{.k_lo = -from, .k_hi = s.W - 1 - from};
    float *Q_ = P::take(ncp * s.dp), *DO_ = P::take(ncp * s.dvp), *lse = P::take(ncp), *delta = P::take(ncp);
    float *X = P::take(np * ncp), *Y = P::take(np * ncp);
    const Lhs k = left<BF>(K, s.dp), v = left<BF>(V, s.dvp);
    for (int r = 0; r < s.R; r++) {
      const auto mark = scratch().mark();
      const float* Q = rows.queries(Q_, r, a.start + from, cols, ncp);
      const float* DO = cotangents(rows, sh, r, a.start + from, cols, ncp, DO_, lse, delta);
      const Rhs qt = P::turned(Q, ncp, s.dp), gt = P::turned(DO, ncp, s.dvp);
      gemm<BF>(np, ncp, s.dp, k, qt.p, qt.ld, X, ncp, false, out);
      gemm<BF>(np, ncp, s.dvp, v, gt.p, gt.ld, Y, ncp, false, out);
      const vf scaling = all((float)c.scaling);
      for (int i = 0; i < np; i++) {
        const int tile = i & ~(ROWS<BF> - 1), lo = down(tile - from), end = std::min(ncp, up(tile + ROWS<BF> + s.W - 1 - from));
        const bool real = i < a.n && a.start + i >= a.lowest && a.start + i < rows.length;
        const int first = std::max(0, i - from), last = real ? i + s.W - 1 - from : -1;
        float *x = X + (size_t)i * ncp, *y = Y + (size_t)i * ncp;
        for (int j = lo; j < std::min(first, end); j++) x[j] = LOG_ZERO;
        for (int j = std::max(lo, last + 1); j < end; j++) x[j] = LOG_ZERO;
        for (int j = lo; j < end; j += VL) {
          const vf p = vexp<BF>(load(x + j) * scaling - load(lse + j));
          store(x + j, p);
          store(y + j, last < 0 ? all(0) : p * (load(y + j) - load(delta + j)) * scaling);
        }
      }
      const Rhs q = P::rows(Q, ncp, s.dp), g = P::rows(DO, ncp, s.dvp);
      gemm<BF>(np, s.dvp, ncp, P::l(X, ncp, np, ncp), g.p, g.ld, dV, s.dvp, true, sum);
      gemm<BF>(np, s.dp, ncp, P::l(Y, ncp, np, ncp), q.p, q.ld, dX, s.dp, true, sum);
      scratch().release(mark);
    }
  }
};
