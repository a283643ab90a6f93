// Gradients by recomputation. In the order of the tokens those of the queries, in the reverse order those of keys and
// values; a chunk whose weights would overflow is cut as in the forward pass.
//
// With a_tj the attention weights, δ_t = do_t·o_t and W_tj = do_t·v_j - δ_t:
//   dℓq_ti = Σ_j e^{ℓq_ti + ℓk_ji - lse_t} W_tj,   dℓk_ji = Σ_t e^{ℓq_ti + ℓk_ji - lse_t} W_tj,   dv_j = Σ_t a_tj do_t.
// The reverse pass carries Σ_t e^{ℓq_ti - lse_t} (do_t, δ_t) over later queries in units of e^{-scale_i}, scale the
// running maximum of the keys seen so far: later queries see all of them, so every factor is at most 1.
#pragma once
#include "forward.h"
#include "key_pass.h"
#include "query_pass.h"

// The sums of queries after the last token, which are gradients of the sums of keys, at the unit of these.
static void last_sums(const Call& c, const Dims& s, long pair, Sums now) {
  now.clear(s);
  for (int k = 0; k < s.m; k++) {
    now.scale[k] = c.scale_out[pair * s.m + k];
    if (!c.grad_values) continue;
    load_row(now.values + (size_t)k * s.ldv, c.grad_values, (pair * s.m + k) * s.dv, s.dv, s.dvp, false);
    now.total[k] = -c.grad_total[pair * s.m + k];
  }
}

// The sums of later queries for each segment of the pairs that were cut, at the unit of the chunk after its end.
template <bool BF> static std::vector<std::vector<float>> scan_back(Shared& sh, const std::vector<Task>& tasks) {
  const Call& c = sh.c;
  const Dims& s = sh.s;
  std::vector<std::vector<float>> after(tasks.size());
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
        Kept<BF> nothing(s, 0);
        KeyPass<BF> w(sh, nothing, units[u].task.b, units[u].task.g, slot);
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
    if (tasks[i].segments == 1) continue;
    after[i].resize(Sums::size(s));
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
    last_sums(c, s, tasks[i].pair(c), now);
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
  const Rows<false> rows(c, s, tasks[first].b, tasks[first].g);
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

template <bool BF>
static void query_pass(Shared& sh, Kept<BF>& kept, const Task& t, int slot, float* sinks, const std::vector<float>& before) {
  const Dims& s = sh.s;
  QueryPass<BF> pass(sh, kept, t.b, t.g, slot, sinks);
  pass.sums.begin(sh.c, s, pass.rows.pair, before);
  for (int at = t.begin; at < t.end; at += CHUNK) {
    memcpy(sh.scale(pass.rows.pair, at), pass.sums.scale, s.mp * sizeof(float));
    pass.run(at, std::min(CHUNK, t.end - at));
  }
}

template <bool BF> static void key_pass(Shared& sh, Kept<BF>& kept, const Task& t, int slot, const std::vector<float>& after) {
  const Call& c = sh.c;
  const Dims& s = sh.s;
  KeyPass<BF> pass(sh, kept, t.b, t.g, slot);
  const long pair = pass.rows.pair;
  if (after.empty()) last_sums(c, s, pair, pass.sums);
  else memcpy(pass.sums.values, after.data(), Sums::size(s) * sizeof(float));
  if (t.segment + 1 == t.segments)  // the last keys are in windows only
    for (int at = t.end; at < t.end + s.W; at += CHUNK) pass.run(at, std::min(CHUNK, t.end + s.W - at), nullptr);
  for (int at = t.begin + (t.end - t.begin - 1) / CHUNK * CHUNK; at >= t.begin && t.end > t.begin; at -= CHUNK)
    pass.run(at, std::min(CHUNK, t.end - at), sh.scale(pair, at));
  if (t.segment || !c.dvalues) return;
  std::vector<float> start(s.mp, 0.0f);
  std::copy(c.scale + pair * s.m, c.scale + (pair + 1) * s.m, start.begin());
  pass.to_unit(start.data());
  for (int k = 0; k < s.m; k++) {
    store_row(c.dvalues, (pair * s.m + k) * s.dv, pass.sums.values + (size_t)k * s.ldv, s.dv, false);
    c.dtotal[pair * s.m + k] = -pass.sums.total[k];
  }
}

// Numbers that kept features and what grows with the length may take together, so that a call's memory is bounded: 9 MB.
constexpr size_t ROOM = 9 << 18;

template <bool BF> static void backward(const Call& c) {
  int slots;
  const size_t rows = c.B * c.G * c.L * (c.bf16 ? 2 : 4);
  huge_pages(c.dq, rows * c.R * c.d), huge_pages(c.dk, rows * c.d), huge_pages(c.dvalue, rows * c.dv);
  const auto tasks = plan(c, slots);
  Shared sh(c, tasks.size(), std::max<int>(slots, c.threads));
  const auto before = scan<BF>(c, tasks);
  const size_t growing = c.B * c.G * c.R * c.L + slots * sh.pair_size(), room = growing < ROOM ? (ROOM - growing) / slots : 0;
  // Both passes of a whole pair follow each other; those of one that was cut wait for all of its segments.
  std::vector<std::vector<float>> cut;
  for (const Task& t : tasks)
    if (t.segments > 1 && !t.segment) cut.emplace_back(sh.pair_size()), sh.place(t.pair(c), cut.back().data());
  parallel(c.parallel, slots, [&](int slot) {
    for (size_t i = slot; i < tasks.size(); i += slots) {
      const Task& t = tasks[i];
      scratch().reset();
      const bool whole = t.segments == 1;
      Kept<BF> kept(sh.s, whole ? t.end : 0, room);
      if (whole) {
        float* const memory = scratch().lasting(kept.size() + sh.pair_size());
        kept.place(memory), sh.place(t.pair(c), memory + kept.size());
      }
      query_pass(sh, kept, t, slot, sh.sinks[i].data(), before[i]);
      if (!whole) continue;
      scratch().reset();
      key_pass(sh, kept, t, slot, {});
    }
  });
  const auto after = scan_back<BF>(sh, tasks);
  parallel(c.parallel, slots, [&](int slot) {
    for (size_t i = slot; i < tasks.size(); i += slots) {
      if (tasks[i].segments == 1) continue;
      scratch().reset();
      Kept<BF> nothing(sh.s, 0);
      key_pass(sh, nothing, tasks[i], slot, after[i]);
    }
  });
  if (c.dwq) finish_weights(sh);
  for (size_t i = 0; i < tasks.size(); i++) if (!tasks[i].segment) finish_rows(sh, tasks, i);
}
