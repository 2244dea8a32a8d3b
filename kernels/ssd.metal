// The gated Hebbian rule of Mamba-2 (SSD), S_t = a_t S_{t-1} + b_t v_t k_t^T and o_t = S_t q_t.
//
// q, k [B, T, Hk, Dk], v, o [B, T, Hv, Dv], g = log a and beta [B, T, Hv], S [B, Hv, Dv, Dk]; in
// Mamba-2's letters C, B, x, dt A, dt. All arithmetic and S are float32. Dk and Dv are multiples
// of 8.

#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

inline float silu(float x) { return x / (1.0f + exp(-x)); }
inline float softplus(float x) { return x > 20.0f ? x : log(1.0f + exp(x)); }

// exp of g[from] + ... + g[to]: as exact as the recurrence, where a difference of running sums is
// not once those are large.
inline float decay(const threadgroup float* g, int from, int to) {
  float sum = 0.0f;
  for (int i = from; i <= to; ++i) sum += g[i];
  return exp(sum);
}

// kernel ssd_prefill(q, k, v, g, beta, D, state, mask, T, Hk, Hv) -> (o, state_out)

// Any number of tokens, in chunks of C (8 or 16). A threadgroup owns one head and 8 * Bands rows
// of S, a SIMD group 8 of those rows, which stay in its registers as the tiles of their transpose.
// In a chunk, with G_t = g_0 + ... + g_t and U = b V:
//
//   O = exp(G) Q S^T + P U + D V,         P_tj = exp(G_t - G_j) q_t.k_j  for j <= t
//   S = exp(G_end) S + U^T (exp(G_end - G) K)
//
// Template: OutT, Dk, Dv, C, Bands, HasMask, HasD. Grid (32 Bands, Dv / (8 Bands), B Hv).
constexpr int row_size = Dk + 4;  // rows of q and k, padded against bank conflicts
constexpr int chunk_tiles = C / 8;
constexpr int key_tiles = Dk / 8;
constexpr int threads = 32 * Bands;

threadgroup float q_chunk[C * (Dk + 4)];
threadgroup float k_chunk[C * (Dk + 4)];
threadgroup float P[C * C];
threadgroup float g_chunk[C];
threadgroup float beta_chunk[C];
threadgroup float start_diagonal[8 * C];  // exp(G_t) and exp(G_end - G_t), as diagonal tiles
threadgroup float end_diagonal[8 * C];
threadgroup float bands[Bands * C * 8];   // a SIMD group's columns of U, then of O

const int index = thread_index_in_threadgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int n = threadgroup_position_in_grid.z;
const int b = n / Hv;
const int hv = n % Hv;
const int hk = hv / (Hv / Hk);
const int column = 8 * (threadgroup_position_in_grid.y * Bands + simd_index);  // of v and o
threadgroup float* band = bands + simd_index * C * 8;

simdgroup_float8x8 S[key_tiles];  // S[i]: rows 8 i of S^T, columns `column`
const size_t state_at = (size_t(n) * Dv + column) * Dk;
for (int i = 0; i < key_tiles; ++i) {
  simdgroup_load(S[i], state + state_at + 8 * i, Dk, ulong2(0, 0), true);
}
for (int i = index; i < 8 * C; i += threads) {
  start_diagonal[i] = 0.0f;
  end_diagonal[i] = 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int start = 0; start < T; start += C) {
  const size_t token = size_t(b) * T + start;

  // Padding, and what lies behind the last token, has a = 1 and b = 0.
  for (int i = index; i < C * Dk; i += threads) {
    const int t = i / Dk;
    const int d = i % Dk;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = ((token + t) * Hk + hk) * Dk + d;
    q_chunk[t * row_size + d] = real ? static_cast<float>(q[at]) : 0.0f;
    k_chunk[t * row_size + d] = real ? static_cast<float>(k[at]) : 0.0f;
  }
  for (int t = index; t < C; t += threads) {
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = (token + t) * Hv + hv;
    g_chunk[t] = real ? static_cast<float>(g[at]) : 0.0f;
    beta_chunk[t] = real ? static_cast<float>(beta[at]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int t = index; t < C; t += threads) {
    const int at = 8 * t + t % 8;
    start_diagonal[at] = decay(g_chunk, 0, t);
    end_diagonal[at] = decay(g_chunk, t + 1, C - 1);
  }

  // The tiles of P on and below the diagonal, shared out among the SIMD groups.
  int job = 0;
  for (int i = 0; i < chunk_tiles; ++i) {
    for (int j = 0; j <= i; ++j, ++job) {
      if (job % Bands != simd_index) continue;
      simdgroup_float8x8 product(0.0f);
      for (int d = 0; d < Dk; d += 8) {
        simdgroup_float8x8 x, y;
        simdgroup_load(x, q_chunk + 8 * i * row_size + d, row_size);
        simdgroup_load(y, k_chunk + 8 * j * row_size + d, row_size, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(product, x, y, product);
      }
      threadgroup float* tile = P + 8 * i * C + 8 * j;
      simdgroup_store(product, tile, C);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      for (int e = lane; e < 64; e += 32) {
        const int t = 8 * i + e / 8;
        const int s = 8 * j + e % 8;
        threadgroup float* entry = tile + e / 8 * C + e % 8;
        *entry = s <= t ? decay(g_chunk, s + 1, t) * *entry : 0.0f;
      }
    }
  }

  simdgroup_float8x8 q_S[chunk_tiles];  // Q S^T, this SIMD group's columns
  for (int i = 0; i < chunk_tiles; ++i) {
    q_S[i] = simdgroup_float8x8(0.0f);
    for (int j = 0; j < key_tiles; ++j) {
      simdgroup_float8x8 x;
      simdgroup_load(x, q_chunk + 8 * i * row_size + 8 * j, row_size);
      simdgroup_multiply_accumulate(q_S[i], x, S[j], q_S[i]);
    }
  }
  float value[C / 4];  // of v: the elements of the band that this lane reads and writes
  for (int i = 0; i < C / 4; ++i) {
    const int t = 4 * i + lane / 8;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = ((token + t) * Hv + hv) * Dv + column + lane % 8;
    value[i] = real ? static_cast<float>(v[at]) : 0.0f;
    band[32 * i + lane] = beta_chunk[t] * value[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  simdgroup_float8x8 U[chunk_tiles];
  for (int i = 0; i < chunk_tiles; ++i) simdgroup_load(U[i], band + 64 * i, 8);
  simdgroup_barrier(mem_flags::mem_threadgroup);  // U is read before O takes its place
  for (int i = 0; i < chunk_tiles; ++i) {
    simdgroup_float8x8 x, out;
    simdgroup_load(x, start_diagonal + 64 * i, 8);
    simdgroup_multiply(out, x, q_S[i]);
    for (int j = 0; j <= i; ++j) {
      simdgroup_load(x, P + 8 * i * C + 8 * j, C);
      simdgroup_multiply_accumulate(out, x, U[j], out);
    }
    simdgroup_store(out, band + 64 * i, 8);
  }
  const float through = start_diagonal[8 * C - 1];  // exp(G_end)
  for (int i = 0; i < chunk_tiles; ++i) {
    simdgroup_float8x8 x;
    simdgroup_load(x, end_diagonal + 64 * i, 8);
    simdgroup_multiply(U[i], x, U[i]);
  }
  for (int j = 0; j < key_tiles; ++j) {
    S[j].thread_elements()[0] *= through;
    S[j].thread_elements()[1] *= through;
    for (int i = 0; i < chunk_tiles; ++i) {
      simdgroup_float8x8 x;
      simdgroup_load(x, k_chunk + 8 * i * row_size + 8 * j, row_size, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(S[j], x, U[i], S[j]);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < C / 4; ++i) {
    const int t = 4 * i + lane / 8;
    if (start + t < T) {
      const bool real = !HasMask || mask[token + t];
      const size_t at = ((token + t) * Hv + hv) * Dv + column + lane % 8;
      const float out = band[32 * i + lane] + (HasD ? static_cast<float>(D[hv]) * value[i] : 0.0f);
      o[at] = static_cast<OutT>(real ? out : 0.0f);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (int i = 0; i < key_tiles; ++i) {
  simdgroup_store(S[i], state_out + state_at + 8 * i, Dk, ulong2(0, 0), true);
}

// kernel ssd_step(xBC, dt, conv, conv_weight, conv_bias, A_log, dt_bias, D, dt_least, dt_most, state, Hk, Hv) -> (o, conv_out, state_out)

// One token of a Mamba-2 mixer from its projection to its norm, one threadgroup for each head: the
// short convolution of xBC [B, Hv Dv + 2 Hk Dk] (v, k, q) with its last inputs conv [B, K - 1,
// channels], taps conv_weight [channels, K] and conv_bias, silu, dt [B, Hv] through its bias,
// softplus and limits, the update, the read-out, the skip D.
//
// Template: OutT, ConvT, Dk, Dv, K, SimdGroups. Grid (32 SimdGroups, 1, B Hv).
constexpr int parts = (Dk + 127) / 128;  // float4s of a row of S that a lane holds
constexpr int threads = 32 * SimdGroups;

threadgroup float inputs[Dv + 2 * Dk];  // v, k, q behind the convolution and silu

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
const float a = exp(-exp(static_cast<float>(A_log[hv])) * step);
const float skip = static_cast<float>(D[hv]);

float4 k4[parts];
float4 q4[parts];
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
for (int row = simd_index; row < Dv; row += SimdGroups) {
  const size_t at = (size_t(n) * Dv + row) * Dk;
  const device float4* from = (const device float4*)(state + at);
  device float4* to = (device float4*)(state_out + at);
  const float value = inputs[row];
  float out = 0.0f;
  for (int i = 0; i < parts; ++i) {
    const int d = 128 * i + 4 * lane;
    if (d < Dk) {
      const float4 S = a * from[d / 4] + (step * value) * k4[i];
      out += dot(S, q4[i]);
      to[d / 4] = S;
    }
  }
  out = simd_sum(out);
  if (lane == 0) o[n * Dv + row] = static_cast<OutT>(out + skip * value);
}
