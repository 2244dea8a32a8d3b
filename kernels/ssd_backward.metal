// The gated Hebbian rule of Mamba-2 (SSD), S_t = a_t S_{t-1} + b_t v_t k_t^T and o_t = S_t q_t.
//
// q, k [B, T, Hk, Dk], v, o [B, T, Hv, Dv], g = log a and beta [B, T, Hv], S [B, Hv, Dv, Dk]; in
// Mamba-2's letters C, B, x, dt A, dt. All arithmetic and S are float32. Dk and Dv are multiples
// of 8.

#include "common.metal"

// kernel ssd_backward(q, k, v, g, beta, states, d_o, d_state_out, mask, T, Hk, Hv, D) -> (d_q, d_k, d_v, d_g, d_beta, d_state, d_D)

// Gradients of o and of the last state, from S before every 2 C tokens (`states`, by ssd_prefill).
// A threadgroup owns one head and BV rows of S, a SIMD group 8 * Tiles columns of these rows, of
// which dS stays in its registers. Every gradient is a sum over the rows, so that blocks of rows
// leave partial sums: d_q, d_k [blocks, B, T, Hv, Dk], d_g, d_beta [blocks, B, T, Hv] and d_D
// [blocks, B, Hv]; d_v and d_state are whole.
//
// In a chunk, with e_t = exp(G_t), f_t = exp(G_end - G_t), L_tj = exp(G_t - G_j), U = b V and the
// skip D:
//
//   dU = P^T dO + f K dS'^T,   dV = b dU + D dO,   db_t = dU_t.V_t,   dD = sum_t dO_t.V_t
//   dP = dO U^T (j <= t),      dQ = e dO S + (L dP) K,    dK = f U dS' + (L dP)^T Q
//   dS = exp(G_end) dS' + dO^T (e Q)
//
// and each g_r gathers what every decay that spans it brings: the factor times its gradient. S of
// every second chunk is made of the chunk before it, S_1 = exp(G_end) S_0 + V^T (f b K).
//
// Template: Dk, Dv, BV, C, Groups, Tiles, HasMask, HasD. Grid (32 Groups, blocks of Dv, B Hv).
constexpr int chunk_tiles = C / 8;
constexpr int pairs = chunk_tiles * (chunk_tiles + 1) / 2;  // tiles on and below the diagonal
constexpr int value_row = BV + 4;  // rows of threadgroup arrays, padded against bank conflicts
constexpr int value_tiles = BV / 8;
constexpr int share = (value_tiles + Groups - 1) / Groups;  // of these, a SIMD group's in turn
constexpr int threads = 32 * Groups;

threadgroup float d_o_chunk[C * value_row];
threadgroup float V[C * value_row];
threadgroup float dU[C * value_row];  // K dS'^T
threadgroup float P[64 * pairs];
threadgroup float dP[64 * pairs];  // L dP
threadgroup float d_log_L[64 * pairs];
threadgroup float g_chunk[C];
threadgroup float beta_chunk[C];
threadgroup float g_before[C];  // of the chunk before
threadgroup float beta_before[C];
threadgroup float from_start[C];  // e and f
threadgroup float to_end[C];
threadgroup float write_before[C];           // f b of the chunk before
threadgroup float e_part[Groups * C];        // d log e_t
threadgroup float f_part[Groups * C];        // d log f_t
threadgroup float beta_part[Groups * C];
threadgroup float through_part[Groups];      // d log exp(G_end)
threadgroup float D_part[Groups];

const int index = thread_index_in_threadgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int lane_row = row_of(lane);
const int lane_column = column_of(lane);
const int n = threadgroup_position_in_grid.z;
const int b = n / Hv;
const int hv = n % Hv;
const int hk = hv / (Hv / Hk);
const int block = threadgroup_position_in_grid.y;
const int rows = min(BV, Dv - block * BV);
const int heads = threadgroups_per_grid.z;
const int batch = heads / Hv;
const int first_key = 8 * Tiles * simd_index;
const size_t state_at = (size_t(n) * Dv + block * BV) * Dk + first_key;
const float skip = HasD ? static_cast<float>(D[hv]) : 0.0f;
float D_sum = 0.0f;  // over all chunks

simdgroup_float8x8 dS[value_tiles][Tiles];
UNROLL
for (int r = 0; r < value_tiles; ++r) {
  UNROLL
  for (int c = 0; c < Tiles; ++c) {
    dS[r][c] = simdgroup_float8x8(0.0f);
    if (8 * r < rows && first_key + 8 * c < Dk) {
      simdgroup_load(dS[r][c], d_state_out + state_at + 8 * r * Dk + 8 * c, Dk);
    }
  }
}

for (int chunk = (T + C - 1) / C - 1; chunk >= 0; --chunk) {
  const int start = chunk * C;
  const size_t token = size_t(b) * T + start;
  const bool second = chunk % 2 == 1;  // S is not kept, but made of the chunk before
  const device float* S = states + size_t(chunk / 2) * heads * Dv * Dk + state_at;

  for (int i = index; i < C * BV; i += threads) {
    const int t = i / BV;
    const int d = i % BV;
    const bool real = d < rows && start + t < T && (!HasMask || mask[token + t]);
    const size_t at = ((token + t) * Hv + hv) * Dv + block * BV + d;
    V[t * value_row + d] = real ? static_cast<float>(v[at]) : 0.0f;
    d_o_chunk[t * value_row + d] = real ? static_cast<float>(d_o[at]) : 0.0f;
  }
  for (int t = index; t < C; t += threads) {
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const bool real_before = second && (!HasMask || mask[token - C + t]);
    const size_t at = (token + t) * Hv + hv;
    g_chunk[t] = real ? static_cast<float>(g[at]) : 0.0f;
    beta_chunk[t] = real ? static_cast<float>(beta[at]) : 0.0f;
    g_before[t] = real_before ? static_cast<float>(g[at - C * Hv]) : 0.0f;
    beta_before[t] = real_before ? static_cast<float>(beta[at - C * Hv]) : 0.0f;
  }
  simdgroup_float8x8 q_tiles[chunk_tiles][Tiles];  // of this SIMD group's columns
  simdgroup_float8x8 k_tiles[chunk_tiles][Tiles];
  simdgroup_float8x8 k_transposed[chunk_tiles][Tiles];
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    const int t = 8 * i + lane_row;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    UNROLL
    for (int c = 0; c < Tiles; ++c) {
      const int key = first_key + 8 * c;
      const size_t at = ((token + t) * Hk + hk) * Dk + key + lane_column;
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int s = 8 * i + lane_column + e;
        const bool real_s = start + s < T && (!HasMask || mask[token + s]);
        q_tiles[i][c].thread_elements()[e] =
            real && key < Dk ? static_cast<float>(q[at + e]) : 0.0f;
        k_tiles[i][c].thread_elements()[e] =
            real && key < Dk ? static_cast<float>(k[at + e]) : 0.0f;
        k_transposed[i][c].thread_elements()[e] =
            real_s && key < Dk
                ? static_cast<float>(k[((token + s) * Hk + hk) * Dk + key + lane_row])
                : 0.0f;
      }
    }
  }

  // K dS'^T and Q K^T are sums over all columns. In each round a SIMD group adds its own to
  // another share of them.
  for (int round = 0; round < Groups; ++round) {
    const int turn = (simd_index + round) % Groups;
    UNROLL
    for (int r = 0; r < value_tiles; ++r) {
      if (r / share != turn) continue;
      UNROLL
      for (int i = 0; i < chunk_tiles; ++i) {
        threadgroup float* tile = dU + 8 * i * value_row + 8 * r;
        simdgroup_float8x8 sum(0.0f);
        if (round) simdgroup_load(sum, tile, value_row, ulong2(0, 0), true);
        UNROLL
        for (int c = 0; c < Tiles; ++c) {
          simdgroup_multiply_accumulate(sum, dS[r][c], k_transposed[i][c], sum);
        }
        simdgroup_store(sum, tile, value_row, ulong2(0, 0), true);
      }
    }
    UNROLL
    for (int i = 0; i < chunk_tiles; ++i) {
      UNROLL
      for (int j = 0; j < chunk_tiles; ++j) {
        const int pair = i * (i + 1) / 2 + j;
        if (j > i || pair % Groups != turn) continue;
        simdgroup_float8x8 q_k(0.0f);
        if (round) simdgroup_load(q_k, P + 64 * pair, 8);
        UNROLL
        for (int c = 0; c < Tiles; ++c) {
          simdgroup_multiply_accumulate(q_k, q_tiles[i][c], k_transposed[j][c], q_k);
        }
        simdgroup_store(q_k, P + 64 * pair, 8);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  for (int t = index; t < C; t += threads) {
    from_start[t] = decay(g_chunk, 0, t);
    to_end[t] = decay(g_chunk, t + 1, C - 1);
    write_before[t] = beta_before[t] * decay(g_before, t + 1, C - 1);
  }
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    UNROLL
    for (int j = 0; j < chunk_tiles; ++j) {
      const int pair = i * (i + 1) / 2 + j;
      if (j > i || pair % Groups != simd_index) continue;
      simdgroup_float8x8 q_k;
      simdgroup_load(q_k, P + 64 * pair, 8);
      const int t = 8 * i + lane_row;
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int s = 8 * j + lane_column + e;
        const float through = decay(g_chunk, s + 1, t);
        q_k.thread_elements()[e] = s <= t ? through * q_k.thread_elements()[e] : 0.0f;
      }
      simdgroup_store(q_k, P + 64 * pair, 8);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // The rest of dU, and dV, a SIMD group for some columns of V.
  float beta_sum[chunk_tiles];
  float f_sum[chunk_tiles];
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    beta_sum[i] = 0.0f;
    f_sum[i] = 0.0f;
  }
  for (int r = simd_index; r < value_tiles; r += Groups) {
    UNROLL
    for (int i = 0; i < chunk_tiles; ++i) {
      const int t = 8 * i + lane_row;
      simdgroup_float8x8 x, z, value, d_out, sum;
      simdgroup_load(value, V + 8 * i * value_row + 8 * r, value_row);
      simdgroup_load(sum, dU + 8 * i * value_row + 8 * r, value_row);
      simdgroup_load(d_out, d_o_chunk + 8 * i * value_row + 8 * r, value_row);
      UNROLL
      for (int e = 0; e < 2; ++e) {
        sum.thread_elements()[e] *= to_end[t];
        f_sum[i] += beta_chunk[t] * value.thread_elements()[e] * sum.thread_elements()[e];
        D_sum += d_out.thread_elements()[e] * value.thread_elements()[e];
      }
      UNROLL
      for (int j = 0; j < chunk_tiles; ++j) {
        if (j < i) continue;
        simdgroup_load(x, P + 64 * (j * (j + 1) / 2 + i), 8, ulong2(0, 0), true);
        simdgroup_load(z, d_o_chunk + 8 * j * value_row + 8 * r, value_row);
        simdgroup_multiply_accumulate(sum, x, z, sum);
      }
      const size_t at = ((token + t) * Hv + hv) * Dv + block * BV + 8 * r + lane_column;
      UNROLL
      for (int e = 0; e < 2; ++e) {
        beta_sum[i] += sum.thread_elements()[e] * value.thread_elements()[e];
        if (8 * r < rows && start + t < T) {
          d_v[at + e] =
              beta_chunk[t] * sum.thread_elements()[e] + skip * d_out.thread_elements()[e];
        }
      }
    }
  }
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    const float beta_all = row_sum(beta_sum[i]);
    const float f_all = row_sum(f_sum[i]);
    if (lane_column == 0) {
      beta_part[C * simd_index + 8 * i + lane_row] = beta_all;
      f_part[C * simd_index + 8 * i + lane_row] = f_all;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // dP.
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    UNROLL
    for (int j = 0; j < chunk_tiles; ++j) {
      const int pair = i * (i + 1) / 2 + j;
      if (j > i || pair % Groups != simd_index) continue;
      simdgroup_float8x8 x, z;
      simdgroup_float8x8 from_P(0.0f);
      for (int d = 0; d < BV; d += 8) {
        simdgroup_load(z, V + 8 * j * value_row + d, value_row, ulong2(0, 0), true);
        simdgroup_load(x, d_o_chunk + 8 * i * value_row + d, value_row);
        simdgroup_multiply_accumulate(from_P, x, z, from_P);
      }
      simdgroup_load(z, P + 64 * pair, 8);
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int t = 8 * i + lane_row;
        const int s = 8 * j + lane_column + e;
        const float through = decay(g_chunk, s + 1, t);
        const float entry = s <= t ? beta_chunk[s] * from_P.thread_elements()[e] : 0.0f;
        z.thread_elements()[e] *= entry;
        from_P.thread_elements()[e] = through * entry;
      }
      simdgroup_store(z, d_log_L + 64 * pair, 8);
      simdgroup_store(from_P, dP + 64 * pair, 8);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // dQ, dK and dS before the chunk.
  const float through_all = from_start[C - 1];  // exp(G_end)
  const float through_before = decay(g_before, 0, C - 1);
  float through = 0.0f;
  float e_sum[chunk_tiles];
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) e_sum[i] = 0.0f;
  simdgroup_float8x8 k_before[chunk_tiles][Tiles];
  simdgroup_float8x8 q_from_S[chunk_tiles][Tiles];
  simdgroup_float8x8 from_dS[chunk_tiles][Tiles];
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    const int t = 8 * i + lane_row;
    const bool real_before = second && (!HasMask || mask[token - C + t]);
    UNROLL
    for (int c = 0; c < Tiles; ++c) {
      const int key = first_key + 8 * c;
      const size_t at = ((token - C + t) * Hk + hk) * Dk + key + lane_column;
      q_from_S[i][c] = simdgroup_float8x8(0.0f);
      from_dS[i][c] = simdgroup_float8x8(0.0f);
      UNROLL
      for (int e = 0; e < 2; ++e) {
        k_before[i][c].thread_elements()[e] =
            real_before && key < Dk ? write_before[t] * static_cast<float>(k[at + e]) : 0.0f;
      }
    }
  }
  UNROLL
  for (int r = 0; r < value_tiles; ++r) {
    if (8 * r >= rows) continue;
    simdgroup_float8x8 x;
    simdgroup_float8x8 S_tiles[Tiles];
    UNROLL
    for (int c = 0; c < Tiles; ++c) {
      if (first_key + 8 * c < Dk) {
        simdgroup_load(S_tiles[c], S + 8 * r * Dk + 8 * c, Dk);
      } else {
        S_tiles[c] = simdgroup_float8x8(0.0f);
      }
      if (second) {
        S_tiles[c].thread_elements()[0] *= through_before;
        S_tiles[c].thread_elements()[1] *= through_before;
      }
    }
    if (second) {
      UNROLL
      for (int i = 0; i < chunk_tiles; ++i) {
        UNROLL
        for (int e = 0; e < 2; ++e) {  // of V^T
          const int t = 8 * i + lane_column + e;
          const bool real = !HasMask || mask[token - C + t];
          const size_t at = ((token - C + t) * Hv + hv) * Dv + block * BV + 8 * r + lane_row;
          x.thread_elements()[e] = real ? static_cast<float>(v[at]) : 0.0f;
        }
        UNROLL
        for (int c = 0; c < Tiles; ++c) {
          simdgroup_multiply_accumulate(S_tiles[c], x, k_before[i][c], S_tiles[c]);
        }
      }
    }
    UNROLL
    for (int c = 0; c < Tiles; ++c) {
      through += S_tiles[c].thread_elements()[0] * dS[r][c].thread_elements()[0] +
                 S_tiles[c].thread_elements()[1] * dS[r][c].thread_elements()[1];
    }
    UNROLL
    for (int i = 0; i < chunk_tiles; ++i) {
      simdgroup_load(x, d_o_chunk + 8 * i * value_row + 8 * r, value_row);
      UNROLL
      for (int c = 0; c < Tiles; ++c) {
        simdgroup_multiply_accumulate(q_from_S[i][c], x, S_tiles[c], q_from_S[i][c]);
      }
      simdgroup_load(x, V + 8 * i * value_row + 8 * r, value_row);
      UNROLL
      for (int c = 0; c < Tiles; ++c) {
        simdgroup_multiply_accumulate(from_dS[i][c], x, dS[r][c], from_dS[i][c]);
      }
    }
    UNROLL
    for (int c = 0; c < Tiles; ++c) {
      dS[r][c].thread_elements()[0] *= through_all;
      dS[r][c].thread_elements()[1] *= through_all;
    }
    UNROLL
    for (int i = 0; i < chunk_tiles; ++i) {
      const int t = 8 * i + lane_column;
      simdgroup_load(x, d_o_chunk + 8 * i * value_row + 8 * r, value_row, ulong2(0, 0), true);
      x.thread_elements()[0] *= from_start[t];
      x.thread_elements()[1] *= from_start[t + 1];
      UNROLL
      for (int c = 0; c < Tiles; ++c) {
        simdgroup_multiply_accumulate(dS[r][c], x, q_tiles[i][c], dS[r][c]);
      }
    }
  }
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    const int t = 8 * i + lane_row;
    UNROLL
    for (int c = 0; c < Tiles; ++c) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        q_from_S[i][c].thread_elements()[e] *= from_start[t];
        e_sum[i] += q_from_S[i][c].thread_elements()[e] * q_tiles[i][c].thread_elements()[e];
        from_dS[i][c].thread_elements()[e] *= to_end[t] * beta_chunk[t];
      }
    }
    UNROLL
    for (int j = 0; j < chunk_tiles; ++j) {
      simdgroup_float8x8 x;
      if (j <= i) {
        simdgroup_load(x, dP + 64 * (i * (i + 1) / 2 + j), 8);
        UNROLL
        for (int c = 0; c < Tiles; ++c) {
          simdgroup_multiply_accumulate(q_from_S[i][c], x, k_tiles[j][c], q_from_S[i][c]);
        }
      }
      if (j >= i) {
        simdgroup_load(x, dP + 64 * (j * (j + 1) / 2 + i), 8, ulong2(0, 0), true);
        UNROLL
        for (int c = 0; c < Tiles; ++c) {
          simdgroup_multiply_accumulate(from_dS[i][c], x, q_tiles[j][c], from_dS[i][c]);
        }
      }
    }
    const bool real = !HasMask || (start + t < T && mask[token + t]);
    const size_t row = (size_t(block) * batch * T + token + t) * Hv + hv;
    UNROLL
    for (int c = 0; c < Tiles; ++c) {
      const int key = first_key + 8 * c;
      UNROLL
      for (int e = 0; e < 2; ++e) {
        if (start + t < T && key < Dk) {
          const size_t at = row * Dk + key + lane_column + e;
          d_q[at] = real ? q_from_S[i][c].thread_elements()[e] : 0.0f;
          d_k[at] = real ? from_dS[i][c].thread_elements()[e] : 0.0f;
        }
      }
    }
  }
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    const float e_all = row_sum(e_sum[i]);
    if (lane_column == 0) e_part[C * simd_index + 8 * i + lane_row] = e_all;
  }
  through = simd_sum(through);
  if (lane == 0) through_part[simd_index] = through_all * through;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // d_beta and d_g, a thread for each token.
  for (int r = index; r < C; r += threads) {
    float sum_beta = 0.0f;
    float sum_g = 0.0f;
    for (int i = 0; i < Groups; ++i) {
      sum_beta += beta_part[C * i + r];
      sum_g += through_part[i];
      for (int t = 0; t < r; ++t) sum_g += f_part[C * i + t];
      for (int t = r; t < C; ++t) sum_g += e_part[C * i + t];
    }
    for (int t = r; t < C; ++t) {
      for (int s = 0; s < r; ++s) {
        const int pair = t / 8 * (t / 8 + 1) / 2 + s / 8;
        sum_g += d_log_L[64 * pair + t % 8 * 8 + s % 8];
      }
    }
    if (start + r < T) {
      const bool real = !HasMask || mask[token + r];
      const size_t at = (size_t(block) * batch * T + token + r) * Hv + hv;
      d_beta[at] = real ? sum_beta : 0.0f;
      d_g[at] = real ? sum_g : 0.0f;
    }
  }
}
UNROLL
for (int r = 0; r < value_tiles; ++r) {
  UNROLL
  for (int c = 0; c < Tiles; ++c) {
    if (8 * r >= rows || first_key + 8 * c >= Dk) continue;
    simdgroup_store(dS[r][c], d_state + state_at + 8 * r * Dk + 8 * c, Dk);
  }
}
D_sum = simd_sum(D_sum);
if (lane == 0) D_part[simd_index] = D_sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (index == 0) {
  float sum = 0.0f;
  for (int i = 0; i < Groups; ++i) sum += D_part[i];
  d_D[block * heads + n] = sum;
}
