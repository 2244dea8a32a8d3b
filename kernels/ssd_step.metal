// The gated Hebbian rule of Mamba-2 (SSD), S_t = a_t S_{t-1} + b_t v_t k_t^T and o_t = S_t q_t.
//
// q, k [B, T, Hk, Dk], v, o [B, T, Hv, Dv], g = log a and beta [B, T, Hv], S [B, Hv, Dv, Dk]; in
// Mamba-2's letters C, B, x, dt A, dt. All arithmetic and S are float32. Dk and Dv are multiples
// of 8.

#include "common.metal"

// kernel ssd_step(xBC, dt, conv, conv_weight, conv_bias, A_log, dt_bias, D, dt_least, dt_most, state, Hk, Hv) -> (o, conv_out, state_out)

// One token of a Mamba-2 mixer from its projection to its norm, one threadgroup for each head: the
// short convolution of xBC [B, Hv Dv + 2 Hk Dk] (v, k, q) with its last inputs conv [B, K - 1,
// channels], taps conv_weight [channels, K] and conv_bias, silu, dt [B, Hv] through its bias,
// softplus and limits, the update, the read-out, the skip D.
//
// Template: OutT, ConvT, Dk, Dv, K, SimdGroups. Grid (32 SimdGroups, 1, B Hv).
constexpr int parts = (Dk + 127) / 128;  // float4s of a row of S that a lane holds
constexpr int rows = 4;                  // of S, in flight in a SIMD group
constexpr int threads = 32 * SimdGroups;

threadgroup float inputs[Dv + 2 * Dk];  // v, k, q after the convolution and silu

const int index = thread_index_in_threadgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int n = threadgroup_position_in_grid.z;
const int b = n / Hv;
const int hv = n % Hv;
const int hk = hv / (Hv / Hk);
const int channels = Hv * Dv + 2 * Hk * Dk;

for (int i = index; i < Dv + 2 * Dk; i += threads) {
  const int channel = i < Dv        ? hv * Dv + i
                      : i < Dv + Dk ? Hv * Dv + hk * Dk + i - Dv
                                    : Hv * Dv + (Hk + hk) * Dk + i - Dv - Dk;
  // Heads of one group share k and q; the first of them keeps their inputs.
  const bool keeps = i < Dv || hv % (Hv / Hk) == 0;
  float sum = static_cast<float>(conv_bias[channel]);
  UNROLL
  for (int j = 0; j < K; ++j) {
    const size_t at = (size_t(b) * (K - 1) + j) * channels + channel;
    const float x = j < K - 1 ? static_cast<float>(conv[at])
                              : static_cast<float>(xBC[b * channels + channel]);
    sum = fma(static_cast<float>(conv_weight[channel * K + j]), x, sum);
    if (keeps && j > 0) conv_out[at - channels] = static_cast<ConvT>(x);
  }
  inputs[i] = silu(sum);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const float dt_raw = static_cast<float>(dt[b * Hv + hv]) + static_cast<float>(dt_bias[hv]);
const float step = clamp(softplus(dt_raw), dt_least, dt_most);
const float a = precise::exp(-precise::exp(static_cast<float>(A_log[hv])) * step);
const float skip = static_cast<float>(D[hv]);

float4 k4[parts];
float4 q4[parts];
UNROLL
for (int i = 0; i < parts; ++i) {
  const int d = 128 * i + 4 * lane;
  k4[i] = float4(0.0f);
  q4[i] = float4(0.0f);
  if (d < Dk) {
    const threadgroup float* key = inputs + Dv + d;
    k4[i] = float4(key[0], key[1], key[2], key[3]);
    q4[i] = float4(key[Dk], key[Dk + 1], key[Dk + 2], key[Dk + 3]);
  }
}
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
    const float value = inputs[first + r];
    float out = 0.0f;
    UNROLL
    for (int i = 0; i < parts; ++i) {
      const int d = 128 * i + 4 * lane;
      S[r][i] = S[r][i] + (step * value) * k4[i];
      out += dot(S[r][i], q4[i]);
      if (d < Dk) to[(r * Dk + d) / 4] = S[r][i];
    }
    out = simd_sum(out);
    if (lane == 0) o[n * Dv + first + r] = static_cast<OutT>(out + skip * value);
  }
}
