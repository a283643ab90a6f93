// Gradients of keys, values and the key's map, in the reverse order of the tokens: see backward.h.
#pragma once
#include "shared.h"

template <bool BF> struct KeyPass {
  using P = Pack<BF>;
  Shared& sh;
  Kept<BF>& kept;
  const Call& c;
  const Dims& s;
  const Rows<BF> rows;
  Sums sums;  // of later queries: values (mp×dvp), total (mp), in units of e^-scale
  Map<BF> qmap, kmap;
  Shared::Weights& dw;

  KeyPass(Shared& sh, Kept<BF>& kept, int b, int g, int slot)
      : sh(sh), kept(kept), c(sh.c), s(sh.s), rows(c, s, b, g), sums(scratch().take(Sums::size(s)), s),
        qmap(c, s, c.wq, c.offq, c.foldq, g, true, false, Walker<BF>::both(c)),
        kmap(Walker<BF>::both(c) ? qmap : Map<BF>(c, s, c.wk, c.offk, c.foldk, g, true, false, true)), dw(sh.of(slot, g)) {}

  void to_unit(const float* scale) {
    for (int i = 0; i < s.m; i++) {
      if (scale[i] == sums.scale[i]) continue;
      const float factor = std::exp(scale[i] - sums.scale[i]);
      float* row = sums.values + (size_t)i * s.ldv;
      for (int j = 0; j < s.dvp; j += VL) store(row + j, all(factor) * load(row + j));
      sums.total[i] *= factor, sums.scale[i] = scale[i];
    }
  }
  // Features of queries, e^{ℓq + scale - lse}, as left factor (mp×np) and, with their transpose as left factor, either (np×mp) as `Rows`
  // has them or turned: (mp×np), with bfloat16 packed as right factor. along: Σ_t e_ti δ_t (mp).
  struct Queries {
    Lhs features;
    const float *rows, *turned;
    float* along;
  };
  // Memory for those that are made here.
  Queries empty(int np) const {
    float *e = P::take(s.mp * np / (BF ? 2 : 1)), *turned = BF ? P::take(up16(s.mp / 2) * np) : e;
    return {{e, BF ? np / 2 : np, 1}, nullptr, turned, P::take(s.mp)};
  }
  Queries found(const float* rows, int np, const float* delta) const {
    float* along = P::take(s.mp);
    for (int i = 0; i < s.mp; i += VL) {
      vf sum = all(0);
      for (int t = 0; t < np; t++) sum = fma(load_as<BF>(rows + (size_t)t * s.mp / (BF ? 2 : 1), i), all(delta[t]), sum);
      store(along + i, sum);
    }
    return {P::rows_t(rows, s.mp, np), rows, nullptr, along};
  }
  Lhs transposed_left(const Queries& q, int np) const {
    if (q.rows) return left<BF>(q.rows, s.mp);
    return BF ? turned_left(q.turned, np) : Lhs{q.turned, 1, np};
  }
  // The transpose of mp×np features, packed as right factor, as left factor.
  Lhs turned_left(const float* packed, int np) const {
    const int units = up16(s.mp / 2);
    float* to = P::take((size_t)np * units);
    transpose(packed, np, units, np, to, units);  // what is behind mp/2 is not used
    return {to, units, 1};
  }
  // False where a feature would overflow.
  bool queries(int r, int t0, int n, int np, const float* scale, const float* delta, const Queries& to) {
    const auto mark = scratch().mark();
    float *F = P::take(s.mr * np), *half = P::take(np);
    const float *Q = rows.queries(P::take(np * s.dp), r, t0, n, np), *lse = c.lse + rows.head(r) + t0;
    qmap.template features<false>(P::turned(Q, np, s.dp), left<BF>(Q, s.dp), np, F, half);
    for (int t = 0; t < np; t++) half[t] += t < n ? lse[t] : -LOG_ZERO;
    const bool fits = np == CHUNK ? exponentials<CHUNK / VL>(np, F, half, scale, delta, to)
                                  : exponentials<0>(np, F, half, scale, delta, to);
    scratch().release(mark);
    return n == 1 || fits;
  }
  template <int N>
  bool exponentials(int np, const float* f, const float* half, const float* scale, const float* delta, const Queries& to) const {
    const int n = N ? N : np / VL, mp = s.mp;
    const float* const offsets = qmap.off;
    float *e_to = (float*)to.features.p, *turned = (float*)to.turned, *const along = to.along;
    uint16_t* packed = (uint16_t*)e_to;
    vf high = all(LOG_ZERO), below[CHUNK / VL], weight[CHUNK / VL], e[2][CHUNK / VL];
    alignas(64) float part[VL * VL];
    for (int j = 0; j < n; j++) below[j] = load(half + j * VL), weight[j] = load(delta + j * VL);
    for (int i = 0; i < mp; i += 2) {
      for (int h = 0; h < 2; h++, f += np) {
        const vf shift = all(scale[i + h] - offsets[i + h]);
        vf sum = all(0);
        for (int j = 0; j < n; j++) {
          const vf l = load(f + j * VL) - below[j] + shift;
          high = vmax(high, l), e[h][j] = vexp<BF>(l), sum = fma(e[h][j], weight[j], sum);
        }
        for (int j = 0; !BF && j < n; j++) store(e_to + h * np + j * VL, e[h][j]);
        store(part + (i + h) % VL * VL, sum);
      }
      for (int j = 0; BF && j < n; j++)
        store(turned + j * VL, pair_bf16(e[0][j], e[1][j], packed + j * VL, packed + np + j * VL));
      turned += np, packed += 2 * np, e_to += 2 * np;
      if (i % VL == VL - 2) store(along + i + 2 - VL, across(part, Add()));
    }
    return hmax(high) <= UNDERFLOW_LOG;
  }
  void add_queries(const Queries& q, int np, Rhs grad) {
    gemm<BF>(s.mp, s.dvp, np, q.features, grad.p, grad.ld, sums.values, s.ldv, true);
    for (int i = 0; i < s.mp; i += VL) store(sums.total + i, load(sums.total + i) + load(q.along + i));
  }
  // Only the sums, over the queries [begin, end), for the keys before `begin`.
  void sums_of(int begin, int end) {
    const int last = (end - 1) / CHUNK * CHUNK;
    memcpy(sums.scale, sh.scale(rows.pair, last), s.mp * sizeof(float));
    for (int t0 = last; t0 >= begin; t0 -= CHUNK) {
      const int n = std::min(CHUNK, end - t0), np = up16(n);
      const auto mark = scratch().mark();
      const Queries q = empty(np);
      float *to = P::take(np * s.dvp), *lse = P::take(np), *delta = P::take(np);
      to_unit(sh.scale(rows.pair, t0));
      for (int r = 0; r < s.R; r++) {
        const float* DO = cotangents(rows, sh, r, t0, n, np, to, lse, delta);
        queries(r, t0, n, np, sums.scale, delta, q);
        add_queries(q, np, P::rows(DO, np, s.dvp));
      }
      scratch().release(mark);
    }
  }

  // Features of far keys: F (mr×np), e^{ℓk - scale}, then y; the former as right factor; scale (mp), their maximum so far.
  struct Keys {
    float* F;
    Rhs right;
    const float* scale;
  };
  Keys keys(const Span& a, const float* K, const float* before) {
    float *F = P::take(s.mr * a.np), *packed = BF ? P::take(up16(s.mp / 2) * a.np) : F, *scale = P::take(s.mp), *half = P::take(a.np);
    memcpy(scale, before, s.mp * sizeof(float));
    kmap.template features<true>(P::turned(K, a.np, s.dp), left<BF>(K, s.dp), a.np, F, half);
    for (int j = 0; j < a.np; j++) if (j < a.far_from || j >= a.n) half[j] = MASKED;
    a.np == CHUNK ? key_exponentials<CHUNK / VL>(a.np, F, half, packed, scale) : key_exponentials<0>(a.np, F, half, packed, scale);
    return {F, {packed, a.np}, scale};
  }
  template <int N> void key_exponentials(int np, float* f, const float* half, float* packed, float* scale) const {
    const int n = N ? N : np / VL, mp = s.mp;
    const float* const offsets = kmap.off;
    vf below[CHUNK / VL], e[2][CHUNK / VL];
    for (int j = 0; j < n; j++) below[j] = load(half + j * VL);
    for (int i = 0; i < mp; i += 2) {
      for (int h = 0; h < 2; h++, f += np) {
        const float off = offsets[i + h];
        vf top = all(-MASKED);
        for (int j = 0; j < n; j++) e[h][j] = load(f + j * VL) - below[j], top = vmax(top, e[h][j]);
        if (any_above(top, all(scale[i + h] + off))) scale[i + h] = hmax(top) - off;
        const vf under = level<BF>(all(scale[i + h] + off));
        for (int j = 0; j < n; j++) e[h][j] = vexp_below<BF>(e[h][j], under), store(f + j * VL, e[h][j]);
      }
      for (int j = 0; BF && j < n; j++) store(packed + j * VL, pair_bf16(e[0][j], e[1][j]));
      packed += np;
    }
  }

  void run(int t0, int n, const float* before) {
    const auto mark = scratch().mark();
    const bool done = chunk(t0, n, before);
    scratch().release(mark);
    if (done) return;
    const int h = (n + 1) / 2;
    const Span a(s, t0, h, rows.count);
    const float* middle = keys(a, rows.keys(P::take(a.np * s.dp), a.start, a.lowest, a.n, a.np), before).scale;
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
    float *dL = P::take(s.mp * np), *later = P::take(s.mp);
    const auto* mine = kept.of(a.t0, a.n);
    if (mine && !mine->made) mine = nullptr;
    const Keys keys = mine ? Keys{mine->keys, P::r(mine->keys, np, s.mp, np), mine->scale} : this->keys(a, K, before);
    float* const F = keys.F;
    struct Head { Queries q; float *lse, *delta; const float* DO; };
    std::vector<Head> heads;
    for (int r = 0; r < s.R; r++) {
      heads.push_back({{}, P::take(np), P::take(np), nullptr});
      Head& h = heads.back();
      h.DO = cotangents(rows, sh, r, a.t0, a.n, np, P::take(np * s.dvp), h.lse, h.delta);
      h.q = mine ? found(mine->queries + r * kept.head, np, h.delta) : empty(np);
      if (!mine && !queries(r, a.t0, a.n, np, keys.scale, h.delta, h.q)) return false;
    }
    to_unit(keys.scale);
    const Rhs vt = P::turned(V, np, s.dvp), u = P::r(sums.values, s.ldv, s.mp, s.dvp);
    gemm<BF>(s.mp, np, s.dvp, P::l(sums.values, s.ldv, s.mp, s.dvp), vt.p, vt.ld, dL, np, false);
    memcpy(later, sums.total, s.mp * sizeof(float));
    gemm<BF>(np, s.dvp, s.mp, BF ? turned_left(keys.right.p, np) : Lhs{F, 1, np}, u.p, u.ld, dV, s.dvp, true);
    float *A = P::take(np * np), *B = P::take(np * np);
    for (const Head& h : heads) {
      const auto mark = scratch().mark();
      const Rhs grad = P::rows(h.DO, np, s.dvp);
      gemm<BF>(np, np, s.mp, transposed_left(h.q, np), keys.right.p, keys.right.ld, A, np, false, {.out_hi = 0});
      gemm<BF>(np, np, s.dvp, left<BF>(h.DO, s.dvp), vt.p, vt.ld, B, np, false, {.out_hi = 0});
      zero_above_diagonal(A, np, nullptr);
      zero_above_diagonal(B, np, h.delta);
      gemm<BF>(np, s.dvp, np, P::lt(A, np, np, np), grad.p, grad.ld, dV, s.dvp, true, {.k_lo = 0});
      const Rhs b = P::r(B, np, np, np);
      gemm<BF>(s.mp, np, np, h.q.features, b.p, b.ld, dL, np, true, {.k_after = 0});
      add_queries(h.q, np, grad);
      scratch().release(mark);
    }
    log_gradients(a, K, F, dL, later, dX);
    kmap.backwards(P::lt(F, np, np, kmap.own), np, dX);
    if (!c.dwk) return true;
    const Rhs k = P::rows(K, np, s.dp);
    gemm<BF>(kmap.own, s.dp, np, P::l(F, np, kmap.own, np), k.p, k.ld, dw.k.data(), s.dp, true);
    return true;
  }

  // F: the gradient of the log-features, F ⊙ (dL - later), and -Σ_i of it times y; of a folded map what reaches P through y joins.
  void log_gradients(const Span& a, const float* K, float* F, const float* dL, const float* later, float* dX) {
    const int np = a.np, mp = s.mp, mr = s.mr, dp = s.dp;
    float *const off = dw.offk.data(), *const total = P::take(np);
    alignas(64) float part[VL * VL];
    vf sum[CHUNK / VL];
    for (int j = 0; j < np; j += VL) sum[j / VL] = all(0);
    for (int i = 0; i < mr; i++) {
      float* f = F + (size_t)i * np;
      const float* given = dL + (size_t)i * np;
      vf along = all(0);
      if (i < mp)
        for (int j = 0; j < np; j += VL) {
          const vf g = load(f + j) * (load(given + j) - all(later[i]));
          store(f + j, g), sum[j / VL] += g, along += g;
        }
      else
        for (int j = 0; j < np; j += VL) {
          const vf g = load(f + j) * (all(0) - sum[j / VL]);
          store(f + j, g), along += g;
        }
      store(part + i % VL * VL, along);
      if (i % VL == VL - 1) store(off + i + 1 - VL, load(off + i + 1 - VL) - across(part, Add()));
    }
    if (!kmap.linear) return;
    for (int j = 0; j < np; j += VL) store(total + j, sum[j / VL]);
    for (int i = 0; i < s.d; i++)
      for (int j = 0; j < np; j += VL) {
        float* f = F + (size_t)i * np + j;
        store(f, fma(all(kmap.inverse[i]), load(f + (size_t)mp * np), load(f)));
      }
    float* const lin = dw.link.data();
    const float *const linear = kmap.linear, *k = K;
    for (int j = 0; j < np; j++, dX += dp, k += dp / rows.EACH)
      for (int i = 0; i < dp; i += VL) {
        store(dX + i, fma(all(total[j]), load(linear + i), load(dX + i)));
        store(lin + i, fma(all(total[j]), load_as<BF>(k, i), load(lin + i)));
      }
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
