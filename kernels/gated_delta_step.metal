// The gated delta rule, S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t.
//
// q, k [B, T, Hk, Dk], v, o [B, T, Hv, Dv], g = log a and beta [B, T, Hv], S [B, Hv, Dv, Dk].
// All arithmetic and S are float32. Dk and Dv are multiples of 8.

#include "common.metal"

// kernel gated_delta_step(qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, norm_eps, state, Hk, Hv) -> (o, conv_out, state_out)

// One token of the whole mixer between its projections, one threadgroup for each head: the short
// convolution of qkv [B, 2 Hk Dk + Hv Dv] with its last inputs conv [B, K - 1, channels] and taps
// conv_weight [channels, K], silu, the L2 norm of q and k and q's scale Dk^-0.5, beta and g from
// ba [B, 2 Hv] (b, then a), the delta update, the read-out, RMSNorm times silu(z), z [B, Hv, Dv].
//
// Template: OutT, ConvT, Dk, Dv, K, SimdGroups. Grid (32 SimdGroups, 1, B Hv).
constexpr int parts = (Dk + 127) / 128;  // float4s of a row of S that a lane holds
constexpr int rows = 4;                  // of S, in flight in a SIMD group
constexpr int threads = 32 * SimdGroups;

threadgroup float inputs[2 * Dk + Dv];  // q, k, v after the convolution and silu
threadgroup float read_out[Dv];

const int index = thread_index_in_threadgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int n = threadgroup_position_in_grid.z;
const int b = n / Hv;
const int hv = n % Hv;
const int hk = hv / (Hv / Hk);
const int channels = 2 * Hk * Dk + Hv * Dv;

for (int i = index; i < 2 * Dk + Dv; i += threads) {
  const int channel = i < Dk       ? hk * Dk + i
                      : i < 2 * Dk ? (Hk + hk) * Dk + i - Dk
                                   : 2 * Hk * Dk + hv * Dv + i - 2 * Dk;
  // Heads of one group share q and k; the first of them keeps their inputs.
  const bool keeps = i >= 2 * Dk || hv % (Hv / Hk) == 0;
  float sum = 0.0f;
  UNROLL
  for (int j = 0; j < K; ++j) {
    const size_t at = (size_t(b) * (K - 1) + j) * channels + channel;
    const float x = j < K - 1 ? static_cast<float>(conv[at])
                              : static_cast<float>(qkv[b * channels + channel]);
    sum = fma(static_cast<float>(conv_weight[channel * K + j]), x, sum);
    if (keeps && j > 0) conv_out[at - channels] = static_cast<ConvT>(x);
  }
  inputs[i] = silu(sum);
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
  if (d < Dk) {
    q4[i] = float4(inputs[d], inputs[d + 1], inputs[d + 2], inputs[d + 3]);
    k4[i] = float4(inputs[Dk + d], inputs[Dk + d + 1], inputs[Dk + d + 2], inputs[Dk + d + 3]);
  }
  qq += dot(q4[i], q4[i]);
  kk += dot(k4[i], k4[i]);
  kq += dot(k4[i], q4[i]);
}
const float q_scale = rsqrt(simd_sum(qq) + kNormEps) * rsqrt(static_cast<float>(Dk));
const float k_scale = rsqrt(simd_sum(kk) + kNormEps);
kq = simd_sum(kq) * q_scale * k_scale;
UNROLL
for (int i = 0; i < parts; ++i) {
  q4[i] = q4[i] * q_scale;
  k4[i] = k4[i] * k_scale;
}
const float beta = sigmoid(static_cast<float>(ba[2 * b * Hv + hv]));
const float step = softplus(static_cast<float>(ba[(2 * b + 1) * Hv + hv]) +
                            static_cast<float>(dt_bias[hv]));
const float a = precise::exp(-precise::exp(static_cast<float>(A_log[hv])) * step);

// Rows of S are read as float4s: Dk is a multiple of 4, and `state` begins at 16 bytes.
for (int first = rows * simd_index; first < Dv; first += rows * SimdGroups) {
  const size_t at = (size_t(n) * Dv + first) * Dk;
  const device float4* from = (const device float4*)(state + at);
  device float4* to = (device float4*)(state_out + at);
  float4 S[rows][parts];
  UNROLL
  for (int r = 0; r < rows; ++r) {
    UNROLL
    for (int i = 0; i < parts; ++i) {
      const int d = 128 * i + 4 * lane;
      S[r][i] = d < Dk ? a * from[(r * Dk + d) / 4] : float4(0.0f);
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
    const float u = beta * (inputs[2 * Dk + first + r] - simd_sum(held));
    out = simd_sum(out) + u * kq;  // (S + u k^T) q
    UNROLL
    for (int i = 0; i < parts; ++i) {
      const int d = 128 * i + 4 * lane;
      if (d < Dk) to[(r * Dk + d) / 4] = S[r][i] + u * k4[i];
    }
    if (lane == 0) read_out[first + r] = out;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float squares = 0.0f;
for (int i = lane; i < Dv; i += 32) squares += read_out[i] * read_out[i];
const float norm = rsqrt(simd_sum(squares) / Dv + norm_eps);
for (int i = index; i < Dv; i += threads) {
  const float gate = silu(static_cast<float>(z[n * Dv + i]));
  o[n * Dv + i] = static_cast<OutT>(read_out[i] * norm * static_cast<float>(norm_weight[i]) * gate);
}
