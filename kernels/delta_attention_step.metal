// Delta attention's mixer, of the gated delta rule S_t = a_t S_{t-1} (I - b_t k_t k_t^T) +
// b_t v_t k_t^T, o_t = S_t q_t, with q, k, v as softmax attention has them. All arithmetic and S are
// float32. D is a multiple of 8.

#include "common.metal"

// kernel delta_attention_step(q, k, v, z, a, b, conv, conv_weight, dt_bias, norm_weight, norm_eps, state, write, H) -> (o, conv_out, state_out)

// One token of the whole mixer between its projections, one threadgroup for each head: the short
// convolution of q, k, v [B, H D] with their last inputs conv [B, K - 1, 3 H D] (of q, k and v, side
// by side) and taps conv_weight [3 H D, K], the L2 norm of q and k, the decay from a and beta from
// b [B, H], the delta update, the read-out, RMSNorm times 2 sigmoid(z), z [B, H, D]. A row that
// `write` [B] denies keeps its state.
//
// Template: OutT, ConvT, D, K, SimdGroups, HasWrite. Grid (32 SimdGroups, 1, B H).
constexpr int parts = (D + 127) / 128;  // float4s of a row of S that a lane holds
constexpr int rows = 4;                 // of S, in flight in a SIMD group
constexpr int threads = 32 * SimdGroups;

threadgroup float inputs[3 * D];  // q, k, v after the convolution
threadgroup float read_out[D];

const int index = thread_index_in_threadgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int n = threadgroup_position_in_grid.z;
const int row = n / H;  // of the batch
const int head = n % H;

for (int i = index; i < 3 * D; i += threads) {
  const int which = i / D;
  const int own = head * D + i % D;  // of q, k or v
  const int channel = which * H * D + own;
  float newest;
  if (which == 0) {
    newest = static_cast<float>(q[row * H * D + own]);
  } else if (which == 1) {
    newest = static_cast<float>(k[row * H * D + own]);
  } else {
    newest = static_cast<float>(v[row * H * D + own]);
  }
  float sum = 0.0f;
  UNROLL
  for (int j = 0; j < K; ++j) {
    const size_t at = (size_t(row) * (K - 1) + j) * 3 * H * D + channel;
    const float x = j < K - 1 ? static_cast<float>(conv[at]) : newest;
    sum = fma(static_cast<float>(conv_weight[channel * K + j]), x, sum);
    if (j > 0) conv_out[at - 3 * H * D] = static_cast<ConvT>(x);
  }
  inputs[i] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float4 q4[parts];
float4 k4[parts];
float qq = 0.0f;
float kk = 0.0f;
float kq = 0.0f;
UNROLL
for (int i = 0; i < parts; ++i) {
  const int d = 128 * i + 4 * lane;
  q4[i] = float4(0.0f);
  k4[i] = float4(0.0f);
  if (d < D) {
    q4[i] = float4(inputs[d], inputs[d + 1], inputs[d + 2], inputs[d + 3]);
    k4[i] = float4(inputs[D + d], inputs[D + d + 1], inputs[D + d + 2], inputs[D + d + 3]);
  }
  qq += dot(q4[i], q4[i]);
  kk += dot(k4[i], k4[i]);
  kq += dot(k4[i], q4[i]);
}
const float q_scale = rsqrt(simd_sum(qq) + kNormEps);
const float k_scale = rsqrt(simd_sum(kk) + kNormEps);
kq = simd_sum(kq) * q_scale * k_scale;
UNROLL
for (int i = 0; i < parts; ++i) {
  q4[i] = q4[i] * q_scale;
  k4[i] = k4[i] * k_scale;
}
const bool writes = !HasWrite || write[row];
const float step = softplus(static_cast<float>(a[n]) + static_cast<float>(dt_bias[head]));
const float decay = writes ? precise::exp(-step) : 1.0f;
const float beta = writes ? sigmoid(static_cast<float>(b[n])) : 0.0f;

// Rows of S are read as float4s: D is a multiple of 4, and `state` begins at 16 bytes.
for (int first = rows * simd_index; first < D; first += rows * SimdGroups) {
  const size_t at = (size_t(n) * D + first) * D;
  const device float4* from = (const device float4*)(state + at);
  device float4* to = (device float4*)(state_out + at);
  float4 S[rows][parts];
  UNROLL
  for (int r = 0; r < rows; ++r) {
    UNROLL
    for (int i = 0; i < parts; ++i) {
      const int d = 128 * i + 4 * lane;
      S[r][i] = d < D ? decay * from[(r * D + d) / 4] : float4(0.0f);
    }
  }
  UNROLL
  for (int r = 0; r < rows; ++r) {
    float held = 0.0f;
    float out = 0.0f;
    UNROLL
    for (int i = 0; i < parts; ++i) {
      held += dot(S[r][i], k4[i]);
      out += dot(S[r][i], q4[i]);
    }
    const float u = beta * (inputs[2 * D + first + r] - simd_sum(held));
    out = simd_sum(out) + u * kq;  // (S + u k^T) q
    UNROLL
    for (int i = 0; i < parts; ++i) {
      const int d = 128 * i + 4 * lane;
      if (d < D) to[(r * D + d) / 4] = S[r][i] + u * k4[i];
    }
    if (lane == 0) read_out[first + r] = out;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float squares = 0.0f;
for (int i = lane; i < D; i += 32) squares += read_out[i] * read_out[i];
const float norm = rsqrt(simd_sum(squares) / D + norm_eps);
for (int i = index; i < D; i += threads) {
  const float gate = 2.0f * sigmoid(static_cast<float>(z[n * D + i]));
  o[n * D + i] = static_cast<OutT>(read_out[i] * norm * static_cast<float>(norm_weight[i]) * gate);
}
