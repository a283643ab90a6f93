// The running sums over far keys of one (batch row, kv head) pair.
#pragma once
#include "rows.h"

// values (m_pad×dv_pad, rows values_ld apart) and sum (m_pad) over the keys seen so far, feature i scaled by e^-log_scale[i], where
// log_scale[i] is the running maximum of the keys' log-feature i. All three lie in one buffer of size() floats.
struct State {
  float *values, *sum, *log_scale;
  static size_t size(const Dims& s) { return (size_t)s.m_pad * s.values_ld + 2 * s.m_pad; }
  State(float* p, const Dims& s) : values(p), sum(p + (size_t)s.m_pad * s.values_ld), log_scale(sum + s.m_pad) {}
  void clear(const Dims& s) {
    std::fill(values, log_scale, 0.0f);
    for (int i = 0; i < s.m_pad; i++) log_scale[i] = i < s.m ? LOG_ZERO : 0;  // a padding feature never has weight
  }
  void read(const Call& c, const Dims& s, long pair) {
    clear(s);
    if (!c.feature_values) return;  // before the first token
    for (int i = 0; i < s.m; i++) {
      load_row(values + (size_t)i * s.values_ld, c.feature_values, (pair * s.m + i) * s.d_v, s.d_v, s.dv_pad, false);
      sum[i] = c.feature_sum[pair * s.m + i];
      log_scale[i] = c.log_scale[pair * s.m + i];
    }
    check_finite(c, values, (size_t)s.m_pad * s.values_ld), check_finite(c, sum, s.m_pad);
  }
  // The state before a task: what an earlier segment ended with, or for the first one the call's own.
  void start(const Call& c, const Dims& s, long pair, const std::vector<float>& before) {
    if (before.empty()) read(c, s, pair);
    else memcpy(values, before.data(), size(s) * sizeof(float));
  }
  void write(const Call& c, const Dims& s, long pair) const {
    for (int i = 0; i < s.m; i++) {
      c.log_scale_out[pair * s.m + i] = log_scale[i];
      if (!c.feature_values_out) continue;  // not wanted
      store_row(c.feature_values_out, (pair * s.m + i) * s.d_v, values + (size_t)i * s.values_ld, s.d_v, false);
      c.feature_sum_out[pair * s.m + i] = sum[i];
    }
  }
  // Joins sums over a chunk, at the same log_scale: new_values (m_pad×dv_pad) and new_sum (m_pad).
  void add(const Dims& s, const float* new_values, const float* new_sum, int64_t position) {
    const Dither dither(position);
    const Vec one = set1(1);
    for (int i = 0; i < s.m_pad; i += VL) store(sum + i, dither.join(load(sum + i), one, load(new_sum + i)));
    for (int i = 0; i < s.m_pad; i++, new_values += s.dv_pad) {
      float* row = values + (size_t)i * s.values_ld;
      for (int j = 0; j < s.dv_pad; j += VL) store(row + j, dither.join(load(row + j), one, load(new_values + j)));
    }
  }
  // The largest log-feature of all keys.
  float highest(const Dims& s) const { return s.m ? *std::max_element(log_scale, log_scale + s.m) : LOG_ZERO; }
  bool holds_keys(const Dims& s) const {
    for (int i = 0; i < s.m; i++) if (log_scale[i] > LOG_ZERO / 2) return true;
    return false;
  }
  void merge(const State& other, const Dims& s) {
    for (int i = 0; i < s.m; i++) {
      const float top = std::max(log_scale[i], other.log_scale[i]);
      const float factor = std::exp(log_scale[i] - top), other_factor = std::exp(other.log_scale[i] - top);
      for (int j = 0; j < s.dv_pad; j++)
        values[(size_t)i * s.values_ld + j] =
            factor * values[(size_t)i * s.values_ld + j] + other_factor * other.values[(size_t)i * s.values_ld + j];
      sum[i] = factor * sum[i] + other_factor * other.sum[i];
      log_scale[i] = top;
    }
  }
};
