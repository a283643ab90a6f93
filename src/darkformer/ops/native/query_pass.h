// Gradients of queries, sinks and the query's map, in the order of the tokens: see backward.h.
#pragma once
#include "shared.h"

template <bool BF> struct QueryPass : Walker<BF> {
  using Base = Walker<BF>;
  using Base::c, Base::s, Base::rows, Base::sums, Base::FK;
  using P = Pack<BF>;
  Shared& sh;
  Kept<BF>& kept;
  Map<BF> qmap;
  Shared::Weights& dw;
  float *SK, *SV, *dSK, *dSV, *shift, *own_keys;
  Rhs sink_kt{}, sink_vt{}, sink_k{};

  QueryPass(Shared& sh, Kept<BF>& kept, int b, int g, int slot, float* sinks)
      : Base(sh.c, b, g, true), sh(sh), kept(kept),
        qmap(Base::both(c) ? this->kmap : Map<BF>(c, s, c.wq, c.offq, c.foldq, g, false, true, true)), dw(sh.of(slot, g)) {
    SK = P::take(s.sp * s.dp), SV = P::take(s.sp * s.dvp), shift = P::take(s.mp);
    dSK = sinks, dSV = sinks + (size_t)s.sp * s.dp, own_keys = FK;
    if (!s.S) return;
    rows.sinks(SK, SV);
    sink_kt = P::turned(SK, s.sp, s.dp), sink_vt = P::turned(SV, s.sp, s.dvp), sink_k = P::rows(SK, s.sp, s.dp);
  }

  void run(int t0, int n) {
    const auto mark = scratch().mark();
    const bool done = chunk(t0, n);
    scratch().release(mark);
    if (done) return;
    this->restore();
    run(t0, (n + 1) / 2);
    run(t0 + (n + 1) / 2, n / 2);
  }

  bool chunk(int t0, int n) {
    const Span a(s, t0, n, rows.count);
    const int np = a.np;
    this->moved.clear();
    rows.ahead(t0 + CHUNK, true);
    const bool far = s.m && (a.has_far() || sums.stored(s));
    typename Kept<BF>::Chunk* const mine = far ? kept.of(t0, n) : nullptr;
    const float* V = nullptr;
    Rhs vt{}, ek{}, state{}, near_kt{}, near_vt{}, near_k{};
    float *lse = P::take(np), *delta = P::take(np), *DO_ = P::take(np * s.dvp), *Q_ = P::take(np * s.dp), *dX = P::take(np * s.dp);
    float* F = P::take((size_t)s.R * np * s.mr);
    if (far) {
      V = rows.values(Base::V, a.start, a.lowest, a.n, np);
      FK = mine ? mine->keys : own_keys;
      this->far_keys(a, rows.keys(Base::K, a.start, a.lowest, a.n, np), false, mine);
      if (mine) memcpy(mine->scale, sums.scale, s.mp * sizeof(float));
      for (int i = 0; i < s.mp; i += VL) store(shift + i, load(sums.scale + i) - load(qmap.off + i));
      for (int r = 0; r < s.R; r++)
        if (!features(a, r, Q_, F + (size_t)r * np * s.mr, mine ? mine->queries + r * kept.head : nullptr)) return false;
      vt = P::turned(V, np, s.dvp), ek = this->features_turned(np), state = P::rt(sums.values, s.ldv, s.mp, s.dvp);
    }
    if (a.near) {
      const float* NK = rows.keys(P::take(a.ncp * s.dp), a.base, a.lowest, a.cols, a.ncp);
      const float* NV = rows.values(P::take(a.ncp * s.dvp), a.base, a.lowest, a.cols, a.ncp);
      near_kt = P::turned(NK, a.ncp, s.dp), near_vt = P::turned(NV, a.ncp, s.dvp), near_k = P::rows(NK, a.ncp, s.dp);
    }
    for (int r = 0; r < s.R; r++) {
      const auto mark = scratch().mark();
      const float *Q = rows.queries(Q_, r, t0, n, np), *DO = cotangents(rows, sh, r, t0, n, np, DO_, lse, delta);
      std::fill(delta, delta + np, 0.0f);
      const Lhs q = left<BF>(Q, s.dp), grad = left<BF>(DO, s.dvp);
      std::fill(dX, dX + np * s.dp, 0.0f);
      float *Fr = F + (size_t)r * np * s.mr, *X = P::take(np * a.ncp), *Y = P::take(np * a.ncp);
      float *SX = P::take(np * s.sp), *SY = P::take(np * s.sp), *G = P::take(np * s.mp), *Z = P::take(np * s.mp), *mass = P::take(np);
      const int lo = a.start - a.base;
      // δ_t = Σ_j a_tj do_t·v_j from the same rounded numbers as what it is subtracted from, not from the rounded output.
      // Both sums are divided by Σ_j a_tj, which is 1 up to the rounding that this takes away.
      std::fill(mass, mass + np, 0.0f);
      if (far) far_sums(a, Fr, grad, delta, mass, vt, ek, state, G, Z);
      if (a.near) {
        const Band out{.out_lo = lo + 1, .out_hi = lo + s.W};
        gemm<BF>(np, a.ncp, s.dp, q, near_kt.p, near_kt.ld, X, a.ncp, false, out);
        gemm<BF>(np, a.ncp, s.dvp, grad, near_vt.p, near_vt.ld, Y, a.ncp, false, out);
        for (int t = 0; t < np; t++) {
          const int first = std::max({0, t + 1 + lo, a.lowest - a.base}), last = t < n ? t + s.W + lo : -1, tile = t & ~(ROWS<BF> - 1);
          soft_row(X + (size_t)t * a.ncp, Y + (size_t)t * a.ncp, down(tile + lo + 1),
                   std::min(a.ncp, up(tile + ROWS<BF> + lo + s.W)), first, last, lse[t], delta[t], mass[t]);
        }
      }
      if (s.S) {
        gemm<BF>(np, s.sp, s.dp, q, sink_kt.p, sink_kt.ld, SX, s.sp, false);
        gemm<BF>(np, s.sp, s.dvp, grad, sink_vt.p, sink_vt.ld, SY, s.sp, false);
        for (int t = 0; t < np; t++) {
          const int seen = t < n ? (int)std::min<int64_t>(s.S, rows.count + t0 + t + 1) : 0;
          soft_row(SX + t * s.sp, SY + t * s.sp, 0, s.sp, 0, seen - 1, lse[t], delta[t], mass[t]);
        }
      }
      float* const deltas = sh.delta(rows.pair, r) + t0;
      for (int t = 0; t < n; t++) deltas[t] = delta[t] /= mass[t] > 0 ? mass[t] : 1;
      if (far) far_part(a, Fr, Q, delta, G, Z, dX);
      if (a.near) {
        const Band sum{.k_lo = lo + 1, .k_hi = lo + s.W};
        for (int t = 0; t < np; t++) {
          const int tile = t & ~(ROWS<BF> - 1);
          logit_row(X + (size_t)t * a.ncp, Y + (size_t)t * a.ncp, down(tile + lo + 1),
                    std::min(a.ncp, up(tile + ROWS<BF> + lo + s.W)), delta[t]);
        }
        gemm<BF>(np, s.dp, a.ncp, P::l(Y, a.ncp, np, a.ncp), near_k.p, near_k.ld, dX, s.dp, true, sum);
      }
      if (s.S) {
        for (int t = 0; t < np; t++) logit_row(SX + t * s.sp, SY + t * s.sp, 0, s.sp, delta[t]);
        gemm<BF>(np, s.dp, s.sp, P::l(SY, s.sp, np, s.sp), sink_k.p, sink_k.ld, dX, s.dp, true);
        const Rhs qr = P::rows(Q, np, s.dp), gr = P::rows(DO, np, s.dvp);
        gemm<BF>(s.sp, s.dp, np, P::lt(SY, s.sp, s.sp, np), qr.p, qr.ld, dSK, s.dp, true);
        gemm<BF>(s.sp, s.dvp, np, P::lt(SX, s.sp, s.sp, np), gr.p, gr.ld, dSV, s.dvp, true);
      }
      for (int t = 0; t < n; t++) store_row(c.dq, (rows.head(r) + t0 + t) * s.d, dX + (size_t)t * s.dp, s.d, c.bf16);
      scratch().release(mark);
    }
    if (far && a.has_far()) this->absorb(a, P::rows(V, np, s.dvp));
    if (mine) mine->made = true;
    return true;
  }

  // X: logits become weights, 0 where not seen (columns first … last of lo … end-1 are). Y: do·v.
  void soft_row(float* X, const float* Y, int lo, int end, int first, int last, float lse, float& delta, float& mass) const {
    for (int j = lo; j < std::min(first, end); j++) X[j] = LOG_ZERO;
    for (int j = std::max(lo, last + 1); j < end; j++) X[j] = LOG_ZERO;
    const vf scaling = all((float)c.scaling), l = all(last < 0 ? -LOG_ZERO : lse);
    vf sum = all(0), weight = all(0);
    for (int j = lo; j < end; j += VL) {
      const vf p = vexp<BF>(load(X + j) * scaling - l);
      store(X + j, p);
      sum = fma(p, load(Y + j), sum);
      weight += p;
    }
    delta += hsum(sum), mass += hsum(weight);
  }
  // Y: gradient of the logits.
  void logit_row(const float* X, float* Y, int lo, int end, float delta) const {
    for (int j = lo; j < end; j += VL) store(Y + j, load(X + j) * (load(Y + j) - all(delta)) * all((float)c.scaling));
  }

  // F (np×mr): e^{ℓq + scale - lse} and y; the former also to `keep`, if given. False where that would overflow.
  bool features(const Span& a, int r, float* to, float* F, float* keep) {
    const auto mark = scratch().mark();
    float* half = P::take(a.np);
    const float* Q = rows.queries(to, r, a.t0, a.n, a.np);
    qmap.template tokens<true>(left<BF>(Q, s.dp), a.np, F, half);
    const int mp = s.mp, mr = s.mr;
    const float *const lse = c.lse + rows.head(r) + a.t0, *const add = shift;
    vf over = all(LOG_ZERO);
    for (int t = 0; t < a.np; t++, F += mr, keep += keep ? mp / rows.EACH : 0) {
      const float below = half[t] + (t < a.n ? lse[t] : -LOG_ZERO);
      const vf less = level<BF>(all(below));
      vf high = all(LOG_ZERO);
      for (int i = 0; i < mp; i += VL) {
        const vf l = load(F + i) + load(add + i);
        high = vmax(high, l);
        const vf e = vexp_below<BF>(l, less);
        store(F + i, e);
        if (keep) BF ? to_bf16((uint16_t*)keep + i, e) : store(keep + i, e);
      }
      over = vmax(over, high - all(below));
    }
    const bool fits = a.n == 1 || !any_above(over, all(UNDERFLOW_LOG));
    scratch().release(mark);
    return fits;
  }

  // G, Z (np×mp): Σ_j e^{ℓk_ji - scale_i} do_t·v_j and the same with 1 for do_t·v_j, over the far keys of row t.
  void far_sums(const Span& a, const float* F, Lhs grad, float* delta, float* mass, Rhs vt, Rhs ek, Rhs state, float* G, float* Z) {
    const int np = a.np;
    float* B = P::take(np * np);
    gemm<BF>(np, s.mp, s.dvp, grad, state.p, state.ld, G, s.mp, false);
    gemm<BF>(np, np, s.dvp, grad, vt.p, vt.ld, B, np, false, {.out_hi = 0});
    zero_above_diagonal(B, np, nullptr);
    gemm<BF>(np, s.mp, np, P::l(B, np, np, np), ek.p, ek.ld, G, s.mp, true, {.k_hi = 0});
    transpose(FK, np, s.mp, np, Z, s.mp);
    const float *before = sums.total, *g = G;
    const int mp = s.mp, mr = s.mr;
    alignas(64) float products[CHUNK * VL], weights[CHUNK * VL];
    for (int t = 0; t < np; t++, Z += mp, F += mr, g += mp) {
      vf sum = all(0), weight = all(0);
      for (int i = 0; i < mp; i += VL) {
        const vf e = load(F + i), total = load(Z + i) + load(before + i);
        store(Z + i, total);
        sum = fma(e, load(g + i), sum);
        weight = fma(e, total, weight);
      }
      store(products + t * VL, sum), store(weights + t * VL, weight);
      before = Z;
    }
    for (int t = 0; t < np; t += VL) {
      store(delta + t, load(delta + t) + across(products + t * VL, Add()));
      store(mass + t, load(mass + t) + across(weights + t * VL, Add()));
    }
  }

  // E = e ⊙ (G - δ·Z), the gradient of the log-features, and -Σ_i E·y behind it.
  void far_part(const Span& a, float* F, const float* Q, const float* delta, const float* G, const float* Z, float* dX) {
    const int np = a.np, mp = s.mp, mr = s.mr, dp = s.dp;
    float *f = F, *const off = dw.offq.data(), *const lin = dw.linq.data();
    alignas(64) float part[VL * VL], total[CHUNK];
    for (int t = 0; t < np; t++, f += mr, G += mp, Z += mp) {
      const vf d = all(delta[t]);
      vf sum = all(0);
      for (int i = 0; i < mp; i += VL) {
        const vf e = load(f + i) * (load(G + i) - d * load(Z + i));
        store(f + i, e);
        sum += e;
      }
      store(part + t % VL * VL, sum);
      if (t % VL == VL - 1) store(total + t + 1 - VL, across(part, Add()));
    }
    for (int i = 0; i < mr; i += VL) {
      vf sum = all(0);
      f = F + i;
      if (i < mp)
        for (int t = 0; t < np; t++, f += mr) sum += load(f);
      else
        for (int t = 0; t < np; t++, f += mr) {
          const vf e = all(-total[t]) * load(f);
          store(f, e), sum += e;
        }
      store(off + i, load(off + i) - sum);
    }
    const float *const inverse = qmap.inverse, *const linear = qmap.linear, *x = Q;
    float* dx = dX;
    f = F;
    for (int t = 0; linear && t < np; t++, f += mr, dx += dp, x += dp / rows.EACH)
      for (int i = 0; i < dp; i += VL) {
        store(f + i, fma(load(inverse + i), load(f + mp + i), load(f + i)));
        store(dx + i, fma(all(total[t]), load(linear + i), load(dx + i)));
        store(lin + i, fma(all(total[t]), load_as<BF>(x, i), load(lin + i)));
      }
    qmap.backwards(P::l(F, mr, np, qmap.own), np, dX);
    if (!c.dwq) return;  // nobody wants the map's gradient
    const Rhs packed = P::r(F, s.mr, np, qmap.own);
    gemm<BF>(s.dp, qmap.own, np, P::rows_t(Q, s.dp, np), packed.p, packed.ld, dw.q.data(), s.mr, true);
  }
};
