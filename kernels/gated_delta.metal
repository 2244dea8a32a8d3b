// The gated delta rule, S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t.
//
// q, k [B, T, Hk, Dk], v, o [B, T, Hv, Dv], g = log a and beta [B, T, Hv], S [B, Hv, Dv, Dk].
// All arithmetic and S are float32. Dk and Dv are multiples of 8.

#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

constant constexpr float kNormEps = 1e-6f;  // of the L2 norm of q and k

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
inline float silu(float x) { return x * sigmoid(x); }
inline float softplus(float x) { return x > 20.0f ? x : log(1.0f + exp(x)); }

// exp of g[from] + ... + g[to]: as exact as the recurrence, where a difference of running sums is
// not once those are large.
inline float decay(const threadgroup float* g, int from, int to) {
  float sum = 0.0f;
  for (int i = from; i <= to; ++i) sum += g[i];
  return exp(sum);
}

// kernel gated_delta_prefill(q, k, v, g, beta, state, mask, T, Hk, Hv) -> (o, state_out)

// Any number of tokens, in chunks of C (8 or 16). A threadgroup owns one head and 8 * Bands rows
// of S, a SIMD group 8 of those rows, which stay in its registers as the tiles of their transpose.
// In a chunk, with G_t = g_0 + ... + g_t and u_t what the rule really writes (the WY form):
//
//   (I + A) U = b (V - exp(G) K S^T),     A_tj = b_t exp(G_t - G_j) k_t.k_j  for j < t
//   O = exp(G) Q S^T + P U,               P_tj = exp(G_t - G_j) q_t.k_j      for j <= t
//   S = exp(G_end) S + U^T (exp(G_end - G) K)
//
// Template: OutT, Dk, Dv, C, Bands, HasMask. Grid (32 Bands, Dv / (8 Bands), B Hv).
constexpr int row_size = Dk + 4;  // rows of q and k, padded against bank conflicts
constexpr int chunk_tiles = C / 8;
constexpr int key_tiles = Dk / 8;
constexpr int threads = 32 * Bands;

threadgroup float q_chunk[C * (Dk + 4)];
threadgroup float k_chunk[C * (Dk + 4)];
threadgroup float A[C * C];
threadgroup float P[C * C];
threadgroup float g_chunk[C];
threadgroup float beta_chunk[C];
threadgroup float from_start[C];          // exp(G_t)
threadgroup float start_diagonal[8 * C];  // the same, and exp(G_end - G_t), as diagonal tiles
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
    from_start[t] = decay(g_chunk, 0, t);
    start_diagonal[at] = decay(g_chunk, 0, t);
    end_diagonal[at] = decay(g_chunk, t + 1, C - 1);
  }

  // The tiles of A and P on and below the diagonal, shared out among the SIMD groups.
  int job = 0;
  for (int i = 0; i < chunk_tiles; ++i) {
    for (int j = 0; j <= i; ++j) {
      for (int which = 0; which < 2; ++which, ++job) {
        if (job % Bands != simd_index) continue;
        const threadgroup float* left = (which ? q_chunk : k_chunk) + 8 * i * row_size;
        simdgroup_float8x8 product(0.0f);
        for (int d = 0; d < Dk; d += 8) {
          simdgroup_float8x8 x, y;
          simdgroup_load(x, left + d, row_size);
          simdgroup_load(y, k_chunk + 8 * j * row_size + d, row_size, ulong2(0, 0), true);
          simdgroup_multiply_accumulate(product, x, y, product);
        }
        threadgroup float* tile = (which ? P : A) + 8 * i * C + 8 * j;
        simdgroup_store(product, tile, C);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int e = lane; e < 64; e += 32) {
          const int t = 8 * i + e / 8;
          const int s = 8 * j + e % 8;
          threadgroup float* entry = tile + e / 8 * C + e % 8;
          if (which) {
            *entry = s <= t ? decay(g_chunk, s + 1, t) * *entry : 0.0f;
          } else {
            *entry = s < t ? beta_chunk[t] * decay(g_chunk, s + 1, t) * *entry : 0.0f;
          }
        }
      }
    }
  }

  simdgroup_float8x8 k_S[chunk_tiles];  // K S^T and Q S^T, this SIMD group's columns
  simdgroup_float8x8 q_S[chunk_tiles];
  for (int i = 0; i < chunk_tiles; ++i) {
    k_S[i] = simdgroup_float8x8(0.0f);
    q_S[i] = simdgroup_float8x8(0.0f);
    for (int j = 0; j < key_tiles; ++j) {
      simdgroup_float8x8 x;
      simdgroup_load(x, k_chunk + 8 * i * row_size + 8 * j, row_size);
      simdgroup_multiply_accumulate(k_S[i], x, S[j], k_S[i]);
      simdgroup_load(x, q_chunk + 8 * i * row_size + 8 * j, row_size);
      simdgroup_multiply_accumulate(q_S[i], x, S[j], q_S[i]);
    }
    simdgroup_store(k_S[i], band + 64 * i, 8);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // The right-hand side, by all lanes; then forward substitution, a lane for each column.
  for (int e = lane; e < 8 * C; e += 32) {
    const int t = e / 8;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = ((token + t) * Hv + hv) * Dv + column + e % 8;
    const float value = real ? static_cast<float>(v[at]) : 0.0f;
    band[e] = beta_chunk[t] * (value - from_start[t] * band[e]);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (lane < 8) {
    float u[C];
    for (int t = 0; t < C; ++t) {
      u[t] = band[8 * t + lane];
      for (int s = 0; s < t; ++s) u[t] = fma(-A[t * C + s], u[s], u[t]);
      band[8 * t + lane] = u[t];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

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
  const float through = from_start[C - 1];
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
  for (int e = lane; e < 8 * C; e += 32) {
    const int t = e / 8;
    if (start + t < T) {
      const bool real = !HasMask || mask[token + t];
      const size_t at = ((token + t) * Hv + hv) * Dv + column + e % 8;
      o[at] = static_cast<OutT>(real ? band[e] : 0.0f);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (int i = 0; i < key_tiles; ++i) {
  simdgroup_store(S[i], state_out + state_at + 8 * i, Dk, ulong2(0, 0), true);
}

// kernel gated_delta_step(qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, norm_eps, state, Hk, Hv) -> (o, conv_out, state_out)

// One token of the whole mixer between its projections, one threadgroup for each head: the short
// convolution of qkv [B, 2 Hk Dk + Hv Dv] with its last inputs conv [B, K - 1, channels] and taps
// conv_weight [channels, K], silu, the L2 norm of q and k and q's scale Dk^-0.5, beta and g from
// ba [B, 2 Hv] (b, then a), the delta update, the read-out, RMSNorm times silu(z), z [B, Hv, Dv].
//
// Template: OutT, ConvT, Dk, Dv, K, SimdGroups. Grid (32 SimdGroups, 1, B Hv).
constexpr int parts = (Dk + 127) / 128;  // float4s of a row of S that a lane holds
constexpr int threads = 32 * SimdGroups;

threadgroup float inputs[2 * Dk + Dv];  // q, k, v behind the convolution and silu
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
  for (int j = 0; j < K; ++j) {
    const size_t at = (size_t(b) * (K - 1) + j) * channels + channel;
    const float x = static_cast<float>(j < K - 1 ? static_cast<float>(conv[at])
                                                 : static_cast<float>(qkv[b * channels + channel]));
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
for (int i = 0; i < parts; ++i) {
  q4[i] = q4[i] * q_scale;
  k4[i] = k4[i] * k_scale;
}
const float beta = sigmoid(static_cast<float>(ba[2 * b * Hv + hv]));
const float step = softplus(static_cast<float>(ba[(2 * b + 1) * Hv + hv]) +
                            static_cast<float>(dt_bias[hv]));
const float a = exp(-exp(static_cast<float>(A_log[hv])) * step);

for (int row = simd_index; row < Dv; row += SimdGroups) {
  const size_t at = (size_t(n) * Dv + row) * Dk;
  const device float4* from = (const device float4*)(state + at);
  device float4* to = (device float4*)(state_out + at);
  float4 S[parts];
  float held = 0.0f;
  float out = 0.0f;
  for (int i = 0; i < parts; ++i) {
    const int d = 128 * i + 4 * lane;
    S[i] = d < Dk ? a * from[d / 4] : float4(0.0f);
    held += dot(S[i], k4[i]);
    out += dot(S[i], q4[i]);
  }
  const float u = beta * (inputs[2 * Dk + row] - simd_sum(held));
  out = simd_sum(out) + u * kq;  // (S + u k^T) q
  for (int i = 0; i < parts; ++i) {
    const int d = 128 * i + 4 * lane;
    if (d < Dk) to[d / 4] = S[i] + u * k4[i];
  }
  if (lane == 0) read_out[row] = out;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float squares = 0.0f;
for (int i = lane; i < Dv; i += 32) squares += read_out[i] * read_out[i];
const float norm = rsqrt(simd_sum(squares) / Dv + norm_eps);
for (int i = index; i < Dv; i += threads) {
  const float gate = silu(static_cast<float>(z[n * Dv + i]));
  o[n * Dv + i] = static_cast<OutT>(read_out[i] * norm * static_cast<float>(norm_weight[i]) * gate);
}
