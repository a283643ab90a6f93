// One token for each batch row, updating the state in place, which lies in one piece or in slots of a pool. All arithmetic is
// float32: the products are of a matrix and a vector, so the time goes into reading maps and state once.
#pragma once
#include "rows.h"
#include "threads.h"

// Elements from `at` on of a tensor's memory: a vector, and a single number.
template <bool BF16> static inline Vec load_at(const void* p, long at) {
  return BF16 ? load_bf16((const uint16_t*)p + at) : load((const float*)p + at);
}
template <bool BF16> static inline float element_at(const void* p, long at) {
  if (!BF16) return ((const float*)p)[at];
  const uint32_t bits = (uint32_t)((const uint16_t*)p)[at] << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
template <bool BF16> static inline float dot(const float* x, const void* row, long at, int n) {
  Vec even = set1(0), odd = set1(0);
  int j = 0;
  for (; j + 2 * VL <= n; j += 2 * VL) {
    even = fma(load(x + j), load_at<BF16>(row, at + j), even);
    odd = fma(load(x + j + VL), load_at<BF16>(row, at + j + VL), odd);
  }
  for (; j + VL <= n; j += VL) even = fma(load(x + j), load_at<BF16>(row, at + j), even);
  float sum = reduce_add(even + odd);
  for (; j < n; j++) sum += x[j] * element_at<BF16>(row, at + j);
  return sum;
}
// y += Σ_i w_i·row_i over `count` rows of n numbers, which begin at element `at`.
template <bool BF16> static void add_weighted_rows(const float* w, int count, const void* rows, long at, int n, float* y) {
  int j = 0;
  for (; j + 4 * VL <= n; j += 4 * VL) {
    Vec s[4];
    for (int v = 0; v < 4; v++) s[v] = load(y + j + v * VL);
    for (int i = 0; i < count; i++)
      for (int v = 0; v < 4; v++) s[v] = fma(set1(w[i]), load_at<BF16>(rows, at + (long)i * n + j + v * VL), s[v]);
    for (int v = 0; v < 4; v++) store(y + j + v * VL, s[v]);
  }
  for (; j + VL <= n; j += VL) {
    Vec s = load(y + j);
    for (int i = 0; i < count; i++) s = fma(set1(w[i]), load_at<BF16>(rows, at + (long)i * n + j), s);
    store(y + j, s);
  }
  for (; j < n; j++)
    for (int i = 0; i < count; i++) y[j] += w[i] * element_at<BF16>(rows, at + (long)i * n + j);
}

template <bool BF16> static bool all_finite(const void* x, long at, int64_t stride, int heads, int n, float limit) {
  bool finite = true;
  for (int h = 0; h < heads; h++)
    for (int j = 0; j < n; j++) finite &= std::fabs(element_at<BF16>(x, at + h * stride + j)) < limit;
  return finite;
}
// Whether one pair's queries, key and value can be taken.
template <bool BF16> static bool finite_inputs(const StepCall& c, int b, int g) {
  return all_finite<BF16>(c.q, b * c.q_strides[0] + g * c.R * c.q_strides[1], c.q_strides[1], c.R, c.d, LARGEST_NUMBER) &&
         all_finite<BF16>(c.k, b * c.k_strides[0] + g * c.k_strides[1], 0, 1, c.d, LARGEST_NUMBER) &&
         all_finite<BF16>(c.v, b * c.v_strides[0] + g * c.v_strides[1], 0, 1, c.d_v, INFINITY);
}

template <bool BF16> struct StepPair {
  const StepCall& c;
  const int b, g, d, d_v, m, m_pad, W, S;
  const int64_t position;
  const int head;                            // place in the rings of the oldest key
  float *values, *sum, *log_scale;           // the pair's state: (m, d_v), (m), (m)
  void *recent_k, *recent_v;                 // (W, d), (W, d_v)
  void *sink_k, *sink_v;                     // (S, d), (S, d_v)
  float *x, *value, *o;                      // (d), (d_v), (d_v)
  float *features;                           // (m_pad): log-features, then weights in place
  float *window_weights, *sink_weights;      // logits, then weights in place
  float *state_factor, *new_log_scale;       // (m_pad)

  StepPair(const StepCall& c, int b, int g)
      : c(c), b(b), g(g), d(c.d), d_v(c.d_v), m(c.m), m_pad(pad16(c.m)), W(c.window), S(c.sinks), position(c.counts[b]),
        head(c.slots && W ? position % W : c.head) {
    const long number = sizeof(float), key = BF16 ? 2 : 4;
    values = (float*)of_pair(c.feature_values, (long)m * d_v * number);
    sum = (float*)of_pair(c.feature_sum, m * number), log_scale = (float*)of_pair(c.log_scale, m * number);
    recent_k = of_pair(c.recent_k, (long)W * d * key), recent_v = of_pair(c.recent_v, (long)W * d_v * key);
    sink_k = of_pair(c.sink_k, (long)S * d * key), sink_v = of_pair(c.sink_v, (long)S * d_v * key);
    auto take = [](size_t n) { return scratch().take(n); };
    x = take(pad16(d)), features = take(m_pad), state_factor = take(m_pad), new_log_scale = take(m_pad);
    window_weights = take(pad16(W)), sink_weights = take(pad16(S));
    value = take(pad16(d_v)), o = take(pad16(d_v));
  }

  // This pair's part of a tensor of the state, of which a pair has `bytes`.
  char* of_pair(void* tensor, long bytes) const {
    return (char*)tensor + (c.slots ? c.slots[b] * c.slot_bytes + g * bytes : ((long)b * c.G + g) * bytes);
  }

  // The state before the first token, in a slot that may hold anything.
  void clear() {
    const size_t key = BF16 ? 2 : 4;
    memset((void*)values, 0, (size_t)m * d_v * sizeof(float)), memset((void*)sum, 0, m * sizeof(float));
    std::fill(log_scale, log_scale + m, LOG_ZERO);
    memset(recent_k, 0, W * d * key), memset(recent_v, 0, W * d_v * key);
    memset(sink_k, 0, S * d * key), memset(sink_v, 0, S * d_v * key);
  }

  // NaN in place of the output for a token that is not taken.
  void refuse() {
    std::fill(o, o + pad16(d_v), NAN);
    for (int r = 0; r < c.R; r++) store_row(c.out, (((long)b * c.G + g) * c.R + r) * d_v, o, d_v, BF16);
  }

  // Log-features of x, P·x - a - ½‖N·x - b‖²; LOG_ZERO for padding features. Without exact keys a query's norm cancels.
  void log_features(const float* map, const float* offset, bool has_norm) {
    const long rows = m + c.r;
    map += g * rows * d, offset += g * rows;
    float half_norm = 0;
    for (int i = m; has_norm && i < rows; i++) {
      const float y = dot<false>(x, map, (long)i * d, d) - offset[i];
      half_norm += 0.5f * y * y;
    }
    for (int i = 0; i < m; i++) features[i] = dot<false>(x, map, (long)i * d, d) - offset[i] - half_norm;
    std::fill(features + m, features + m_pad, LOG_ZERO);
  }

  // The key that leaves the window joins the sums.
  void add_oldest_key() {
    if (!m || position - W < S) return;
    const void *k = W ? recent_k : c.k, *v = W ? recent_v : c.v;
    load_row(x, k, W ? (long)head * d : b * c.k_strides[0] + g * c.k_strides[1], d, pad16(d), BF16);
    load_row(value, v, W ? (long)head * d_v : b * c.v_strides[0] + g * c.v_strides[1], d_v, pad16(d_v), BF16);
    log_features(c.map_k, c.offset_k, true);
    load_row(state_factor, log_scale, 0, m, m_pad, false);
    for (int i = 0; i < m_pad; i += VL) {
      const Vec old = load(state_factor + i), l = load(features + i), top = vmax(old, l);
      store(new_log_scale + i, top), store(state_factor + i, vexp<false>(old - top)), store(features + i, vexp<false>(l - top));
    }
    memcpy(log_scale, new_log_scale, m * sizeof(float));
    const Dither dither(position);
    for (int i = 0; i < m; i++) sum[i] = dither.join(sum[i], state_factor[i], features[i]);
    for (int i = 0; i < m; i++) {
      float* row = values + (long)i * d_v;
      const Vec decay = set1(state_factor[i]), feature = set1(features[i]);
      int j = 0;
      for (; j + VL <= d_v; j += VL) store(row + j, dither.join(load(row + j), decay, feature * load(value + j)));
      for (; j < d_v; j++) row[j] = dither.join(row[j], state_factor[i], features[i] * value[j]);
    }
  }

  // The new key takes the oldest one's slot in the window, and is a sink if it is one of the first.
  void store_new_key() {
    const size_t size = BF16 ? 2 : 4;
    auto copy = [&](void* to, long row, const void* from, long at, int n) {
      memcpy((char*)to + row * n * size, (const char*)from + at * size, n * size);
    };
    const long k = b * c.k_strides[0] + g * c.k_strides[1], v = b * c.v_strides[0] + g * c.v_strides[1];
    if (W) copy(recent_k, head, c.k, k, d), copy(recent_v, head, c.v, v, d_v);
    if (position < S) copy(sink_k, position, c.k, k, d), copy(sink_v, position, c.v, v, d_v);
  }

  float logit(const void* rows, long at) const {
    const float l = (float)c.scaling * dot<BF16>(x, rows, at, d);
    return c.softcap ? (float)c.softcap * std::tanh(l / (float)c.softcap) : l;
  }

  // One query head's output. Returns whether it is finite and the largest logit has digits.
  bool attend(int r) {
    const int h = g * c.R + r;
    load_row(x, c.q, b * c.q_strides[0] + h * c.q_strides[1], d, pad16(d), BF16);
    float top = LOG_ZERO, highest_key = LOG_ZERO;
    if (m) {
      log_features(c.map_q, c.offset_q, W + S > 0);
      for (int i = 0; i < m; i++) {
        top = std::max(top, features[i] += log_scale[i]);
        highest_key = std::max(highest_key, log_scale[i]);
      }
    }
    for (int i = 0; i < W; i++) {
      const int64_t age = (head - i + W) % W;
      window_weights[i] = position - age >= S ? logit(recent_k, (long)i * d) : LOG_ZERO;
      top = std::max(top, window_weights[i]);
    }
    const int sinks = (int)std::min<int64_t>(S, position + 1);
    for (int i = 0; i < sinks; i++) top = std::max(top, sink_weights[i] = logit(sink_k, (long)i * d));
    const float norm = exponentiate(features, m, top, m ? sum : nullptr) +
                       exponentiate(window_weights, W, top, nullptr) + exponentiate(sink_weights, sinks, top, nullptr);
    std::fill(o, o + pad16(d_v), 0.0f);
    add_weighted_rows<false>(features, m, values, 0, d_v, o);
    add_weighted_rows<BF16>(window_weights, W, recent_v, 0, d_v, o);
    add_weighted_rows<BF16>(sink_weights, sinks, sink_v, 0, d_v, o);
    const Vec inverse = set1(norm > 0 ? 1 / norm : 1);
    Vec zero = set1(0);  // stays 0 if all numbers are finite
    for (int j = 0; j < pad16(d_v); j += VL) {
      const Vec y = load(o + j) * inverse;
      store(o + j, y);
      zero = fma(y, set1(0), zero);
    }
    store_row(c.out, ((long)b * c.G * c.R + h) * d_v, o, d_v, BF16);
    // A long query could make up for what the keys have lost.
    const bool has_digits = std::fabs(top) <= LARGEST_LOGIT && (W + S > 0 || highest_key >= -LARGEST_LOGIT);
    return reduce_add(zero) == 0 && norm > 0 && has_digits;
  }
  // Logits become weights e^{l - top}. Returns their sum, each times its factor if there are any.
  static float exponentiate(float* l, int n, float top, const float* factor) {
    for (int i = n; i < pad16(n); i++) l[i] = LOG_ZERO;
    for (int i = 0; i < n; i += VL) store(l + i, vexp<false>(load(l + i) - set1(top)));
    float sum = 0;
    for (int i = 0; i < n; i++) sum += factor ? l[i] * factor[i] : l[i];
    return sum;
  }
};

template <bool BF16> static Status step(StepCall& c) {
  const int pairs = c.B * c.G, workers = std::min<int>(std::max<int64_t>(1, c.threads), pairs);
  // Rows that advance together are taken together or not at all. Those of a pool belong to different users.
  for (int i = 0; !c.slots && i < pairs; i++)
    if (!finite_inputs<BF16>(c, i / c.G, i % c.G)) return NON_FINITE_INPUT;
  std::atomic<bool> finite{true};
  parallel(c.omp_parallel, workers, [&](int worker) {
    for (int i = worker; i < pairs; i += workers) {
      const int b = i / c.G, g = i % c.G;
      scratch().reset();
      StepPair<BF16> pair(c, b, g);
      // First of all: also after a token that is refused, the next one must find nothing of another request here.
      if (c.slots && pair.position == 0) pair.clear();
      if (c.slots && !finite_inputs<BF16>(c, b, g)) {
        pair.refuse(), finite = false;
        continue;
      }
      pair.add_oldest_key();
      pair.store_new_key();
      for (int r = 0; r < c.R; r++) if (!pair.attend(r)) finite = false;
    }
  });
  if (c.slots) return finite ? OK : NON_FINITE;
  for (int b = 0; b < c.B; b++) c.counts[b]++;
  if (c.window) c.head = (c.head + 1) % c.window;
  return finite ? OK : NON_FINITE;
}
