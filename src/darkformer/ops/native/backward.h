// Gradients by recomputation. In the order of the tokens those of the queries, in the reverse order those of keys and
// values; a chunk whose weights would overflow is cut as in the forward pass.
//
// With a_tj the attention weights, δ_t = do_t·o_t and W_tj = do_t·v_j - δ_t:
//   dℓq_ti = Σ_j e^{ℓq_ti + ℓk_ji - lse_t} W_tj,   dℓk_ji = Σ_t e^{ℓq_ti + ℓk_ji - lse_t} W_tj,   dv_j = Σ_t a_tj do_t.
// The reverse pass carries Σ_t e^{ℓq_ti - lse_t} (do_t, δ_t) over later queries in units of e^{-scale_i}, scale the
// running maximum of the keys seen so far: later queries see all of them, so every factor is at most 1.
#pragma once
#include "forward.h"

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
    if (w.offq.empty()) w.q.resize((size_t)s.dp * s.mr), w.k.resize((size_t)s.mr * s.dp), w.offq.resize(s.mr), w.offk.resize(s.mr), w.linq.resize(s.dp), w.link.resize(s.dp);
    return w;
  }
};

static void zero_above_diagonal(float* x, int np, const float* delta) {
  for (int t = 0; t < np; t++)
    for (int j = 0; j < np; j++) x[t * np + j] = j <= t ? x[t * np + j] - (delta ? delta[t] : 0) : 0;
}

// Rows of the output's gradient, of the log-normaliser and δ; rows that are no query have weight 0.
static void cotangents(const Rows& rows, Shared& sh, int r, int t0, int n, int np, float* DO, float* lse, float* delta) {
  const Dims& s = sh.s;
  for (int i = 0; i < np; i++) {
    const bool real = i < n && t0 + i >= 0 && t0 + i < rows.length;
    const long at = rows.head(r) + t0 + i;
    if (real) load_row(DO + (size_t)i * s.dvp, sh.c.grad_out, at * s.dv, s.dv, s.dvp, sh.c.bf16);
    else memset(DO + (size_t)i * s.dvp, 0, s.dvp * sizeof(float));
    lse[i] = real ? sh.c.lse[at] : -LOG_ZERO;
    delta[i] = real ? sh.delta[at] : 0;
  }
}

template <bool BF> struct QueryPass : Walker<BF> {
  using Base = Walker<BF>;
  using Base::c, Base::s, Base::rows, Base::sums, Base::K, Base::V, Base::FK;
  using P = Pack<BF>;
  Shared& sh;
  Map<BF> qmap;
  Shared::Weights& dw;
  float *SK, *SV, *dSK, *dSV, *shift;
  Rhs sink_kt{}, sink_vt{}, sink_k{};

  QueryPass(Shared& sh, int b, int g, int slot, float* sinks)
      : Base(sh.c, b, g), sh(sh), qmap(c, s, c.wq, c.offq, c.foldq, g, false, true), dw(sh.of(slot, g)) {
    SK = P::take(s.sp * s.dp), SV = P::take(s.sp * s.dvp), shift = P::take(s.mp);
    dSK = sinks, dSV = sinks + (size_t)s.sp * s.dp;
    if (!s.S) return;
    rows.sinks(SK, SV);
    sink_kt = P::rt(SK, s.dp, s.sp, s.dp), sink_vt = P::rt(SV, s.dvp, s.sp, s.dvp), sink_k = P::r(SK, s.dp, s.sp, s.dp);
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
    const bool far = s.m && (a.has_far() || sums.stored(s));
    Rhs vt{}, ek{}, state{}, near_kt{}, near_vt{}, near_k{};
    float *lse = P::take(np), *delta = P::take(np), *DO = P::take(np * s.dvp), *Q = P::take(np * s.dp), *dX = P::take(np * s.dp);
    float* F = P::take((size_t)s.R * np * s.mr);
    if (far) {
      rows.keys(K, V, a.start, a.lowest, a.n, np);
      this->far_keys(a, K);
      for (int i = 0; i < s.mp; i += VL) store(shift + i, load(sums.scale + i) - load(qmap.off + i));
      for (int r = 0; r < s.R; r++) if (!features(a, r, Q, F + (size_t)r * np * s.mr)) return false;
      vt = P::rt(V, s.dvp, np, s.dvp), ek = P::rt(FK, np, s.mp, np), state = P::rt(sums.values, s.ldv, s.mp, s.dvp);
    }
    if (a.near) {
      float *NK = P::take(a.ncp * s.dp), *NV = P::take(a.ncp * s.dvp);
      rows.keys(NK, NV, a.base, a.lowest, a.cols, a.ncp);
      near_kt = P::rt(NK, s.dp, a.ncp, s.dp), near_vt = P::rt(NV, s.dvp, a.ncp, s.dvp), near_k = P::r(NK, s.dp, a.ncp, s.dp);
    }
    for (int r = 0; r < s.R; r++) {
      const auto mark = scratch().mark();
      rows.queries(Q, r, t0, n, np);
      cotangents(rows, sh, r, t0, n, np, DO, lse, delta);
      std::fill(delta, delta + np, 0.0f);
      const Lhs q = P::l(Q, s.dp, np, s.dp), grad = P::l(DO, s.dvp, np, s.dvp);
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
          const int first = std::max({0, t + 1 + lo, a.lowest - a.base}), last = t < n ? t + s.W + lo : -1, tile = t & ~(MR - 1);
          soft_row(X + (size_t)t * a.ncp, Y + (size_t)t * a.ncp, down(tile + lo + 1),
                   std::min(a.ncp, up(tile + MR + lo + s.W)), first, last, lse[t], delta[t], mass[t]);
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
      for (int t = 0; t < n; t++) sh.delta[rows.head(r) + t0 + t] = delta[t] /= mass[t] > 0 ? mass[t] : 1;
      if (far) far_part(a, Fr, Q, delta, G, Z, dX);
      if (a.near) {
        const Band sum{.k_lo = lo + 1, .k_hi = lo + s.W};
        for (int t = 0; t < np; t++) {
          const int tile = t & ~(MR - 1);
          logit_row(X + (size_t)t * a.ncp, Y + (size_t)t * a.ncp, down(tile + lo + 1),
                    std::min(a.ncp, up(tile + MR + lo + s.W)), delta[t]);
        }
        gemm<BF>(np, s.dp, a.ncp, P::l(Y, a.ncp, np, a.ncp), near_k.p, near_k.ld, dX, s.dp, true, sum);
      }
      if (s.S) {
        for (int t = 0; t < np; t++) logit_row(SX + t * s.sp, SY + t * s.sp, 0, s.sp, delta[t]);
        gemm<BF>(np, s.dp, s.sp, P::l(SY, s.sp, np, s.sp), sink_k.p, sink_k.ld, dX, s.dp, true);
        const Rhs qr = P::r(Q, s.dp, np, s.dp), gr = P::r(DO, s.dvp, np, s.dvp);
        gemm<BF>(s.sp, s.dp, np, P::lt(SY, s.sp, s.sp, np), qr.p, qr.ld, dSK, s.dp, true);
        gemm<BF>(s.sp, s.dvp, np, P::lt(SX, s.sp, s.sp, np), gr.p, gr.ld, dSV, s.dvp, true);
      }
      for (int t = 0; t < n; t++) store_row(c.dq, (rows.head(r) + t0 + t) * s.d, dX + (size_t)t * s.dp, s.d, c.bf16);
      scratch().release(mark);
    }
    if (far && a.has_far()) this->absorb(a, P::r(V, s.dvp, np, s.dvp));
    return true;
  }

  // X: logits become weights, 0 where not seen (columns first … last of lo … end-1 are). Y: do·v.
  void soft_row(float* X, const float* Y, int lo, int end, int first, int last, float lse, float& delta, float& mass) const {
    for (int j = lo; j < std::min(first, end); j++) X[j] = LOG_ZERO;
    for (int j = std::max(lo, last + 1); j < end; j++) X[j] = LOG_ZERO;
    const vf scaling = all((float)c.scaling), l = all(last < 0 ? -LOG_ZERO : lse);
    vf sum = all(0), weight = all(0);
    for (int j = lo; j < end; j += VL) {
      const vf p = vexp(load(X + j) * scaling - l);
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

  // F (np×mr): e^{ℓq + scale - lse} and y. False where that would overflow.
  bool features(const Span& a, int r, float* Q, float* F) {
    const auto mark = scratch().mark();
    float* half = P::take(a.np);
    rows.queries(Q, r, a.t0, a.n, a.np);
    qmap.tokens(P::l(Q, s.dp, a.np, s.dp), Q, a.np, F, half);
    bool fits = true;
    for (int t = 0; t < a.np; t++) {
      const vf shifted = all(half[t] + (t < a.n ? c.lse[rows.head(r) + a.t0 + t] : -LOG_ZERO));
      vf high = all(LOG_ZERO);
      for (int i = 0; i < s.mp; i += VL) {
        float* f = F + (size_t)t * s.mr + i;
        const vf l = load(f) + load(shift + i) - shifted;
        high = vmax(high, l);
        store(f, vexp(l));
      }
      if (a.n > 1 && hmax(high) > UNDERFLOW_LOG) fits = false;
    }
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
    const float* before = sums.total;
    for (int t = 0; t < np; t++) {
      float* z = Z + (size_t)t * s.mp;
      vf sum = all(0), weight = all(0);
      for (int i = 0; i < s.mp; i += VL) {
        const vf e = load(F + (size_t)t * s.mr + i), total = load(z + i) + load(before + i);
        store(z + i, total);
        sum = fma(e, load(G + (size_t)t * s.mp + i), sum);
        weight = fma(e, total, weight);
      }
      delta[t] += hsum(sum), mass[t] += hsum(weight);
      before = z;
    }
  }

  // E = e ⊙ (G - δ·Z), the gradient of the log-features, and -Σ_i E·y behind it.
  void far_part(const Span& a, float* F, float* Q, const float* delta, const float* G, const float* Z, float* dX) {
    const int np = a.np;
    for (int t = 0; t < np; t++) {
      float* f = F + (size_t)t * s.mr;
      const vf d = all(delta[t]);
      vf sum = all(0);
      for (int i = 0; i < s.mp; i += VL) {
        const vf e = load(f + i) * (load(G + (size_t)t * s.mp + i) - d * load(Z + (size_t)t * s.mp + i));
        store(f + i, e);
        sum += e;
      }
      const vf total = all(hsum(sum));
      for (int i = s.mp; i < s.mr; i += VL) store(f + i, (all(0) - total) * load(f + i));
      for (int i = 0; i < s.mr; i += VL) store(dw.offq.data() + i, load(dw.offq.data() + i) - load(f + i));
      if (!qmap.linear) continue;
      float *x = Q + (size_t)t * s.dp, *dx = dX + (size_t)t * s.dp, *lin = dw.linq.data();
      for (int i = 0; i < s.dp; i += VL) {
        store(f + i, fma(load(qmap.inverse + i), load(f + s.mp + i), load(f + i)));
        store(dx + i, fma(total, load(qmap.linear + i), load(dx + i)));
        store(lin + i, fma(total, load(x + i), load(lin + i)));
      }
    }
    gemm<false>(np, s.dp, qmap.own, {F, s.mr, 1}, qmap.raw, s.dp, dX, s.dp, true, qmap.input);
    const Rhs f = P::r(F, s.mr, np, s.mr);
    gemm<BF>(s.dp, qmap.own, np, P::lt(Q, s.dp, s.dp, np), f.p, f.ld, dw.q.data(), s.mr, true);
  }
};

template <bool BF> struct KeyPass {
  using P = Pack<BF>;
  Shared& sh;
  const Call& c;
  const Dims& s;
  const Rows rows;
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
    float *Q = P::take(np * s.dp), *F = P::take(s.mr * np), *half = P::take(np);
    rows.queries(Q, r, t0, n, np);
    qmap.features(P::rt(Q, s.dp, np, s.dp), Q, np, F, half);
    for (int t = 0; t < np; t++) half[t] += t < n ? c.lse[rows.head(r) + t0 + t] : -LOG_ZERO;
    vf high = all(LOG_ZERO);
    for (int i = 0; i < s.mp; i++) {
      const vf shift = all(scale[i] - qmap.off[i]);
      for (int t = 0; t < np; t += VL) {
        const vf l = load(F + (size_t)i * np + t) + shift - load(half + t);
        high = vmax(high, l);
        store(E + (size_t)i * np + t, vexp(l));
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
      float *E = P::take(s.mp * np), *DO = P::take(np * s.dvp), *lse = P::take(np), *delta = P::take(np);
      to_unit(sh.scale(rows.pair, t0));
      for (int r = 0; r < s.R; r++) {
        queries(r, t0, n, np, sums.scale, E);
        cotangents(rows, sh, r, t0, n, np, DO, lse, delta);
        add_queries(P::l(E, np, s.mp, np), E, np, P::r(DO, s.dvp, np, s.dvp), delta);
      }
      scratch().release(mark);
    }
  }

  // Features of the far keys: F (mr×np) holds log-features and y; `scale` is raised to their maximum.
  void keys(const Span& a, const float* K, float* F, float* scale) {
    float* half = P::take(a.np);
    kmap.features(P::rt(K, s.dp, a.np, s.dp), K, a.np, F, half);
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
    float *K = P::take(a.np * s.dp), *F = P::take(s.mr * a.np);
    rows.keys(K, nullptr, a.start, a.lowest, a.n, a.np);
    keys(a, K, F, middle);
    run(t0 + h, n - h, middle);
    run(t0, h, before);
    scratch().release(mark);
  }

  bool chunk(int t0, int n, const float* before) {
    const Span a(s, t0, n, rows.count);
    const int np = a.np;
    float *K = P::take(np * s.dp), *V = P::take(np * s.dvp), *dX = P::take(np * s.dp), *dV = P::take(np * s.dvp);
    std::fill(dX, dX + np * s.dp, 0.0f), std::fill(dV, dV + np * s.dvp, 0.0f);
    rows.keys(K, V, a.start, a.lowest, a.n, np);
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
    float *F = P::take(s.mr * np), *E = P::take((size_t)s.R * s.mp * np), *scale = P::take(s.mp), *dL = P::take(s.mp * np);
    memcpy(scale, before, s.mp * sizeof(float));
    keys(a, K, F, scale);
    for (int r = 0; r < s.R; r++) if (!queries(r, a.t0, a.n, np, scale, E + (size_t)r * s.mp * np)) return false;
    for (int i = 0; i < s.mp; i++)
      for (int j = 0; j < np; j += VL) store(F + (size_t)i * np + j, vexp(load(F + (size_t)i * np + j) - all(scale[i])));
    to_unit(scale);
    const Rhs vt = P::rt(V, s.dvp, np, s.dvp), fk = P::r(F, np, s.mp, np), u = P::r(sums.values, s.ldv, s.mp, s.dvp);
    gemm<BF>(s.mp, np, s.dvp, P::l(sums.values, s.ldv, s.mp, s.dvp), vt.p, vt.ld, dL, np, false);
    for (int i = 0; i < s.mp; i++)
      for (int j = 0; j < np; j += VL) store(dL + (size_t)i * np + j, load(dL + (size_t)i * np + j) - all(sums.total[i]));
    gemm<BF>(np, s.dvp, s.mp, P::lt(F, np, np, s.mp), u.p, u.ld, dV, s.dvp, true);
    float *DO = P::take(np * s.dvp), *lse = P::take(np), *delta = P::take(np), *A = P::take(np * np), *B = P::take(np * np);
    for (int r = 0; r < s.R; r++) {
      const auto mark = scratch().mark();
      const float* e = E + (size_t)r * s.mp * np;
      cotangents(rows, sh, r, a.t0, a.n, np, DO, lse, delta);
      const Rhs grad = P::r(DO, s.dvp, np, s.dvp);
      const Lhs el = P::l(e, np, s.mp, np);
      gemm<BF>(np, np, s.mp, P::lt(e, np, np, s.mp), fk.p, fk.ld, A, np, false, {.out_hi = 0});
      gemm<BF>(np, np, s.dvp, P::l(DO, s.dvp, np, s.dvp), vt.p, vt.ld, B, np, false, {.out_hi = 0});
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
        const vf g = load(F + at) * load(dL + at);
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
          store(lin, fma(all(total[j]), load(K + (size_t)j * s.dp + i), load(lin)));
        }
    }
    gemm<false>(np, s.dp, kmap.own, {F, 1, np}, kmap.raw, s.dp, dX, s.dp, true, kmap.input);
    const Rhs k = P::r(K, s.dp, np, s.dp);
    gemm<BF>(kmap.own, s.dp, np, P::l(F, np, s.mr, np), k.p, k.ld, dw.k.data(), s.dp, true);
    return true;
  }

  // Keys of the span against the queries that have them in their window: column c is query start + c.
  void near_part(const Span& a, const float* K, const float* V, float* dX, float* dV) {
    const int from = std::max(0, -a.start) & ~15, to = std::min(s.W + a.n - 1, rows.length - a.start);
    if (to <= from) return;
    const int cols = to - from, ncp = up16(cols), np = a.np;
    const Band out{.out_lo = -from, .out_hi = s.W - 1 - from}, sum{.k_lo = -from, .k_hi = s.W - 1 - from};
    float *Q = P::take(ncp * s.dp), *DO = P::take(ncp * s.dvp), *lse = P::take(ncp), *delta = P::take(ncp);
    float *X = P::take(np * ncp), *Y = P::take(np * ncp);
    const Lhs k = P::l(K, s.dp, np, s.dp), v = P::l(V, s.dvp, np, s.dvp);
    for (int r = 0; r < s.R; r++) {
      const auto mark = scratch().mark();
      rows.queries(Q, r, a.start + from, cols, ncp);
      cotangents(rows, sh, r, a.start + from, cols, ncp, DO, lse, delta);
      const Rhs qt = P::rt(Q, s.dp, ncp, s.dp), gt = P::rt(DO, s.dvp, ncp, s.dvp);
      gemm<BF>(np, ncp, s.dp, k, qt.p, qt.ld, X, ncp, false, out);
      gemm<BF>(np, ncp, s.dvp, v, gt.p, gt.ld, Y, ncp, false, out);
      const vf scaling = all((float)c.scaling);
      for (int i = 0; i < np; i++) {
        const int tile = i & ~(MR - 1), lo = down(tile - from), end = std::min(ncp, up(tile + MR + s.W - 1 - from));
        const bool real = i < a.n && a.start + i >= a.lowest && a.start + i < rows.length;
        const int first = std::max(0, i - from), last = real ? i + s.W - 1 - from : -1;
        float *x = X + (size_t)i * ncp, *y = Y + (size_t)i * ncp;
        for (int j = lo; j < std::min(first, end); j++) x[j] = LOG_ZERO;
        for (int j = std::max(lo, last + 1); j < end; j++) x[j] = LOG_ZERO;
        for (int j = lo; j < end; j += VL) {
          const vf p = vexp(load(x + j) * scaling - load(lse + j));
          store(x + j, p);
          store(y + j, last < 0 ? all(0) : p * (load(y + j) - load(delta + j)) * scaling);
        }
      }
      const Rhs q = P::r(Q, s.dp, ncp, s.dp), g = P::r(DO, s.dvp, ncp, s.dvp);
      gemm<BF>(np, s.dvp, ncp, P::l(X, ncp, np, ncp), g.p, g.ld, dV, s.dvp, true, sum);
      gemm<BF>(np, s.dp, ncp, P::l(Y, ncp, np, ncp), q.p, q.ld, dX, s.dp, true, sum);
      scratch().release(mark);
    }
  }
};

// The sums of later queries for each task, at the unit of the chunk after its end.
template <bool BF> static std::vector<std::vector<float>> scan_back(Shared& sh, const std::vector<Task>& tasks) {
  const Call& c = sh.c;
  const Dims& s = sh.s;
  std::vector<std::vector<float>> after(tasks.size(), std::vector<float>(Sums::size(s)));
  struct Unit { Task task; int of; std::vector<float> sums; };
  std::vector<Unit> units;
  for (size_t i = 0; i < tasks.size(); i++)
    if (s.m && tasks[i].segment > 0) {
      const int chunks = (tasks[i].end - tasks[i].begin + CHUNK - 1) / CHUNK, parts = std::min<int>(c.threads, chunks);
      for (int p = 0; p < parts; p++) {
        Task t = tasks[i];
        t.begin = tasks[i].begin + chunks * p / parts * CHUNK;
        t.end = std::min(tasks[i].end, tasks[i].begin + chunks * (p + 1) / parts * CHUNK);
        units.push_back({t, (int)i, std::vector<float>(Sums::size(s))});
      }
    }
  const int slots = std::min<int>(c.threads, units.size());
  if (slots)
    parallel(c.parallel, slots, [&](int slot) {
      for (size_t u = slot; u < units.size(); u += slots) {
        scratch().reset();
        KeyPass<BF> w(sh, units[u].task.b, units[u].task.g, slot);
        w.sums.clear(s);
        w.sums_of(units[u].task.begin, units[u].task.end);
        memcpy(units[u].sums.data(), w.sums.values, Sums::size(s) * sizeof(float));
      }
    });
  // `later` lies at a unit that is never below that of `mine`.
  auto join = [&](Sums mine, const Sums& later) {
    for (int i = 0; i < s.m; i++) {
      const float factor = std::exp(mine.scale[i] - later.scale[i]);
      for (int j = 0; j < s.dvp; j++) mine.values[(size_t)i * s.ldv + j] += factor * later.values[(size_t)i * s.ldv + j];
      mine.total[i] += factor * later.total[i];
    }
  };
  size_t u = units.size();
  for (size_t i = tasks.size(); i-- > 0;) {
    Sums now(after[i].data(), s);
    if (tasks[i].segment + 1 < tasks[i].segments) {
      const float* later = after[i + 1].data();
      std::vector<float> step;
      for (; u > 0 && units[u - 1].of == (int)i + 1; u--) {
        step = units[u - 1].sums;
        join(Sums(step.data(), s), Sums((float*)later, s));
        std::copy(step.begin(), step.end(), after[i].begin());
        later = after[i].data();
      }
      continue;
    }
    const long pair = (long)tasks[i].b * c.G + tasks[i].g;
    now.clear(s);
    for (int k = 0; k < s.m; k++) {
      load_row(now.values + (size_t)k * s.ldv, c.grad_values, (pair * s.m + k) * s.dv, s.dv, s.dvp, false);
      now.total[k] = -c.grad_total[pair * s.m + k];
      now.scale[k] = c.scale_out[pair * s.m + k];
    }
  }
  return after;
}

// Of folded maps y has a shift of its own in place of N's offset, and lengths of draws are no parameters.
static void finish_folds(Shared& sh) {
  const Call& c = sh.c;
  const Dims& s = sh.s;
  for (int g = 0; g < c.G; g++)
    for (int j = 0; j < s.d; j++) {
      const long fold = g * 3L * s.d + j, off = g * (long)(s.m + s.r) + s.m + j;
      c.dfoldq[fold] = c.dfoldk[fold] = c.dfoldq[fold + 2 * s.d] = c.dfoldk[fold + 2 * s.d] = 0;
      c.dfoldq[fold + s.d] = c.doffq[off], c.dfoldk[fold + s.d] = c.doffk[off];
      c.doffq[off] = c.doffk[off] = 0;
      for (auto& slot : sh.weights) {
        const Shared::Weights& w = slot[g];
        if (w.offq.empty()) continue;
        c.dfoldq[fold + 2 * s.d] += w.linq[j], c.dfoldk[fold + 2 * s.d] += w.link[j];
      }
    }
}

static void finish_weights(Shared& sh) {
  const Call& c = sh.c;
  const Dims& s = sh.s;
  const long own = s.m + s.r;
  for (int g = 0; g < c.G; g++)
    for (int i = 0; i < own; i++) {
      const int from = i < s.m ? i : s.mp + i - s.m;
      float *wq = c.dwq + (g * own + i) * s.d, *wk = c.dwk + (g * own + i) * s.d;
      std::fill(wq, wq + s.d, 0.0f), std::fill(wk, wk + s.d, 0.0f);
      c.doffq[g * own + i] = c.doffk[g * own + i] = 0;
      for (auto& slot : sh.weights) {
        const Shared::Weights& w = slot[g];
        if (w.offq.empty()) continue;
        for (int j = 0; j < s.d; j++) wq[j] += w.q[(size_t)j * s.mr + from], wk[j] += w.k[(size_t)from * s.dp + j];
        c.doffq[g * own + i] += w.offq[from], c.doffk[g * own + i] += w.offk[from];
      }
    }
  if (c.foldq) finish_folds(sh);
}

static void finish_rows(Shared& sh, const std::vector<Task>& tasks, size_t first) {
  const Call& c = sh.c;
  const Dims& s = sh.s;
  const Rows rows(c, s, tasks[first].b, tasks[first].g);
  std::vector<float> total(sh.sinks[first]);
  for (int k = 1; k < tasks[first].segments; k++)
    for (size_t j = 0; j < total.size(); j++) total[j] += sh.sinks[first + k][j];
  for (int i = 0; i < s.S; i++) {
    const bool old = i < rows.count;
    const long at = i - (long)rows.count;
    if (!old && at >= rows.length) continue;
    const float *k = total.data() + (size_t)i * s.dp, *v = total.data() + (size_t)s.sp * s.dp + (size_t)i * s.dvp;
    store_row(old ? c.d_sink_k : c.dk, old ? (rows.pair * s.S + i) * s.d : (rows.pair * c.L + at) * s.d, k, s.d, c.bf16);
    store_row(old ? c.d_sink_v : c.dvalue, old ? (rows.pair * s.S + i) * s.dv : (rows.pair * c.L + at) * s.dv, v, s.dv, c.bf16);
  }
  const size_t size = c.bf16 ? 2 : 4, pads = c.L - rows.length;
  memset((char*)c.dk + (rows.pair * c.L + rows.length) * s.d * size, 0, pads * s.d * size);
  memset((char*)c.dvalue + (rows.pair * c.L + rows.length) * s.dv * size, 0, pads * s.dv * size);
  for (int r = 0; r < s.R; r++) memset((char*)c.dq + (rows.head(r) + rows.length) * s.d * size, 0, pads * s.d * size);
}

template <bool BF> static void backward(const Call& c) {
  int slots;
  const size_t rows = c.B * c.G * c.L * (c.bf16 ? 2 : 4);
  huge_pages(c.dq, rows * c.R * c.d), huge_pages(c.dk, rows * c.d), huge_pages(c.dvalue, rows * c.dv);
  const auto tasks = plan(c, slots);
  Shared sh(c, tasks.size(), std::max<int>(slots, c.threads));
  const Dims& s = sh.s;
  const auto before = scan<BF>(c, tasks);
  parallel(c.parallel, slots, [&](int slot) {
    for (size_t i = slot; i < tasks.size(); i += slots) {
      const Task& t = tasks[i];
      scratch().reset();
      QueryPass<BF> pass(sh, t.b, t.g, slot, sh.sinks[i].data());
      if (before[i].empty()) pass.sums.read(c, s, pass.rows.pair);
      else memcpy(pass.sums.values, before[i].data(), Sums::size(s) * sizeof(float));
      for (int at = t.begin; at < t.end; at += CHUNK) {
        memcpy(sh.scale(pass.rows.pair, at), pass.sums.scale, s.mp * sizeof(float));
        pass.run(at, std::min(CHUNK, t.end - at));
      }
    }
  });
  const auto after = scan_back<BF>(sh, tasks);
  parallel(c.parallel, slots, [&](int slot) {
    for (size_t i = slot; i < tasks.size(); i += slots) {
      const Task& t = tasks[i];
      scratch().reset();
      KeyPass<BF> pass(sh, t.b, t.g, slot);
      memcpy(pass.sums.values, after[i].data(), Sums::size(s) * sizeof(float));
      if (t.segment + 1 == t.segments)  // the last keys are in windows only
        for (int at = t.end; at < t.end + s.W; at += CHUNK) pass.run(at, std::min(CHUNK, t.end + s.W - at), nullptr);
      for (int at = t.begin + (t.end - t.begin - 1) / CHUNK * CHUNK; at >= t.begin && t.end > t.begin; at -= CHUNK)
        pass.run(at, std::min(CHUNK, t.end - at), sh.scale(pass.rows.pair, at));
      if (t.segment) continue;
      std::vector<float> start(s.mp, 0.0f);
      std::copy(c.scale + pass.rows.pair * s.m, c.scale + (pass.rows.pair + 1) * s.m, start.begin());
      pass.to_unit(start.data());
      for (int k = 0; k < s.m; k++) {
        store_row(c.dvalues, (pass.rows.pair * s.m + k) * s.dv, pass.sums.values + (size_t)k * s.ldv, s.dv, false);
        c.dtotal[pass.rows.pair * s.m + k] = -pass.sums.total[k];
      }
    }
  });
  finish_weights(sh);
  for (size_t i = 0; i < tasks.size(); i++) if (!tasks[i].segment) finish_rows(sh, tasks, i);
}
