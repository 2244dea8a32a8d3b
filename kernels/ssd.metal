// The gated Hebbian rule of Mamba-2 (SSD), S_t = a_t S_{t-1} + b_t v_t k_t^T and o_t = S_t q_t.
//
// q, k [B, T, Hk, Dk], v, o [B, T, Hv, Dv], g = log a and beta [B, T, Hv], S [B, Hv, Dv, Dk]; in
// Mamba-2's letters C, B, x, dt A, dt. All arithmetic and S are float32. Dk and Dv are multiples
// of 8.

#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// Arrays that stay in registers need loops without a counter, of a fixed number of rounds.
#define UNROLL _Pragma("clang loop unroll(full)")

inline float silu(float x) { return x / (1.0f + precise::exp(-x)); }
// log(1 + exp(x)) to the last digits also where exp(x) is far below 1 (Kahan's log1p).
inline float softplus(float x) {
  const float e = precise::exp(x);
  const float y = 1.0f + e;
  return x > 20.0f ? x : y == 1.0f ? e : precise::log(y) * e / (y - 1.0f);
}

// exp of g[from] + ... + g[to]: as exact as the recurrence, where a difference of running sums is
// not once those are large.
inline float decay(const threadgroup float* g, int from, int to) {
  float sum = 0.0f;
  for (int i = from; i <= to; ++i) sum += g[i];
  return precise::exp(sum);
}

// kernel ssd_prefill(q, k, v, g, beta, state, mask, T, Hk, Hv, D) -> (o, state_out)

// Any number of tokens, in chunks of C (8 or 16). A threadgroup owns one head and 8 * Bands rows
// of S, a SIMD group 8 of those rows, which stay in its registers as the tiles of their transpose.
// In a chunk, with G_t = g_0 + ... + g_t and U = b V:
//
//   O = exp(G) Q S^T + P U + D V,         P_tj = exp(G_t - G_j) q_t.k_j  for j <= t
//   S = exp(G_end) S + U^T (exp(G_end - G) K)
//
// With Checkpoints, what it writes to o [ceil(T / C), B, Hv, Dv, Dk] float32 is S before each chunk,
// and q is not read.
//
// Template: OutT, Dk, Dv, C, Bands, HasMask, Checkpoints, HasD. Grid (32 Bands, Dv / (8 Bands), B Hv).
constexpr int row_size = Dk + 4;  // rows of q and k, padded against bank conflicts
constexpr int chunk_tiles = C / 8;
constexpr int key_tiles = Dk / 8;
constexpr int threads = 32 * Bands;

threadgroup float q_chunk[C * row_size];
threadgroup float k_chunk[C * row_size];
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
UNROLL
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
  if (Checkpoints) {
    const size_t heads = size_t(start / C) * threadgroups_per_grid.z;
    device float* states = (device float*)o + heads * Dv * Dk + state_at;
    UNROLL
    for (int i = 0; i < key_tiles; ++i) {
      simdgroup_store(S[i], states + 8 * i, Dk, ulong2(0, 0), true);
    }
  }

  // Padding, and what follows the last token, has a = 1 and b = 0.
  for (int i = index; i < C * Dk; i += threads) {
    const int t = i / Dk;
    const int d = i % Dk;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = ((token + t) * Hk + hk) * Dk + d;
    if (!Checkpoints) q_chunk[t * row_size + d] = real ? static_cast<float>(q[at]) : 0.0f;
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
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    for (int j = 0; j <= i && !Checkpoints; ++j, ++job) {
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
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    q_S[i] = simdgroup_float8x8(0.0f);
    UNROLL
    for (int j = 0; j < (Checkpoints ? 0 : key_tiles); ++j) {
      simdgroup_float8x8 x;
      simdgroup_load(x, q_chunk + 8 * i * row_size + 8 * j, row_size);
      simdgroup_multiply_accumulate(q_S[i], x, S[j], q_S[i]);
    }
  }
  float value[C / 4];  // of v: the elements of the band that this lane reads and writes
  UNROLL
  for (int i = 0; i < C / 4; ++i) {
    const int t = 4 * i + lane / 8;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = ((token + t) * Hv + hv) * Dv + column + lane % 8;
    value[i] = real ? static_cast<float>(v[at]) : 0.0f;
    band[32 * i + lane] = beta_chunk[t] * value[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  simdgroup_float8x8 U[chunk_tiles];
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) simdgroup_load(U[i], band + 64 * i, 8);
  simdgroup_barrier(mem_flags::mem_threadgroup);  // U is read before O takes its place
  UNROLL
  for (int i = 0; i < (Checkpoints ? 0 : chunk_tiles); ++i) {
    simdgroup_float8x8 x, out;
    simdgroup_load(x, start_diagonal + 64 * i, 8);
    simdgroup_multiply(out, x, q_S[i]);
    UNROLL
    for (int j = 0; j < chunk_tiles; ++j) {
      if (j > i) continue;
      simdgroup_load(x, P + 8 * i * C + 8 * j, C);
      simdgroup_multiply_accumulate(out, x, U[j], out);
    }
    simdgroup_store(out, band + 64 * i, 8);
  }
  const float through = start_diagonal[8 * C - 1];  // exp(G_end)
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    simdgroup_float8x8 x;
    simdgroup_load(x, end_diagonal + 64 * i, 8);
    simdgroup_multiply(U[i], x, U[i]);
  }
  UNROLL
  for (int j = 0; j < key_tiles; ++j) {
    S[j].thread_elements()[0] *= through;
    S[j].thread_elements()[1] *= through;
    UNROLL
    for (int i = 0; i < chunk_tiles; ++i) {
      simdgroup_float8x8 x;
      simdgroup_load(x, k_chunk + 8 * i * row_size + 8 * j, row_size, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(S[j], x, U[i], S[j]);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int i = 0; i < C / 4; ++i) {
    const int t = 4 * i + lane / 8;
    if (!Checkpoints && start + t < T) {
      const bool real = !HasMask || mask[token + t];
      const size_t at = ((token + t) * Hv + hv) * Dv + column + lane % 8;
      const float out = band[32 * i + lane] + (HasD ? static_cast<float>(D[hv]) * value[i] : 0.0f);
      o[at] = static_cast<OutT>(real ? out : 0.0f);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
UNROLL
for (int i = 0; i < key_tiles; ++i) {
  simdgroup_store(S[i], state_out + state_at + 8 * i, Dk, ulong2(0, 0), true);
}

// kernel ssd_backward(q, k, v, g, beta, states, d_o, d_state_out, mask, T, Hk, Hv, D) -> (d_q, d_k, d_v, d_g, d_beta, d_state, d_D)

// Gradients of o and of the last state, from S before each chunk of 8 tokens (`states`, by
// ssd_prefill). A threadgroup owns one head and BV rows of S. Every gradient is a sum over
// the rows, so that blocks of rows leave partial sums: d_q, d_k [blocks, B, T, Hv, Dk], d_g,
// d_beta [blocks, B, T, Hv] and d_D [blocks, B, Hv]; d_v and d_state are whole. dS lives in
// d_state, chunk after chunk.
//
// In a chunk, with e_t = exp(G_t), f_t = exp(G_end - G_t), L_tj = exp(G_t - G_j), U = b V and the
// skip D:
//
//   dU = P^T dO + f K dS'^T,   dV = b dU + D dO,   db_t = dU_t.V_t,   dD = sum_t dO_t.V_t
//   dP = dO U^T (j <= t),      dQ = e dO S + (L dP) K,    dK = f U dS' + (L dP)^T Q
//   dS = exp(G_end) dS' + dO^T (e Q)
//
// and each g_r gathers what every decay that spans it brings: the factor times its gradient.
//
// Template: Dk, Dv, BV, SimdGroups, HasMask, HasD. Grid (32 SimdGroups, Dv / BV, B Hv).
constexpr int C = 8;
constexpr int key_row = Dk + 4;  // rows of threadgroup arrays, padded against bank conflicts
constexpr int value_row = BV + 4;
constexpr int threads = 32 * SimdGroups;

threadgroup float q_chunk[C * key_row];
threadgroup float k_chunk[C * key_row];
threadgroup float d_o_chunk[C * value_row];
threadgroup float U[C * value_row];   // V, then U
threadgroup float dU[C * value_row];  // f K dS'^T
threadgroup float g_chunk[C];
threadgroup float beta_chunk[C];
threadgroup float start_diagonal[64];  // e and f as diagonal tiles
threadgroup float end_diagonal[64];
threadgroup float P[64];
threadgroup float dP[64];  // L dP
threadgroup float d_log_L[64];
threadgroup float scratch[SimdGroups * 128];
threadgroup float e_part[SimdGroups * 64];        // d log e_t, one for each lane's element
threadgroup float f_part[SimdGroups * C];         // d log f_t
threadgroup float beta_part[SimdGroups * C];
threadgroup float through_part[SimdGroups];       // d log exp(G_end)
threadgroup float D_part[SimdGroups];

const int index = thread_index_in_threadgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int n = threadgroup_position_in_grid.z;
const int b = n / Hv;
const int hv = n % Hv;
const int hk = hv / (Hv / Hk);
const int block = threadgroup_position_in_grid.y;
const int heads = threadgroups_per_grid.z;
const int batch = heads / Hv;
const size_t state_at = (size_t(n) * Dv + block * BV) * Dk;
device float* dS = d_state + state_at;
threadgroup float* raw = scratch + 128 * simd_index;
threadgroup float* rest = raw + 64;
const float skip = HasD ? static_cast<float>(D[hv]) : 0.0f;
float D_sum = 0.0f;  // over all chunks

for (int i = index; i < BV * Dk; i += threads) dS[i] = static_cast<float>(d_state_out[state_at + i]);
for (int i = index; i < 64; i += threads) {
  start_diagonal[i] = 0.0f;
  end_diagonal[i] = 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);

for (int chunk = (T + C - 1) / C - 1; chunk >= 0; --chunk) {
  const int start = chunk * C;
  const size_t token = size_t(b) * T + start;
  const device float* S = states + size_t(chunk) * heads * Dv * Dk + state_at;

  for (int i = index; i < C * Dk; i += threads) {
    const int t = i / Dk;
    const int d = i % Dk;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = ((token + t) * Hk + hk) * Dk + d;
    q_chunk[t * key_row + d] = real ? static_cast<float>(q[at]) : 0.0f;
    k_chunk[t * key_row + d] = real ? static_cast<float>(k[at]) : 0.0f;
  }
  for (int i = index; i < C * BV; i += threads) {
    const int t = i / BV;
    const int d = i % BV;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = ((token + t) * Hv + hv) * Dv + block * BV + d;
    U[t * value_row + d] = real ? static_cast<float>(v[at]) : 0.0f;
    d_o_chunk[t * value_row + d] = real ? static_cast<float>(d_o[at]) : 0.0f;
  }
  for (int t = index; t < C; t += threads) {
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = (token + t) * Hv + hv;
    g_chunk[t] = real ? static_cast<float>(g[at]) : 0.0f;
    beta_chunk[t] = real ? static_cast<float>(beta[at]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // f K dS'^T, a SIMD group for each 8 rows of S; P.
  for (int t = index; t < C; t += threads) {
    start_diagonal[9 * t] = decay(g_chunk, 0, t);
    end_diagonal[9 * t] = decay(g_chunk, t + 1, C - 1);
  }
  float through = 0.0f;
  for (int row = 8 * simd_index; row < BV; row += 8 * SimdGroups) {
    simdgroup_float8x8 k_dS(0.0f);
    for (int d = 0; d < Dk; d += 8) {
      simdgroup_float8x8 x, y, z;
      simdgroup_load(x, k_chunk + d, key_row);
      simdgroup_load(y, S + row * Dk + d, Dk, ulong2(0, 0), true);
      simdgroup_load(z, dS + row * Dk + d, Dk, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(k_dS, x, z, k_dS);
      through += y.thread_elements()[0] * z.thread_elements()[0] +
                 y.thread_elements()[1] * z.thread_elements()[1];
    }
    simdgroup_store(k_dS, raw, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < 64; e += 32) {
      const int t = e / 8;
      const int at = t * value_row + row + e % 8;
      dU[at] = decay(g_chunk, t + 1, C - 1) * raw[e];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  through = simd_sum(through);
  if (lane == 0) through_part[simd_index] = through;
  if (simd_index == 0) {
    simdgroup_float8x8 product(0.0f);
    for (int d = 0; d < Dk; d += 8) {
      simdgroup_float8x8 x, y;
      simdgroup_load(x, q_chunk + d, key_row);
      simdgroup_load(y, k_chunk + d, key_row, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(product, x, y, product);
    }
    simdgroup_store(product, P, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < 64; e += 32) {
      const int t = e / 8;
      const int s = e % 8;
      P[e] = s <= t ? decay(g_chunk, s + 1, t) * P[e] : 0.0f;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // U and the rest of dU, a thread for each row of S.
  float beta_sum[C];
  float f_sum[C];
  UNROLL
  for (int t = 0; t < C; ++t) {
    beta_sum[t] = 0.0f;
    f_sum[t] = 0.0f;
  }
  for (int d = index; d < BV; d += threads) {
    UNROLL
    for (int t = 0; t < C; ++t) {
      const float value = U[t * value_row + d];
      float du = dU[t * value_row + d];
      U[t * value_row + d] = beta_chunk[t] * value;
      f_sum[t] += beta_chunk[t] * value * du;
      UNROLL
      for (int s = 0; s < C; ++s) {
        if (s >= t) du = fma(P[8 * s + t], d_o_chunk[s * value_row + d], du);
      }
      beta_sum[t] += du * value;
      const float d_out = d_o_chunk[t * value_row + d];
      D_sum += d_out * value;
      if (start + t < T) {
        d_v[((token + t) * Hv + hv) * Dv + block * BV + d] = beta_chunk[t] * du + skip * d_out;
      }
    }
  }
  UNROLL
  for (int t = 0; t < C; ++t) {
    const float beta_all = simd_sum(beta_sum[t]);
    const float f_all = simd_sum(f_sum[t]);
    if (lane == 0) {
      beta_part[C * simd_index + t] = beta_all;
      f_part[C * simd_index + t] = f_all;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (simd_index == 0) {
    simdgroup_float8x8 product(0.0f);
    for (int d = 0; d < BV; d += 8) {
      simdgroup_float8x8 x, y;
      simdgroup_load(x, d_o_chunk + d, value_row);
      simdgroup_load(y, U + d, value_row, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(product, x, y, product);
    }
    simdgroup_store(product, dP, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < 64; e += 32) {
      const int t = e / 8;
      const int s = e % 8;
      const float entry = s <= t ? dP[e] : 0.0f;
      d_log_L[e] = P[e] * entry;
      dP[e] = decay(g_chunk, s + 1, t) * entry;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);

  // dQ, dK and dS before the chunk, a SIMD group for each 8 columns of S.
  const float through_all = start_diagonal[63];  // exp(G_end)
  float e_sum[2] = {0.0f, 0.0f};
  for (int column = 8 * simd_index; column < Dk; column += 8 * SimdGroups) {
    simdgroup_float8x8 from_S(0.0f);
    simdgroup_float8x8 from_dS(0.0f);
    simdgroup_float8x8 x, y, e_q;
    simdgroup_load(x, start_diagonal, 8);
    simdgroup_load(e_q, q_chunk + column, key_row);
    simdgroup_multiply(e_q, x, e_q);
    for (int row = 0; row < BV; row += 8) {
      simdgroup_load(x, d_o_chunk + row, value_row);
      simdgroup_load(y, S + row * Dk + column, Dk);
      simdgroup_multiply_accumulate(from_S, x, y, from_S);
      simdgroup_load(x, U + row, value_row);
      simdgroup_load(y, dS + row * Dk + column, Dk);
      simdgroup_multiply_accumulate(from_dS, x, y, from_dS);
      y.thread_elements()[0] *= through_all;
      y.thread_elements()[1] *= through_all;
      simdgroup_load(x, d_o_chunk + row, value_row, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(y, x, e_q, y);
      simdgroup_store(y, dS + row * Dk + column, Dk);
    }
    for (int which = 0; which < 2; ++which) {  // dK, dQ
      simdgroup_float8x8 sum(0.0f);
      // macOS 14 and 15 want a transpose flag that is a constant.
      if (which) {
        simdgroup_load(x, dP, 8);
        simdgroup_load(y, k_chunk + column, key_row);
      } else {
        simdgroup_load(x, dP, 8, ulong2(0, 0), true);
        simdgroup_load(y, q_chunk + column, key_row);
      }
      simdgroup_multiply_accumulate(sum, x, y, sum);
      if (!which) {
        simdgroup_load(x, end_diagonal, 8);
        simdgroup_multiply_accumulate(sum, x, from_dS, sum);
      }
      simdgroup_store(from_S, raw, 8);
      simdgroup_store(sum, rest, 8);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      UNROLL
      for (int i = 0; i < 2; ++i) {
        const int e = lane + 32 * i;
        const int t = e / 8;
        const int d = column + e % 8;
        const float scaled = which ? start_diagonal[9 * t] * raw[e] : 0.0f;
        e_sum[i] += scaled * q_chunk[t * key_row + d];
        if (start + t < T) {
          const bool real = !HasMask || mask[token + t];
          const size_t row = (size_t(block) * batch * T + token + t) * Hv + hv;
          (which ? d_q : d_k)[row * Dk + d] = real ? scaled + rest[e] : 0.0f;
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
  UNROLL
  for (int i = 0; i < 2; ++i) e_part[64 * simd_index + lane + 32 * i] = e_sum[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // d_beta and d_g, a thread for each token.
  for (int r = index; r < C; r += threads) {
    float sum_beta = 0.0f;
    float sum_g = 0.0f;
    for (int i = 0; i < SimdGroups; ++i) {
      sum_beta += beta_part[C * i + r];
      sum_g += start_diagonal[63] * through_part[i];
      for (int t = 0; t < r; ++t) sum_g += f_part[C * i + t];
      for (int e = 8 * r; e < 64; ++e) sum_g += e_part[64 * i + e];
    }
    for (int t = r; t < C; ++t) {
      for (int s = 0; s < r; ++s) sum_g += d_log_L[8 * t + s];
    }
    if (start + r < T) {
      const bool real = !HasMask || mask[token + r];
      const size_t at = (size_t(block) * batch * T + token + r) * Hv + hv;
      d_beta[at] = real ? sum_beta : 0.0f;
      d_g[at] = real ? sum_g : 0.0f;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
}
D_sum = simd_sum(D_sum);
if (lane == 0) D_part[simd_index] = D_sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (index == 0) {
  float sum = 0.0f;
  for (int i = 0; i < SimdGroups; ++i) sum += D_part[i];
  d_D[block * heads + n] = sum;
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
for (int row = simd_index; row < Dv; row += SimdGroups) {
  const size_t at = (size_t(n) * Dv + row) * Dk;
  const device float4* from = (const device float4*)(state + at);
  device float4* to = (device float4*)(state_out + at);
  const float value = inputs[row];
  float out = 0.0f;
  UNROLL
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
