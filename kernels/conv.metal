// Short causal convolutions, one set of K taps for each channel (static) or for each token and
// channel (dynamic): y_t = sum_j w_j x_{t-K+1+j}, where the inputs before x_0 are the state.
//
// x, y [B, T, C]; weight [C, K] or [B, T, C, K]; state [B, K - 1, C], oldest first; lengths [B],
// the tokens of each row that are not padding; sums in float32. The state after the call holds the
// last K - 1 inputs of each row, reaching back into the given one. K >= 2.

#include "common.metal"

// kernel conv_forward(x, weight, state, lengths, T, C) -> (y, state_out)

// A thread owns Run tokens of one channel and reads each input once.
//
// Template: OutT, K, Run, Dynamic. Grid (C, ceil(T / Run), B).
const int c = thread_position_in_grid.x;
const int run = thread_position_in_grid.y;
const int b = thread_position_in_grid.z;
const int first = run * Run;

// The inputs as one sequence, the state first: input i is state[i] or x[i - K + 1].
float window[K];
UNROLL
for (int j = 1; j < K; ++j) {
  const int i = first + j - 1;
  window[j] = i < K - 1 ? static_cast<float>(state[(b * (K - 1) + i) * C + c])
                        : static_cast<float>(x[(size_t(b) * T + i - K + 1) * C + c]);
}
float taps[K];
UNROLL
for (int j = 0; j < K; ++j) taps[j] = Dynamic ? 0.0f : static_cast<float>(weight[c * K + j]);
for (int t = first; t < T && t < first + Run; ++t) {
  const size_t at = (size_t(b) * T + t) * C + c;
  UNROLL
  for (int j = 1; j < K; ++j) window[j - 1] = window[j];
  window[K - 1] = static_cast<float>(x[at]);
  float sum = 0.0f;
  UNROLL
  for (int j = 0; j < K; ++j) {
    sum = fma(Dynamic ? static_cast<float>(weight[at * K + j]) : taps[j], window[j], sum);
  }
  y[at] = static_cast<OutT>(sum);
}
if (run == 0) {
  UNROLL
  for (int j = 0; j < K - 1; ++j) {
    const int i = lengths[b] + j;
    const float value = i < K - 1 ? static_cast<float>(state[(b * (K - 1) + i) * C + c])
                                  : static_cast<float>(x[(size_t(b) * T + i - K + 1) * C + c]);
    state_out[(b * (K - 1) + j) * C + c] = static_cast<OutT>(value);
  }
}

// kernel conv_backward(x, weight, state, lengths, d_y, d_state_out, T, C) -> (d_x, d_weight, d_state)

// Gradients of y and of the last state. Those of static taps are partial sums over the tokens of a
// run: d_weight [B, runs, C, K]; dynamic ones are whole.
//
// Template: K, Run, Dynamic. Grid (C, ceil(T / Run), B).
const int c = thread_position_in_grid.x;
const int run = thread_position_in_grid.y;
const int b = thread_position_in_grid.z;
const int runs = (T + Run - 1) / Run;
const int first = run * Run;

float d_taps[K];
UNROLL
for (int j = 0; j < K; ++j) d_taps[j] = 0.0f;
// Input i reaches y_t through tap i - t, and the last state where it is among its inputs. The
// first run also has the K - 1 inputs that are the state.
for (int i = run == 0 ? 0 : first + K - 1; i < T + K - 1 && i < first + Run + K - 1; ++i) {
  const int kept = i - lengths[b];
  float sum = kept >= 0 && kept < K - 1
                  ? static_cast<float>(d_state_out[(b * (K - 1) + kept) * C + c])
                  : 0.0f;
  UNROLL
  for (int j = 0; j < K; ++j) {
    const int t = i - j;
    if (t < 0 || t >= T) continue;
    const size_t at = (size_t(b) * T + t) * C + c;
    const float w = static_cast<float>(weight[Dynamic ? at * K + j : size_t(c) * K + j]);
    sum = fma(w, static_cast<float>(d_y[at]), sum);
  }
  if (i < K - 1) {
    d_state[(b * (K - 1) + i) * C + c] = sum;
  } else {
    d_x[(size_t(b) * T + i - K + 1) * C + c] = sum;
  }
}
for (int t = first; t < T && t < first + Run; ++t) {
  const size_t at = (size_t(b) * T + t) * C + c;
  const float d = static_cast<float>(d_y[at]);
  UNROLL
  for (int j = 0; j < K; ++j) {
    const int i = t + j;
    const float input = i < K - 1 ? static_cast<float>(state[(b * (K - 1) + i) * C + c])
                                  : static_cast<float>(x[at - (K - 1 - j) * C]);
    if (Dynamic) {
      d_weight[at * K + j] = d * input;
    } else {
      d_taps[j] = fma(d, input, d_taps[j]);
    }
  }
}
if (!Dynamic) {
  UNROLL
  for (int j = 0; j < K; ++j) {
    d_weight[((size_t(b) * runs + run) * C + c) * K + j] = d_taps[j];
  }
}
