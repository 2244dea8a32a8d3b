// The gated delta rule, S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t.
//
// q, k [B, T, Hk, Dk], v, o [B, T, Hv, Dv], g = log a and beta [B, T, Hv], S [B, Hv, Dv, Dk].
// All arithmetic and S are float32. Dk and Dv are multiples of 8.

#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// Arrays that stay in registers need loops without a counter, of a fixed number of rounds.
#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr float kNormEps = 1e-6f;  // of the L2 norm of q and k

inline float sigmoid(float x) { return 1.0f / (1.0f + precise::exp(-x)); }
inline float silu(float x) { return x * sigmoid(x); }
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

// kernel gated_delta_prefill(q, k, v, g, beta, state, mask, T, Hk, Hv) -> (o, state_out)

// Any number of tokens, in chunks of C (8 or 16). A threadgroup owns one head and 8 * Bands rows
// of S, a SIMD group 8 of those rows, which stay in its registers as the tiles of their transpose.
// In a chunk, with G_t = g_0 + ... + g_t and u_t what the rule really writes (the WY form):
//
//   (I + A) U = b (V - exp(G) K S^T),     A_tj = b_t exp(G_t - G_j) k_t.k_j  for j < t
//   O = exp(G) Q S^T + P U,               P_tj = exp(G_t - G_j) q_t.k_j      for j <= t
//   S = exp(G_end) S + U^T (exp(G_end - G) K)
//
// With Checkpoints, what it writes to o [ceil(T / C), B, Hv, Dv, Dk] float32 is S before each chunk,
// and q is not read.
//
// Template: OutT, Dk, Dv, C, Bands, HasMask, Checkpoints. Grid (32 Bands, Dv / (8 Bands), B Hv).
constexpr int row_size = Dk + 4;  // rows of q and k, padded against bank conflicts
constexpr int chunk_tiles = C / 8;
constexpr int key_tiles = Dk / 8;
constexpr int threads = 32 * Bands;

threadgroup float q_chunk[C * row_size];
threadgroup float k_chunk[C * row_size];
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
    from_start[t] = decay(g_chunk, 0, t);
    start_diagonal[at] = decay(g_chunk, 0, t);
    end_diagonal[at] = decay(g_chunk, t + 1, C - 1);
  }

  // The tiles of A and P on and below the diagonal, shared out among the SIMD groups.
  int job = 0;
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    UNROLL
    for (int j = 0; j < chunk_tiles; ++j) {
      if (j > i) continue;
      for (int which = 0; which < (Checkpoints ? 1 : 2); ++which, ++job) {
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
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    k_S[i] = simdgroup_float8x8(0.0f);
    q_S[i] = simdgroup_float8x8(0.0f);
    UNROLL
    for (int j = 0; j < key_tiles; ++j) {
      simdgroup_float8x8 x;
      simdgroup_load(x, k_chunk + 8 * i * row_size + 8 * j, row_size);
      simdgroup_multiply_accumulate(k_S[i], x, S[j], k_S[i]);
      if (Checkpoints) continue;
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
    UNROLL
    for (int t = 0; t < C; ++t) {
      u[t] = band[8 * t + lane];
      UNROLL
      for (int s = 0; s < C; ++s) {
        if (s < t) u[t] = fma(-A[t * C + s], u[s], u[t]);
      }
      band[8 * t + lane] = u[t];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

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
  const float through = from_start[C - 1];
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
  for (int e = lane; e < 8 * C; e += 32) {
    const int t = e / 8;
    if (!Checkpoints && start + t < T) {
      const bool real = !HasMask || mask[token + t];
      const size_t at = ((token + t) * Hv + hv) * Dv + column + e % 8;
      o[at] = static_cast<OutT>(real ? band[e] : 0.0f);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
UNROLL
for (int i = 0; i < key_tiles; ++i) {
  simdgroup_store(S[i], state_out + state_at + 8 * i, Dk, ulong2(0, 0), true);
}

// kernel gated_delta_backward(q, k, v, g, beta, states, d_o, d_state_out, mask, T, Hk, Hv) -> (d_q, d_k, d_v, d_g, d_beta, d_state)

// Gradients of o and of the last state, from S before each chunk of 8 tokens (`states`, by
// gated_delta_prefill). A threadgroup owns one head and BV rows of S. Every gradient is a sum over
// the rows, so that blocks of rows leave partial sums: d_q, d_k [blocks, B, T, Hv, Dk] and d_g,
// d_beta [blocks, B, T, Hv]; d_v and d_state are whole. dS lives in d_state, chunk after chunk.
//
// In a chunk, with e_t = exp(G_t), f_t = exp(G_end - G_t), D_tj = exp(G_t - G_j) and with the
// forward pass's R = V - e K S^T, Y = U / b = R - N U, N_tj = D_tj k_t.k_j (j < t):
//
//   dU = P^T dO + f K dS'^T - N^T dY,   dY = b dU (solved from the last token back),   dV = dY
//   db_t = dU_t.Y_t,   dP = dO U^T (j <= t),   dN = -dY U^T (j < t)
//   dQ = e dO S + (D dP) K
//   dK = -e dY S + f U dS' + (D dP)^T Q + (D dN + (D dN)^T) K
//   dS = exp(G_end) dS' + dO^T (e Q) - dY^T (e K)
//
// and each g_r gathers what every decay that spans it brings: the factor times its gradient.
//
// Template: Dk, Dv, BV, SimdGroups, HasMask. Grid (32 SimdGroups, Dv / BV, B Hv).
constexpr int C = 8;
constexpr int key_row = Dk + 4;  // rows of threadgroup arrays, padded against bank conflicts
constexpr int value_row = BV + 4;
constexpr int threads = 32 * SimdGroups;

threadgroup float q_chunk[C * key_row];
threadgroup float k_chunk[C * key_row];
threadgroup float d_o_chunk[C * value_row];
threadgroup float U[C * value_row];   // V, then R, then U
threadgroup float dY[C * value_row];  // f K dS'^T, then dY
threadgroup float g_chunk[C];
threadgroup float beta_chunk[C];
threadgroup float start_diagonal[64];  // e and f as diagonal tiles
threadgroup float end_diagonal[64];
threadgroup float N[64];
threadgroup float P[64];
threadgroup float dN[64];  // D dN and D dP
threadgroup float dP[64];
threadgroup float d_log_D[128];       // of N, then of P
threadgroup float scratch[SimdGroups * 128];
threadgroup float e_part[SimdGroups * 64];        // d log e_t, one for each lane's element
threadgroup float f_part[SimdGroups * C];         // d log f_t
threadgroup float beta_part[SimdGroups * C];
threadgroup float through_part[SimdGroups];       // d log exp(G_end)

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

  // R and f K dS'^T, a SIMD group for each 8 rows of S; N and P.
  for (int t = index; t < C; t += threads) {
    start_diagonal[9 * t] = decay(g_chunk, 0, t);
    end_diagonal[9 * t] = decay(g_chunk, t + 1, C - 1);
  }
  float through = 0.0f;
  for (int row = 8 * simd_index; row < BV; row += 8 * SimdGroups) {
    simdgroup_float8x8 k_S(0.0f);
    simdgroup_float8x8 k_dS(0.0f);
    for (int d = 0; d < Dk; d += 8) {
      simdgroup_float8x8 x, y, z;
      simdgroup_load(x, k_chunk + d, key_row);
      simdgroup_load(y, S + row * Dk + d, Dk, ulong2(0, 0), true);
      simdgroup_load(z, dS + row * Dk + d, Dk, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(k_S, x, y, k_S);
      simdgroup_multiply_accumulate(k_dS, x, z, k_dS);
      through += y.thread_elements()[0] * z.thread_elements()[0] +
                 y.thread_elements()[1] * z.thread_elements()[1];
    }
    simdgroup_store(k_S, raw, 8);
    simdgroup_store(k_dS, rest, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < 64; e += 32) {
      const int t = e / 8;
      const int at = t * value_row + row + e % 8;
      U[at] -= decay(g_chunk, 0, t) * raw[e];
      dY[at] = decay(g_chunk, t + 1, C - 1) * rest[e];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  through = simd_sum(through);
  if (lane == 0) through_part[simd_index] = through;
  for (int which = simd_index; which < 2; which += SimdGroups) {
    const threadgroup float* left = which ? q_chunk : k_chunk;
    threadgroup float* tile = which ? P : N;
    simdgroup_float8x8 product(0.0f);
    for (int d = 0; d < Dk; d += 8) {
      simdgroup_float8x8 x, y;
      simdgroup_load(x, left + d, key_row);
      simdgroup_load(y, k_chunk + d, key_row, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(product, x, y, product);
    }
    simdgroup_store(product, tile, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < 64; e += 32) {
      const int t = e / 8;
      const int s = e % 8;
      tile[e] = s < t + which ? decay(g_chunk, s + 1, t) * tile[e] : 0.0f;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // U forward and dY backward in time, a thread for each row of S.
  float beta_sum[C];
  float f_sum[C];
  UNROLL
  for (int t = 0; t < C; ++t) {
    beta_sum[t] = 0.0f;
    f_sum[t] = 0.0f;
  }
  for (int d = index; d < BV; d += threads) {
    float u[C];
    float y[C];
    float dy[C];
    UNROLL
    for (int t = 0; t < C; ++t) {
      y[t] = U[t * value_row + d];
      UNROLL
      for (int s = 0; s < C; ++s) {
        if (s < t) y[t] = fma(-N[8 * t + s], u[s], y[t]);
      }
      u[t] = beta_chunk[t] * y[t];
      U[t * value_row + d] = u[t];
    }
    UNROLL
    for (int t = C - 1; t >= 0; --t) {
      float du = dY[t * value_row + d];
      f_sum[t] += u[t] * du;
      UNROLL
      for (int s = 0; s < C; ++s) {
        if (s >= t) du = fma(P[8 * s + t], d_o_chunk[s * value_row + d], du);
      }
      UNROLL
      for (int s = 0; s < C; ++s) {
        if (s > t) du = fma(-N[8 * s + t], dy[s], du);
      }
      beta_sum[t] += du * y[t];
      dy[t] = beta_chunk[t] * du;
      dY[t * value_row + d] = dy[t];
      if (start + t < T) d_v[((token + t) * Hv + hv) * Dv + block * BV + d] = dy[t];
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

  // dN and dP.
  for (int which = simd_index; which < 2; which += SimdGroups) {
    const threadgroup float* left = which ? d_o_chunk : dY;
    threadgroup float* tile = which ? dP : dN;
    simdgroup_float8x8 product(0.0f);
    for (int d = 0; d < BV; d += 8) {
      simdgroup_float8x8 x, y;
      simdgroup_load(x, left + d, value_row);
      simdgroup_load(y, U + d, value_row, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(product, x, y, product);
    }
    simdgroup_store(product, tile, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < 64; e += 32) {
      const int t = e / 8;
      const int s = e % 8;
      const float entry = s < t + which ? (which ? tile[e] : -tile[e]) : 0.0f;
      d_log_D[64 * which + e] = (which ? P : N)[e] * entry;
      tile[e] = decay(g_chunk, s + 1, t) * entry;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);

  // dQ, dK and dS before the chunk, a SIMD group for each 8 columns of S.
  const float through_all = start_diagonal[63];  // exp(G_end)
  float e_sum[2] = {0.0f, 0.0f};
  for (int column = 8 * simd_index; column < Dk; column += 8 * SimdGroups) {
    simdgroup_float8x8 k_from_S(0.0f);
    simdgroup_float8x8 q_from_S(0.0f);
    simdgroup_float8x8 from_dS(0.0f);
    simdgroup_float8x8 x, y, e_q, e_k;
    simdgroup_load(x, start_diagonal, 8);
    simdgroup_load(e_q, q_chunk + column, key_row);
    simdgroup_load(e_k, k_chunk + column, key_row);
    simdgroup_multiply(e_q, x, e_q);
    simdgroup_multiply(e_k, x, e_k);
    e_k.thread_elements()[0] *= -1.0f;
    e_k.thread_elements()[1] *= -1.0f;
    for (int row = 0; row < BV; row += 8) {
      simdgroup_load(y, S + row * Dk + column, Dk);
      simdgroup_load(x, dY + row, value_row);
      simdgroup_multiply_accumulate(k_from_S, x, y, k_from_S);
      simdgroup_load(x, d_o_chunk + row, value_row);
      simdgroup_multiply_accumulate(q_from_S, x, y, q_from_S);
      simdgroup_load(x, U + row, value_row);
      simdgroup_load(y, dS + row * Dk + column, Dk);
      simdgroup_multiply_accumulate(from_dS, x, y, from_dS);
      y.thread_elements()[0] *= through_all;
      y.thread_elements()[1] *= through_all;
      simdgroup_load(x, d_o_chunk + row, value_row, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(y, x, e_q, y);
      simdgroup_load(x, dY + row, value_row, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(y, x, e_k, y);
      simdgroup_store(y, dS + row * Dk + column, Dk);
    }
    for (int which = 0; which < 2; ++which) {  // dK, dQ
      simdgroup_float8x8 sum(0.0f);
      simdgroup_load(y, k_chunk + column, key_row);
      simdgroup_load(x, which ? dP : dN, 8);
      simdgroup_multiply_accumulate(sum, x, y, sum);
      if (!which) {
        simdgroup_load(x, dN, 8, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, x, y, sum);
        simdgroup_load(y, q_chunk + column, key_row);
        simdgroup_load(x, dP, 8, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, x, y, sum);
        simdgroup_load(x, end_diagonal, 8);
        simdgroup_multiply_accumulate(sum, x, from_dS, sum);
      }
      if (which) {
        simdgroup_store(q_from_S, raw, 8);
      } else {
        simdgroup_store(k_from_S, raw, 8);
      }
      simdgroup_store(sum, rest, 8);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      UNROLL
      for (int i = 0; i < 2; ++i) {
        const int e = lane + 32 * i;
        const int t = e / 8;
        const int d = column + e % 8;
        const float scaled = (which ? 1.0f : -1.0f) * start_diagonal[9 * t] * raw[e];
        e_sum[i] += scaled * (which ? q_chunk : k_chunk)[t * key_row + d];
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
      for (int s = 0; s < r; ++s) sum_g += d_log_D[8 * t + s] + d_log_D[64 + 8 * t + s];
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

// kernel gated_delta_step(qkv, z, ba, conv, conv_weight, A_log, dt_bias, norm_weight, norm_eps, state, Hk, Hv) -> (o, conv_out, state_out)

// One token of the whole mixer between its projections, one threadgroup for each head: the short
// convolution of qkv [B, 2 Hk Dk + Hv Dv] with its last inputs conv [B, K - 1, channels] and taps
// conv_weight [channels, K], silu, the L2 norm of q and k and q's scale Dk^-0.5, beta and g from
// ba [B, 2 Hv] (b, then a), the delta update, the read-out, RMSNorm times silu(z), z [B, Hv, Dv].
//
// Template: OutT, ConvT, Dk, Dv, K, SimdGroups. Grid (32 SimdGroups, 1, B Hv).
constexpr int parts = (Dk + 127) / 128;  // float4s of a row of S that a lane holds
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
for (int row = simd_index; row < Dv; row += SimdGroups) {
  const size_t at = (size_t(n) * Dv + row) * Dk;
  const device float4* from = (const device float4*)(state + at);
  device float4* to = (device float4*)(state_out + at);
  float4 S[parts];
  float held = 0.0f;
  float out = 0.0f;
  UNROLL
  for (int i = 0; i < parts; ++i) {
    const int d = 128 * i + 4 * lane;
    S[i] = d < Dk ? a * from[d / 4] : float4(0.0f);
    held += dot(S[i], k4[i]);
    out += dot(S[i], q4[i]);
  }
  const float u = beta * (inputs[2 * Dk + row] - simd_sum(held));
  out = simd_sum(out) + u * kq;  // (S + u k^T) q
  UNROLL
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
