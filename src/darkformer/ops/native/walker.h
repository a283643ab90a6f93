// What both directions share: the running sums, the rows of one (batch row, kv head) pair, and the walk along its keys.
#pragma once
#include "common.h"

// The sums over far keys, feature i scaled by e^-scale[i]: values (mp×dvp, rows ldv apart), total (mp), scale (mp).
struct Sums {
  float *values, *total, *scale;
  static size_t size(const Dims& s) { return (size_t)s.mp * s.ldv + 2 * s.mp; }
  Sums(float* p, const Dims& s) : values(p), total(p + (size_t)s.mp * s.ldv), scale(total + s.mp) {}
  void clear(const Dims& s) {
    std::fill(values, scale, 0.0f);
    for (int i = 0; i < s.mp; i++) scale[i] = i < s.m ? LOG_ZERO : 0;  // a padding feature never has weight
  }
  void read(const Call& c, const Dims& s, long pair) {
    clear(s);
    if (!c.values) return;  // nothing seen yet
    for (int i = 0; i < s.m; i++) {
      load_row(values + (size_t)i * s.ldv, c.values, (pair * s.m + i) * s.dv, s.dv, s.dvp, false);
      total[i] = c.total[pair * s.m + i];
      scale[i] = c.scale[pair * s.m + i];
    }
    watch(c, values, (size_t)s.mp * s.ldv), watch(c, total, s.mp);
  }
  // What a task begins with: the sums that were found before it, else the state's.
  void begin(const Call& c, const Dims& s, long pair, const std::vector<float>& before) {
    if (before.empty()) read(c, s, pair);
    else memcpy(values, before.data(), size(s) * sizeof(float));
  }
  void write(const Call& c, const Dims& s, long pair) const {
    for (int i = 0; i < s.m; i++) {
      c.scale_out[pair * s.m + i] = scale[i];
      if (!c.values_out) continue;  // not wanted
      store_row(c.values_out, (pair * s.m + i) * s.dv, values + (size_t)i * s.ldv, s.dv, false);
      c.total_out[pair * s.m + i] = total[i];
    }
  }
  bool stored(const Dims& s) const {
    for (int i = 0; i < s.m; i++) if (scale[i] > LOG_ZERO / 2) return true;
    return false;
  }
  void add(const Sums& other, const Dims& s) {
    for (int i = 0; i < s.m; i++) {
      const float top = std::max(scale[i], other.scale[i]);
      const float mine = std::exp(scale[i] - top), theirs = std::exp(other.scale[i] - top);
      for (int j = 0; j < s.dvp; j++)
        values[(size_t)i * s.ldv + j] = mine * values[(size_t)i * s.ldv + j] + theirs * other.values[(size_t)i * s.ldv + j];
      total[i] = mine * total[i] + theirs * other.total[i];
      scale[i] = top;
    }
  }
};

// Rows of one (batch row, kv head) pair as a pass reads them: float32, or bfloat16 as it comes, two numbers in a unit. Keys by
// their index relative to the first new token.
template <bool BF> struct Rows {
  static constexpr int EACH = BF ? 2 : 1;  // numbers in a unit
  const Call& c;
  const Dims& s;
  const int b, g, length;
  const int64_t count;
  const long pair;
  Rows(const Call& c, const Dims& s, int b, int g)
      : c(c), s(s), b(b), g(g), length(c.lengths[b]), count(c.count[b]), pair((long)b * c.G + g) {}
  static void none(float* to, int np) { memset(to, 0, np / EACH * sizeof(float)); }
  void read(float* to, const void* x, long at, int n, int np) const {
    if (!BF) return load_row(to, x, at, n, np, c.bf16);
    memcpy(to, (const uint16_t*)x + at, n * 2);
    if (np > n) memset((uint16_t*)to + n, 0, (np - n) * 2);
  }
  // n rows (up to np with zeros) of keys, values, queries: where they lie if that is how a pass reads them, else copied to `to`.
  const float* keys(float* to, int from, int lowest, int n, int np) const {
    return some(to, c.k, c.ks, c.recent_k, from, lowest, n, np, s.d, s.dp);
  }
  const float* values(float* to, int from, int lowest, int n, int np) const {
    return some(to, c.v, c.vs, c.recent_v, from, lowest, n, np, s.dv, s.dvp);
  }
  const float* queries(float* to, int r, int t0, int n, int np) const {
    const int64_t strides[3] = {c.qs[0], c.qs[1], c.qs[3]};
    return some(to, (const char*)c.q + r * c.qs[2] * (c.bf16 ? 2 : 4), strides, nullptr, t0, 0, n, np, s.d, s.dp);
  }
  const float* some(float* to, const void* x, const int64_t* stride, const void* recent, int from, int lowest, int n, int np, int width,
                    int padded) const {
    const long first = b * stride[0] + g * stride[1], step = stride[2];
    // Whole vectors of units: nothing may read behind the last row.
    const bool plain = BF == bool(c.bf16) && step == width && width % (16 * EACH) == 0;
    if (plain && n == np && from >= std::max(0, lowest) && from + n <= length)
      return (const float*)((const char*)x + (first + from * step) * (BF ? 2 : 4));
    float* row = to;
    for (int i = 0, at = from; i < np; i++, at++, row += padded / EACH) {
      if (i >= n || at < lowest || at >= length) none(row, padded);
      else if (at >= 0) read(row, x, first + at * step, width, padded);
      else read(row, recent, ((pair + 1) * s.W + at) * width, width, padded);
    }
    return to;
  }
  void sinks(float* K, float* V) const {
    for (int i = 0; i < s.sp; i++) {
      const bool real = i < s.S && i < count + length;
      sink(K + (size_t)i * s.dp / EACH, c.k, c.ks, c.sink_k, i, real, s.d, s.dp);
      sink(V + (size_t)i * s.dvp / EACH, c.v, c.vs, c.sink_v, i, real, s.dv, s.dvp);
    }
  }
  void sink(float* to, const void* x, const int64_t* stride, const void* old, int i, bool real, int n, int np) const {
    if (!real) none(to, np);
    else if (i < count) read(to, old, (pair * s.S + i) * n, n, np);
    else read(to, x, b * stride[0] + g * stride[1] + (i - count) * stride[2], n, np);
  }
  // Asks for the rows of the chunk that begins at token t0, so that they are in the cache when their turn comes.
  void ahead(int t0, bool gradients = false) const {
    const int n = std::min(CHUNK, length - t0), size = c.bf16 ? 2 : 4;
    if (t0 < 0) return;
    auto ask = [&](const void* x, long at, long stride, int width) {
      for (int i = 0; i < n; i++)
        for (int j = 0; j < width * size; j += 64) _mm_prefetch((const char*)x + (at + i * stride) * size + j, _MM_HINT_T1);
    };
    ask(c.k, b * c.ks[0] + g * c.ks[1] + t0 * c.ks[2], c.ks[2], s.d);
    ask(c.v, b * c.vs[0] + g * c.vs[1] + t0 * c.vs[2], c.vs[2], s.dv);
    for (int r = 0; r < s.R; r++) {
      ask(c.q, b * c.qs[0] + g * c.qs[1] + r * c.qs[2] + t0 * c.qs[3], c.qs[3], s.d);
      if (gradients) ask(c.grad_out, (head(r) + t0) * s.dv, s.dv, s.dv);
    }
  }
  long head(int r) const { return (pair * c.R + r) * c.L; }  // of (B, G, R, L)
};

template <bool BF> struct Walker {
  const Call& c;
  const Dims s;
  const Rows<BF> rows;
  Sums sums;
  Map<BF> kmap;
  float *K, *V, *KT, *VB, *FK, *half, *EK, *EKB, *SB, *added, *saved, *saved_total, *saved_scale;
  std::vector<int> moved;

  // The paper's form has one map for both sides: it is made once.
  static bool both(const Call& c) { return c.wq == c.wk && c.offq == c.offk && c.foldq == c.foldk; }
  Walker(const Call& c, int b, int g, bool gradients = false)
      : c(c), s(c), rows(c, s, b, g), sums(scratch().take(Sums::size(s)), s),
        kmap(c, s, c.wk, c.offk, c.foldk, g, true, both(c), gradients && both(c)) {
    auto take = [](size_t n) { return scratch().take(n); };
    K = take(CHUNK * s.dp), V = take(CHUNK * s.dvp), KT = take((s.dp + 16) * CHUNK), VB = take(CHUNK * s.dvp);
    FK = take(s.mr * CHUNK), half = take(CHUNK), EK = take(s.mp * CHUNK), EKB = take(s.mp * CHUNK);
    SB = take((size_t)s.mp * s.dvp), added = take(s.mp);
    saved = take((size_t)s.mp * s.dvp), saved_total = take(s.mp), saved_scale = take(s.mp);
    moved.reserve(s.mp);
  }

  // Features of the far keys of a span below the running maximum, which they raise: FK (mp×np). The sums follow it.
  // With bfloat16 they are packed as left factor (EK), and where `both` as right factor (EKB); FK stays log-features then.
  // For gradients y stands behind them.
  void far_keys(const Span& a, const float* K, bool both = false, bool gradients = false) {
    const Rhs turned = transposed<BF>(K, a.np, s.dp, KT);
    if (gradients) kmap.template features<true>(turned, left<BF>(K, s.dp), a.np, FK, half);
    else kmap.template features<false>(turned, left<BF>(K, s.dp), a.np, FK, half);
    for (int j = 0; j < a.np; j++) if (j < a.far_from || j >= a.n) half[j] = MASKED;
    moved.clear();
    if (a.np == CHUNK) both ? exponentials<CHUNK / VL, true>(a.np) : exponentials<CHUNK / VL, false>(a.np);
    else both ? exponentials<0, true>(a.np) : exponentials<0, false>(a.np);
  }
  // N vectors in a row where that is known when this is compiled, else 0. Pointers on the stack, here and elsewhere: for all that
  // the compiler knows, a store of a vector may change a member.
  template <int N, bool BOTH> void exponentials(int np) {
    const int n = N ? N : np / VL, mp = s.mp;
    const float *const offsets = kmap.off, *const scales = sums.scale;
    float *const to = added, *turned = EKB;
    uint16_t* packed = (uint16_t*)EK;
    vf below[CHUNK / VL], e[2][CHUNK / VL];
    alignas(64) float part[VL * VL];
    for (int j = 0; j < n; j++) below[j] = load(half + j * VL);
    float* f = FK;
    for (int i = 0; i < mp; i += 2) {
      for (int h = 0; h < 2; h++, f += np) {
        const float off = offsets[i + h];
        vf top = all(-MASKED), sum = all(0);
        for (int j = 0; j < n; j++) e[h][j] = load(f + j * VL) - below[j], top = vmax(top, e[h][j]);
        if (any_above(top, all(scales[i + h] + off))) raise(i + h, hmax(top) - off);
        const vf scale = level<BF>(all(scales[i + h] + off));
        for (int j = 0; j < n; j++) e[h][j] = vexp_below<BF>(e[h][j], scale), sum += e[h][j];
        if (!BF || !BOTH)
          for (int j = 0; j < n; j++) store(f + j * VL, e[h][j]);
        for (int j = 0; BF && !BOTH && j < n; j++) to_bf16(packed + h * np + j * VL, e[h][j]);
        store(part + (i + h) % VL * VL, sum);
      }
      for (int j = 0; BF && BOTH && j < n; j++)
        store(turned + j * VL, pair_bf16(e[0][j], e[1][j], packed + j * VL, packed + np + j * VL));
      turned += np, packed += 2 * np;
      if (i % VL == VL - 2) store(to + i + 2 - VL, across(part, Add()));
    }
  }
  // The features of the last far keys as right factor with the keys as summands.
  Rhs features_turned(int np) const {
    if (!BF) return Pack<BF>::rt(FK, np, s.mp, np);
    float* to = scratch().take((size_t)up16(np / 2) * s.mp);
    transpose(EK, np / 2, s.mp, up16(np / 2), to, s.mp);  // what is behind np/2 is not used
    return {to, s.mp};
  }
  __attribute__((noinline)) void raise(int i, float high) {
    float* row = sums.values + (size_t)i * s.ldv;
    memcpy(saved + moved.size() * s.dvp, row, s.dvp * sizeof(float));
    saved_total[moved.size()] = sums.total[i], saved_scale[moved.size()] = sums.scale[i];
    moved.push_back(i);
    const float factor = std::exp(sums.scale[i] - high);
    for (int j = 0; j < s.dvp; j += VL) store(row + j, all(factor) * load(row + j));
    sums.total[i] *= factor, sums.scale[i] = high;
  }
  void restore() {
    for (size_t k = 0; k < moved.size(); k++) {
      const int i = moved[k];
      memcpy(sums.values + (size_t)i * s.ldv, saved + k * s.dvp, s.dvp * sizeof(float));
      sums.total[i] = saved_total[k], sums.scale[i] = saved_scale[k];
    }
  }
  // The far keys of the span enter the sums.
  void absorb(const Span& a, Rhs values) {
    for (int i = 0; i < s.mp; i++) sums.total[i] += added[i];
    gemm<BF>(s.mp, s.dvp, a.np, BF ? Lhs{EK, a.np / 2, 1} : Lhs{FK, a.np, 1}, values.p, values.ld, sums.values, s.ldv, true);
  }
  // Only the sums, over the far keys of the tokens [begin, end).
  void sums_of(int begin, int end) {
    for (int t = begin; t < end; t += CHUNK) {
      Span a(s, t, std::min(CHUNK, end - t), rows.count);
      if (!a.has_far() || !s.m) continue;
      far_keys(a, rows.keys(K, a.start, a.lowest, a.n, a.np));
      absorb(a, right<BF>(rows.values(V, a.start, a.lowest, a.n, a.np), a.np, s.dvp, VB));
    }
  }
};
