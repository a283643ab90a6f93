// Outputs in the order of the tokens. One `Walker` owns the running sums of one (batch row, kv head) pair.
#pragma once
#include "walker.h"

template <bool BF> struct Forward : Walker<BF> {
  using Base = Walker<BF>;
  using Base::c, Base::s, Base::rows, Base::sums, Base::K, Base::V, Base::FK, Base::VB, Base::EKB, Base::SB;
  Map<BF> qmap;
  float *Q, *F, *FA, *half_q, *SC, *SCA, *O, *NK, *NV_, *NKT, *NVB, *NL, *NLA, *SKT, *SVB, *SL, *SLA, *shift;
  float *top, *parts;  // of each row: the largest log-weight, and vectors whose sum is the normaliser
  Rhs sink_keys, sink_values;

  Forward(const Call& call, int b, int g)
      : Base(call, b, g), qmap(Base::both(c) ? this->kmap : Map<BF>(c, s, c.wq, c.offq, c.foldq, g, false, true)) {
    auto take = [](size_t n) { return scratch().take(n); };
    Q = take(CHUNK * s.dp), F = take(CHUNK * s.mr), FA = take(CHUNK * s.mp);
    half_q = take(CHUNK), SC = take(CHUNK * CHUNK), SCA = take(CHUNK * CHUNK), O = take(CHUNK * s.dvp);
    top = take(CHUNK), parts = take(CHUNK * VL), shift = take(s.mp);
    const size_t most = s.W ? CHUNK + std::min<int64_t>(s.W, c.L + s.W) + 32 : 0;
    NK = take(most * s.dp), NV_ = take(most * s.dvp), NKT = take(most * (s.dp + 16)), NVB = take(most * s.dvp);
    NL = take(most * CHUNK), NLA = take(most * CHUNK);
    SKT = take(s.sp * (s.dp + 16)), SVB = take(s.sp * s.dvp), SL = take(CHUNK * s.sp), SLA = take(CHUNK * s.sp);
    if (s.S) {
      float *sk = take(s.sp * s.dp), *sv = take(s.sp * s.dvp);
      rows.sinks(sk, sv);
      finite(sk, s.sp * s.dp), finite(sv, s.sp * s.dvp);
      sink_keys = transposed<BF>(sk, s.sp, s.dp, SKT);
      sink_values = right<BF>(sv, s.sp, s.dvp, SVB);
    }
  }

  void run(int t0, int n) {
    if (chunk(t0, n)) return;
    __atomic_fetch_add(c.splits, 1, __ATOMIC_RELAXED);
    this->restore();
    run(t0, (n + 1) / 2);
    run(t0 + (n + 1) / 2, n / 2);
  }

  // Looks at n numbers of rows as they were read.
  void finite(const float* x, size_t n) const {
    if (BF) watch_packed(c, x, n / 2);
    else watch(c, x, n);
  }

  // False: a row saw nothing of the chunk's maximum, the sums must be restored and the chunk cut.
  bool chunk(int t0, int n) {
    const Span a(s, t0, n, rows.count);
    this->moved.clear();
    rows.ahead(t0 + CHUNK);
    const bool far = s.m && (a.has_far() || sums.stored(s));
    Rhs near_keys{}, near_values{}, far_values{}, far_features{}, state{};
    const bool shared = a.near && a.base == a.start;
    const float *keys = nullptr, *values = nullptr;
    if (a.near) {
      keys = rows.keys(NK, a.base, a.lowest, a.cols, a.ncp), values = rows.values(NV_, a.base, a.lowest, a.cols, a.ncp);
      finite(keys, a.ncp * s.dp), finite(values, a.ncp * s.dvp);
      near_keys = transposed<BF>(keys, a.ncp, s.dp, NKT);
      near_values = right<BF>(values, a.ncp, s.dvp, NVB);
    }
    if (far) {
      if (!shared) {
        keys = rows.keys(K, a.start, a.lowest, a.n, a.np), values = rows.values(V, a.start, a.lowest, a.n, a.np);
        finite(keys, a.np * s.dp), finite(values, a.np * s.dvp);
      }
      this->far_keys(a, keys, true);
      far_values = shared ? near_values : right<BF>(values, a.np, s.dvp, VB);
      far_features = {BF ? EKB : FK, a.np};
      state = rhs<BF>(sums.values, s.ldv, s.mp, s.dvp, SB);
      for (int i = 0; i < s.mp; i += VL) store(shift + i, load(sums.scale + i) - load(qmap.off + i));
    }
    for (int r = 0; r < s.R; r++) {
      const float* queries = rows.queries(Q, r, t0, n, a.np);
      finite(queries, a.np * s.dp);
      const Lhs q = left<BF>(queries, s.dp);
      logits(a, q, far, near_keys);
      weights(a, far);
      if (far) {
        const Lhs e = BF ? Lhs{FA, s.mp / 2, 1} : Lhs{F, s.mr, 1};
        gemm<BF>(a.np, a.np, s.mp, e, far_features.p, far_features.ld, SC, a.np, false, {.out_hi = 0});
        below_diagonal(a.np);
        gemm<BF>(a.np, s.dvp, s.mp, e, state.p, state.ld, O, s.dvp, false);
        gemm<BF>(a.np, s.dvp, a.np, BF ? Lhs{SCA, a.np / 2, 1} : Lhs{SC, a.np, 1}, far_values.p, far_values.ld, O, s.dvp, true, {.k_hi = 0});
      }
      if (a.near) {
        const int lo = a.start - a.base;
        gemm<BF>(a.np, s.dvp, a.ncp, BF ? Lhs{NLA, a.ncp / 2, 1} : Lhs{NL, a.ncp, 1}, near_values.p, near_values.ld, O, s.dvp, far,
                 {.k_lo = lo + 1, .k_hi = lo + s.W});
      }
      if (s.S)
        gemm<BF>(a.np, s.dvp, s.sp, lhs<BF>(SL, s.sp, a.np, s.sp, SLA), sink_values.p, sink_values.ld, O, s.dvp, far || a.near);
      if (!finish(a, r)) return false;
    }
    if (far && a.has_far()) this->absorb(a, far_values);
    return true;
  }

  // The chunk's own far keys: 0 above the diagonal, their sums join the normalisers.
  void below_diagonal(int np) {
    float *x = SC, *const sums = parts;
    uint16_t* packed = (uint16_t*)SCA;
    for (int t = 0; t < np; t++, x += np, packed += np) {
      const int last = t / VL * VL;
      vf sum = load(sums + t * VL);
      auto keep = [&](int j, vf w) {
        sum += w;
        if (BF) to_bf16(packed + j, w);
      };
      for (int j = 0; j < last; j += VL) keep(j, load(x + j));
      const vf w = first_of(load(x + last), t - last + 1);
      keep(last, w);
      if (!BF) store(x + last, w);
      store(sums + t * VL, sum);
    }
  }

  // Log-weights of all parts and their maximum per row.
  void logits(const Span& a, Lhs q, bool far, Rhs near_keys) {
    const int np = a.np;
    for (int t = 0; t < np; t += VL) store(top + t, all(LOG_ZERO));
    if (a.near) {
      const int lo = a.start - a.base;
      gemm<BF>(np, a.ncp, s.dp, q, near_keys.p, near_keys.ld, NL, a.ncp, false, {.out_lo = lo + 1, .out_hi = lo + s.W});
      for (int t = 0; t < np; t++) top[t] = band_logits(NL + (size_t)t * a.ncp, t & ~(ROWS<BF> - 1), a, first(a, t), last(a, t));
    }
    if (s.S) {
      gemm<BF>(np, s.sp, s.dp, q, sink_keys.p, sink_keys.ld, SL, s.sp, false);
      for (int t = 0; t < np; t++)
        for (int j = 0; j < sinks_seen(a, t); j++)
          SL[t * s.sp + j] *= (float)c.scaling, top[t] = std::max(top[t], SL[t * s.sp + j]);
    }
    if (!far) return;
    qmap.template tokens<false>(q, np, F, half_q);
    const int mp = s.mp, mr = s.mr;
    const float *f = F, *const add = shift;
    float *const highest = top, *const below = half_q;
    alignas(64) float part[VL * VL];
    for (int t = 0; t < np; t += VL) {
      for (int u = 0; u < VL; u++, f += mr) {
        vf high = load(f) + load(add);
        for (int i = VL; i < mp; i += VL) high = vmax(high, load(f + i) + load(add + i));
        store(part + u * VL, high);
      }
      const vf half = load(below + t), most = vmax(load(highest + t), across(part, Most()) - half);
      store(highest + t, most);
      store(below + t, half + most);  // what is subtracted of a row's features
    }
  }
  // The window's columns of row t.
  int first(const Span& a, int t) const { return std::max({0, t + 1 + a.start - a.base, a.lowest - a.base}); }
  int last(const Span& a, int t) const { return t < a.n ? t + s.W + a.start - a.base : -1; }
  int sinks_seen(const Span& a, int t) const {
    return t < a.n ? (int)std::min<int64_t>(s.S, rows.count + a.t0 + t + 1) : 0;
  }

  // Exponentials below the maximum; the normaliser's parts but for the chunk's own far keys.
  void weights(const Span& a, bool far) {
    const int np = a.np, mp = s.mp, mr = s.mr;
    float *f = F, *const to = parts;
    uint16_t* packed = (uint16_t*)FA;
    const float *const total = sums.total, *const add = shift, *const below = half_q;
    for (int t = 0; t < np; t++, f += mr, packed += mp) {
      vf sum = all(0);
      if (far) {
        const vf high = level<BF>(all(below[t]));
        for (int i = 0; i < mp; i += VL) {
          const vf e = vexp_below<BF>(load(f + i) + load(add + i), high);
          if (BF) to_bf16(packed + i, e);
          else store(f + i, e);
          sum = fma(e, load(total + i), sum);
        }
      }
      if (a.near) sum += band_exp(NL + (size_t)t * a.ncp, NLA + (size_t)t * a.ncp / 2, t & ~(ROWS<BF> - 1), a, all(top[t]));
      store(to + t * VL, sum);
    }
    for (int t = 0; s.S && t < np; t++)
      for (int j = 0, seen = sinks_seen(a, t); j < s.sp; j++) {
        float* x = SL + t * s.sp + j;
        *x = j < seen ? std::exp(*x - top[t]) : 0;
        to[t * VL] += *x;
      }
  }
  // The columns that gemm computed for the rows of a tile.
  int from(const Span& a, int tile) const { return down(tile + a.start - a.base + 1); }
  int to(const Span& a, int tile) const { return std::min(a.ncp, up(tile + ROWS<BF> + a.start - a.base + s.W)); }
  // Scales the columns first … last and masks the tile's others; returns the maximum.
  float band_logits(float* x, int tile, const Span& a, int first, int last) const {
    const int lo = from(a, tile), end = to(a, tile);
    // A tile may have no columns at all: its band can end before the first key that is not a sink.
    for (int j = lo; j < std::min(first, end); j++) x[j] = LOG_ZERO;
    for (int j = std::max(lo, last + 1); j < end; j++) x[j] = LOG_ZERO;
    vf high = all(LOG_ZERO);
    for (int j = lo; j < end; j += VL) {
      const vf l = load(x + j) * all((float)c.scaling);
      store(x + j, l);
      high = vmax(high, l);
    }
    return last < 0 ? LOG_ZERO : hmax(high);
  }
  vf band_exp(float* x, float* packed, int tile, const Span& a, vf high) const {
    vf sum = all(0);
    for (int j = from(a, tile), end = to(a, tile); j < end; j += VL) {
      const vf e = vexp<BF>(load(x + j) - high);
      if (BF) to_bf16((uint16_t*)packed + j, e);
      else store(x + j, e);
      sum += e;
    }
    return sum;
  }

  bool finish(const Span& a, int r) {
    alignas(64) float inverse[CHUNK], lse[CHUNK];
    const long first = rows.head(r) + a.t0;
    bool seen = true;
    for (int t = 0; t < a.np; t += VL) {
      const vf norm = across(parts + t * VL, Add());
      store(lse + t, load(top + t) + vlog(norm));
      store(inverse + t, norm);
    }
    for (int t = 0; t < a.n; t++) {
      const float norm = inverse[t];
      seen &= !(norm < 1e-18f);
      if (!(norm > 0)) lse[t] = LOG_ZERO;
      inverse[t] = norm > 0 ? 1 / norm : 1;
    }
    if (!seen && a.n > 1) return false;
    memcpy(c.lse + first, lse, a.n * sizeof(float));
    const int width = s.dv, padded = s.dvp;
    const bool bf16 = c.bf16;
    float* o = O;
    vf zero = all(0);  // stays 0 if all numbers are finite
    for (int t = 0; t < a.n; t++, o += padded) {
      for (int j = 0; j < padded; j += VL) {
        const vf x = load(o + j) * all(inverse[t]);
        zero = fma(x, all(0), zero);
        store(o + j, x);
      }
      store_row(c.out, (first + t) * width, o, width, bf16);
    }
    if (hsum(zero) != 0) tell(c);
    return true;
  }
};

// The sums before each segment of every pair that was cut: entry (task) of `before`, empty for whole pairs.
template <bool BF> static std::vector<std::vector<float>> scan(const Call& c, const std::vector<Task>& tasks) {
  const Dims s(c);
  std::vector<std::vector<float>> before(tasks.size());
  struct Unit { Task task; int of; std::vector<float> sums; };
  std::vector<Unit> units;
  for (size_t i = 0; i < tasks.size(); i++)
    if (s.m && tasks[i].segment + 1 < tasks[i].segments) {
      const int parts = std::min<int>(c.threads, (tasks[i].end - tasks[i].begin + CHUNK - 1) / CHUNK);
      const int chunks = (tasks[i].end - tasks[i].begin) / CHUNK;
      for (int p = 0; p < parts; p++) {
        Task t = tasks[i];
        t.end = t.begin + chunks * (p + 1) / parts * CHUNK;
        t.begin += chunks * p / parts * CHUNK;
        units.push_back({t, (int)i, std::vector<float>(Sums::size(s))});
      }
    }
  if (!units.empty())
    parallel(c.parallel, std::min<int>(c.threads, units.size()), [&](int slot) {
      for (size_t u = slot; u < units.size(); u += std::min<size_t>(c.threads, units.size())) {
        scratch().reset();
        Walker<BF> w(c, units[u].task.b, units[u].task.g);
        w.sums.clear(s);
        w.sums_of(units[u].task.begin, units[u].task.end);
        memcpy(units[u].sums.data(), w.sums.values, Sums::size(s) * sizeof(float));
      }
    });
  size_t u = 0;
  for (size_t i = 0; i < tasks.size(); i++) {
    if (tasks[i].segments == 1 || !s.m) continue;
    before[i].resize(Sums::size(s));
    Sums now(before[i].data(), s);
    if (tasks[i].segment == 0) now.read(c, s, tasks[i].pair(c));
    else {
      memcpy(before[i].data(), before[i - 1].data(), Sums::size(s) * sizeof(float));
      for (; u < units.size() && units[u].of == (int)i - 1; u++) now.add(Sums(units[u].sums.data(), s), s);
    }
  }
  return before;
}

template <bool BF> static void forward(const Call& c) {
  int slots;
  huge_pages(c.out, c.B * c.G * c.R * c.L * c.dv * (c.bf16 ? 2 : 4));
  const auto tasks = plan(c, slots);
  const auto before = scan<BF>(c, tasks);
  parallel(c.parallel, slots, [&](int slot) {
    for (size_t i = slot; i < tasks.size(); i += slots) {
      const Task& t = tasks[i];
      scratch().reset();
      Forward<BF> f(c, t.b, t.g);
      const long pair = t.pair(c);
      f.sums.begin(c, f.s, pair, before[i]);
      for (int at = t.begin; at < t.end; at += CHUNK) f.run(at, std::min(CHUNK, t.end - at));
      if (t.segment + 1 < t.segments) continue;
      f.sums.write(c, f.s, pair);
      const size_t width = f.s.dv * (c.bf16 ? 2 : 4);  // padding tokens
      for (int r = 0; r < f.s.R; r++)
        for (int at = f.rows.length; at < c.L; at++) {
          memset((char*)c.out + (f.rows.head(r) + at) * width, 0, width);
          c.lse[f.rows.head(r) + at] = LOG_ZERO;
        }
    }
  });
}
