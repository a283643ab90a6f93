// The backward pass, by recomputation: a first pass in the order of the tokens for the gradients of the queries, a second one in
// the reverse order for those of keys and values. A chunk whose weights would overflow is split as in the forward pass.
//
// With p_tj the attention weights, delta_t = do_t·o_t and W_tj = do_t·v_j - delta_t:
//   dℓq_ti = Σ_j e^{ℓq_ti + ℓk_ji - lse_t} W_tj,   dℓk_ji = Σ_t e^{ℓq_ti + ℓk_ji - lse_t} W_tj,   dv_j = Σ_t p_tj do_t.
// The reverse pass carries Σ_t e^{ℓq_ti - lse_t} (do_t, delta_t) over later queries, scaled by e^{log_scale_i}, the running maximum
// of the keys seen so far: every later query sees those keys, so every factor is at most 1.
#pragma once
#include "forward.h"
#include "key_pass.h"
#include "query_pass.h"

// The gradient of the state after the last token, as the caller gives it.
static void read_grad_state(const Call& c, const Dims& s, long pair, State d_state) {
  d_state.clear(s);
  for (int i = 0; i < s.m; i++) {
    d_state.log_scale[i] = c.log_scale_out[pair * s.m + i];
    if (!c.d_feature_values_out) continue;
    load_row(d_state.values + (size_t)i * s.values_ld, c.d_feature_values_out, (pair * s.m + i) * s.d_v, s.d_v, s.dv_pad, false);
    d_state.sum[i] = -c.d_feature_sum_out[pair * s.m + i];
  }
}

// The gradient of the state after each segment of the pairs that were cut, at the log_scale of the chunk that follows. One entry a
// task.
template <bool BF16>
static std::vector<std::vector<float>> segment_grad_states(BackwardContext& ctx, const std::vector<Task>& tasks) {
  const Call& c = ctx.c;
  const Dims& s = ctx.s;
  std::vector<std::vector<float>> after(tasks.size());
  struct Part { Task task; int index; std::vector<float> d_state; };  // part of task `index`, and what its queries alone add
  std::vector<Part> parts;
  for (size_t i = 0; i < tasks.size(); i++)
    if (s.m && tasks[i].segment > 0) {
      const int chunks = (tasks[i].end - tasks[i].begin + CHUNK - 1) / CHUNK, count = std::min<int>(c.threads, chunks);
      for (int p = 0; p < count; p++) {
        Task t = tasks[i];
        t.begin = tasks[i].begin + chunks * p / count * CHUNK;
        t.end = std::min(tasks[i].end, tasks[i].begin + chunks * (p + 1) / count * CHUNK);
        parts.push_back({t, (int)i, std::vector<float>(State::size(s))});
      }
    }
  const int workers = std::min<int>(c.threads, parts.size());
  if (workers)
    parallel(c.omp_parallel, workers, [&](int worker) {
      for (size_t p = worker; p < parts.size(); p += workers) {
        scratch().reset();
        FeatureCache<BF16> no_cache(s, 0);
        KeyPass<BF16> pass(ctx, no_cache, parts[p].task.b, parts[p].task.g, worker);
        pass.d_state.clear(s);
        pass.accumulate(parts[p].task.begin, parts[p].task.end);
        memcpy(parts[p].d_state.data(), pass.d_state.values, State::size(s) * sizeof(float));
      }
    });
  // The later one's log_scale is never below the earlier one's.
  auto add_later = [&](State earlier, const State& later) {
    for (int i = 0; i < s.m; i++) {
      const float factor = std::exp(earlier.log_scale[i] - later.log_scale[i]);
      for (int j = 0; j < s.dv_pad; j++) earlier.values[(size_t)i * s.values_ld + j] += factor * later.values[(size_t)i * s.values_ld + j];
      earlier.sum[i] += factor * later.sum[i];
    }
  };
  size_t p = parts.size();
  for (size_t i = tasks.size(); i-- > 0;) {
    if (tasks[i].segments == 1) continue;
    after[i].resize(State::size(s));
    if (tasks[i].segment + 1 == tasks[i].segments) {
      read_grad_state(c, s, tasks[i].pair(c), State(after[i].data(), s));
      continue;
    }
    std::vector<float> later = after[i + 1];
    for (; p > 0 && parts[p - 1].index == (int)i + 1; p--) {
      std::vector<float> d_state = parts[p - 1].d_state;
      add_later(State(d_state.data(), s), State(later.data(), s));
      later = after[i] = d_state;
    }
  }
  return after;
}

// With a fold, the gradient of y's offset belongs to the fold, and the lengths of draws are no parameters.
static void write_fold_grads(BackwardContext& ctx) {
  const Call& c = ctx.c;
  const Dims& s = ctx.s;
  for (int g = 0; g < c.G; g++)
    for (int j = 0; j < s.d; j++) {
      const long inverse = g * 3L * s.d + j, offset = inverse + s.d, linear = inverse + 2 * s.d;
      const long norm_offset = g * (long)(s.m + s.r) + s.m + j;
      c.d_fold_q[inverse] = c.d_fold_k[inverse] = c.d_fold_q[linear] = c.d_fold_k[linear] = 0;
      c.d_fold_q[offset] = c.d_offset_q[norm_offset], c.d_fold_k[offset] = c.d_offset_k[norm_offset];
      c.d_offset_q[norm_offset] = c.d_offset_k[norm_offset] = 0;
      for (auto& worker : ctx.worker_map_grads) {
        const BackwardContext::MapGrads& w = worker[g];
        if (w.offset_q.empty()) continue;
        c.d_fold_q[linear] += w.linear_q[j], c.d_fold_k[linear] += w.linear_k[j];
      }
    }
}

static void write_map_grads(BackwardContext& ctx) {
  const Call& c = ctx.c;
  const Dims& s = ctx.s;
  const long rows = s.m + s.r;
  for (int g = 0; g < c.G; g++)
    for (int i = 0; i < rows; i++) {
      const int from = i < s.m ? i : s.m_pad + i - s.m;
      float *map_q = c.d_map_q + (g * rows + i) * s.d, *map_k = c.d_map_k + (g * rows + i) * s.d;
      std::fill(map_q, map_q + s.d, 0.0f), std::fill(map_k, map_k + s.d, 0.0f);
      c.d_offset_q[g * rows + i] = c.d_offset_k[g * rows + i] = 0;
      for (auto& worker : ctx.worker_map_grads) {
        const BackwardContext::MapGrads& w = worker[g];
        if (w.offset_q.empty()) continue;
        for (int j = 0; j < s.d; j++)
          map_q[j] += w.map_q[(size_t)j * s.map_rows + from], map_k[j] += w.map_k[(size_t)from * s.d_pad + j];
        c.d_offset_q[g * rows + i] += w.offset_q[from], c.d_offset_k[g * rows + i] += w.offset_k[from];
      }
      float zero = 0 * (c.d_offset_q[g * rows + i] + c.d_offset_k[g * rows + i]);  // stays 0 if all numbers are finite
      for (int j = 0; j < s.d; j++) zero += 0 * map_q[j] + 0 * map_k[j];
      if (zero != 0) set_non_finite(c);
    }
  if (c.fold_q) write_fold_grads(ctx);
}

// Of the pair whose first task is `first`: gradients of the sinks, which several segments add to, and zeros at padding.
static void write_sinks_and_padding(BackwardContext& ctx, const std::vector<Task>& tasks, size_t first) {
  const Call& c = ctx.c;
  const Dims& s = ctx.s;
  const RowReader<false> reader(c, s, tasks[first].b, tasks[first].g);
  std::vector<float> total(ctx.d_sinks[first]);
  for (int k = 1; k < tasks[first].segments; k++)
    for (size_t j = 0; j < total.size(); j++) total[j] += ctx.d_sinks[first + k][j];
  for (int i = 0; i < s.S; i++) {
    const bool stored = i < reader.count;  // in the state; the others are tokens of this call
    const long at = i - (long)reader.count;
    if (!stored && at >= reader.length) continue;
    const float *dk = total.data() + (size_t)i * s.d_pad, *dv = total.data() + (size_t)s.sinks_pad * s.d_pad + (size_t)i * s.dv_pad;
    const long row = stored ? reader.pair * s.S + i : reader.pair * c.L + at;
    store_row(stored ? c.d_sink_k : c.dk, row * s.d, dk, s.d, c.bf16);
    store_row(stored ? c.d_sink_v : c.dv, row * s.d_v, dv, s.d_v, c.bf16);
  }
  const size_t size = c.bf16 ? 2 : 4, pads = c.L - reader.length;
  memset((char*)c.dk + (reader.pair * c.L + reader.length) * s.d * size, 0, pads * s.d * size);
  memset((char*)c.dv + (reader.pair * c.L + reader.length) * s.d_v * size, 0, pads * s.d_v * size);
  for (int r = 0; r < s.R; r++) memset((char*)c.dq + (reader.head(r) + reader.length) * s.d * size, 0, pads * s.d * size);
}

template <bool BF16>
static void run_query_pass(BackwardContext& ctx, FeatureCache<BF16>& cache, const Task& t, int worker, float* d_sinks,
                           const std::vector<float>& before) {
  const Dims& s = ctx.s;
  QueryPass<BF16> pass(ctx, cache, t.b, t.g, worker, d_sinks);
  pass.state.start(ctx.c, s, t.pair(ctx.c), before);
  for (int at = t.begin; at < t.end; at += CHUNK) {
    memcpy(ctx.log_scale(t.pair(ctx.c), at), pass.state.log_scale, s.m_pad * sizeof(float));
    pass.run(at, std::min(CHUNK, t.end - at));
  }
}

// after: the gradient of the state after the task, empty for a whole pair.
template <bool BF16>
static void run_key_pass(BackwardContext& ctx, FeatureCache<BF16>& cache, const Task& t, int worker, const std::vector<float>& after) {
  const Call& c = ctx.c;
  const Dims& s = ctx.s;
  const long pair = t.pair(c);
  KeyPass<BF16> pass(ctx, cache, t.b, t.g, worker);
  if (after.empty()) read_grad_state(c, s, pair, pass.d_state);
  else memcpy(pass.d_state.values, after.data(), State::size(s) * sizeof(float));
  if (t.segment + 1 == t.segments)  // the last keys are in windows only
    for (int at = t.end; at < t.end + s.W; at += CHUNK) pass.run(at, std::min(CHUNK, t.end + s.W - at), nullptr);
  for (int at = t.begin + (t.end - t.begin - 1) / CHUNK * CHUNK; at >= t.begin && t.end > t.begin; at -= CHUNK)
    pass.run(at, std::min(CHUNK, t.end - at), ctx.log_scale(pair, at));
  if (t.segment || !c.d_feature_values) return;
  std::vector<float> log_scale(s.m_pad, 0.0f);
  std::copy(c.log_scale + pair * s.m, c.log_scale + (pair + 1) * s.m, log_scale.begin());
  pass.rescale_state(log_scale.data());
  for (int i = 0; i < s.m; i++) {
    store_row(c.d_feature_values, (pair * s.m + i) * s.d_v, pass.d_state.values + (size_t)i * s.values_ld, s.d_v, false);
    c.d_feature_sum[pair * s.m + i] = -pass.d_state.sum[i];
  }
}

// Floats (9 MB) for cached features together with what grows with the length, so that a call's memory is bounded.
constexpr size_t MAX_CACHED = 9 << 18;

template <bool BF16> static Status backward(const Call& c) {
  int workers;
  const size_t row_bytes = c.B * c.G * c.L * (c.bf16 ? 2 : 4);
  use_huge_pages(c.dq, row_bytes * c.R * c.d), use_huge_pages(c.dk, row_bytes * c.d), use_huge_pages(c.dv, row_bytes * c.d_v);
  const auto tasks = plan(c, workers);
  BackwardContext ctx(c, tasks.size(), std::max<int>(workers, c.threads));
  const auto before = segment_states<BF16>(c, tasks);
  const size_t growing = c.B * c.G * c.R * c.L + workers * ctx.pair_size();
  const size_t capacity = growing < MAX_CACHED ? (MAX_CACHED - growing) / workers : 0;
  // Both passes of a whole pair follow each other; those of one that was cut wait for all of its segments.
  std::vector<std::vector<float>> cut_pairs;
  for (const Task& t : tasks)
    if (t.segments > 1 && !t.segment) cut_pairs.emplace_back(ctx.pair_size()), ctx.place_pair(t.pair(c), cut_pairs.back().data());
  parallel(c.omp_parallel, workers, [&](int worker) {
    for (size_t i = worker; i < tasks.size(); i += workers) {
      const Task& t = tasks[i];
      scratch().reset();
      const bool whole = t.segments == 1;
      FeatureCache<BF16> cache(ctx.s, whole ? t.end : 0, capacity);
      if (whole) {
        float* const memory = scratch().take_persistent(cache.size() + ctx.pair_size());
        cache.place(memory), ctx.place_pair(t.pair(c), memory + cache.size());
      }
      run_query_pass(ctx, cache, t, worker, ctx.d_sinks[i].data(), before[i]);
      if (!whole) continue;
      scratch().reset();
      run_key_pass(ctx, cache, t, worker, {});
    }
  });
  const auto after = segment_grad_states<BF16>(ctx, tasks);
  parallel(c.omp_parallel, workers, [&](int worker) {
    for (size_t i = worker; i < tasks.size(); i += workers) {
      if (tasks[i].segments == 1) continue;
      scratch().reset();
      FeatureCache<BF16> no_cache(ctx.s, 0);
      run_key_pass(ctx, no_cache, tasks[i], worker, after[i]);
    }
  });
  if (c.d_map_q) write_map_grads(ctx);
  for (size_t i = 0; i < tasks.size(); i++) if (!tasks[i].segment) write_sinks_and_padding(ctx, tasks, i);
  return (Status)c.status;
}
