// The gated delta rule, S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t.
//
// q, k [B, T, Hk, Dk], v, o [B, T, Hv, Dv], g = log a and beta [B, T, Hv], S [B, Hv, Dv, Dk].
// All arithmetic and S are float32. Dk and Dv are multiples of 8.

#include "common.metal"

// kernel gated_delta_prefill(q, k, v, g, beta, state, mask, T, Hk, Hv) -> (o, state_out)

// Any number of tokens, in chunks of C (8 or 16). A threadgroup owns one head and 8 * Tiles * Bands
// rows of S; a SIMD group has 8 * Tiles of these rows, of the keys all or one of two Parts, in its
// registers as the tiles of their transpose. In a chunk, with G_t = g_0 + ... + g_t and the WY
// form, in which u_t = b_t y_t is what the rule really writes:
//
//   (I + A) Y = V - exp(G) K S^T,         A_tj = exp(G_t - G_j) k_t.k_j b_j  for j < t
//   O = exp(G) Q S^T + P U,               P_tj = exp(G_t - G_j) q_t.k_j      for j <= t
//   S = exp(G_end) S + U^T (exp(G_end - G) K)
//
// With Checkpoints it is the first half of the gradient: o [ceil(T / Checkpoints), B, Hv, Dv, Dk]
// float32 is S before every Checkpoints tokens, state_out is Y [B, T, Hv, Dv] float32, and q is not
// read.
//
// Template: OutT, Dk, Dv, C, Bands, Tiles, Parts, HasMask, Checkpoints.
// Grid (32 Bands Parts, blocks of Dv, B Hv).
constexpr int row_size = Dk + 4;  // rows of q and k, padded against bank conflicts
constexpr int chunk_tiles = C / 8;
constexpr int pairs = chunk_tiles * (chunk_tiles + 1) / 2;  // tiles on and below the diagonal
constexpr int key_tiles = (Dk / 8 + Parts - 1) / Parts;     // of a SIMD group
constexpr int groups = Bands * Parts;
constexpr int threads = 32 * groups;
constexpr int turns = (Dk + 31) / 32;  // of a SIMD group, for a row of q or k
constexpr int elements = (C + groups - 1) / groups * turns;  // of q and of k, that a thread reads
constexpr int ahead = elements < 8 ? elements : 8;           // of these, a chunk early
constexpr int every = Checkpoints ? Checkpoints : C;

threadgroup float q_chunk[C * row_size];
threadgroup float k_chunk[C * row_size];
threadgroup float A[64 * pairs];  // (I + A)^-1 of the tiles on the diagonal, and -A / b below
threadgroup float P[64 * pairs];
threadgroup float g_chunk[C];
threadgroup float beta_chunk[C];
threadgroup float to_end[C];  // exp(G_end - G_t)
threadgroup float halves[Parts > 1 ? groups * chunk_tiles * Tiles * 128 : 1];

const int index = thread_index_in_threadgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int lane_row = row_of(lane);
const int lane_column = column_of(lane);
const int n = threadgroup_position_in_grid.z;
const int b = n / Hv;
const int hv = n % Hv;
const int hk = hv / (Hv / Hk);
const int part = simd_index % Parts;
const int first_key = 8 * key_tiles * part;
const int band = threadgroup_position_in_grid.y * Bands + simd_index / Parts;
const int column = 8 * Tiles * band;  // of v and o
threadgroup float* own_half = halves + simd_index * chunk_tiles * Tiles * 128;
const threadgroup float* other_half = halves + (simd_index ^ 1) * chunk_tiles * Tiles * 128;

// S[j][w]: rows first_key + 8 j of S^T, columns `column` + 8 w.
simdgroup_float8x8 S[key_tiles][Tiles];
const size_t state_at = size_t(n) * Dv * Dk + first_key;
UNROLL
for (int j = 0; j < key_tiles; ++j) {
  UNROLL
  for (int w = 0; w < Tiles; ++w) {
    S[j][w] = simdgroup_float8x8(0.0f);
    if (first_key + 8 * j < Dk && column + 8 * w < Dv) {
      simdgroup_load(S[j][w], state + state_at + (column + 8 * w) * Dk + 8 * j, Dk, ulong2(0, 0),
                     true);
    }
  }
}
// Padding, and what follows the last token, has a = 1 and b = 0.
float q_next[ahead];
float k_next[ahead];
UNROLL
for (int i = 0; i < ahead; ++i) {
  const int t = simd_index + groups * (i / turns);
  const int d = lane + 32 * (i % turns);
  const bool real = t < C && d < Dk && t < T && (!HasMask || mask[size_t(b) * T + t]);
  const size_t at = ((size_t(b) * T + t) * Hk + hk) * Dk + d;
  q_next[i] = real && !Checkpoints ? static_cast<float>(q[at]) : 0.0f;
  k_next[i] = real ? static_cast<float>(k[at]) : 0.0f;
}

for (int start = 0; start < T; start += C) {
  const size_t token = size_t(b) * T + start;
  if (Checkpoints && start % every == 0) {
    device float* states =
        (device float*)o + size_t(start / every) * threadgroups_per_grid.z * Dv * Dk;
    UNROLL
    for (int j = 0; j < key_tiles; ++j) {
      UNROLL
      for (int w = 0; w < Tiles; ++w) {
        if (first_key + 8 * j >= Dk || column + 8 * w >= Dv) continue;
        simdgroup_store(S[j][w], states + state_at + (column + 8 * w) * Dk + 8 * j, Dk,
                        ulong2(0, 0), true);
      }
    }
  }

  UNROLL
  for (int i = 0; i < elements; ++i) {
    const int t = simd_index + groups * (i / turns);
    const int d = lane + 32 * (i % turns);
    if (t >= C || d >= Dk) continue;
    if (i < ahead) {
      q_chunk[t * row_size + d] = q_next[i];
      k_chunk[t * row_size + d] = k_next[i];
    } else {
      const bool real = start + t < T && (!HasMask || mask[token + t]);
      const size_t at = ((token + t) * Hk + hk) * Dk + d;
      if (!Checkpoints) q_chunk[t * row_size + d] = real ? static_cast<float>(q[at]) : 0.0f;
      k_chunk[t * row_size + d] = real ? static_cast<float>(k[at]) : 0.0f;
    }
  }
  for (int t = index; t < C; t += threads) {
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    const size_t at = (token + t) * Hv + hv;
    g_chunk[t] = real ? static_cast<float>(g[at]) : 0.0f;
    beta_chunk[t] = real ? static_cast<float>(beta[at]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  simdgroup_float8x8 U[chunk_tiles][Tiles];  // V, then V - exp(G) K S^T, Y, U
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    const int t = 8 * i + lane_row;
    const bool real = start + t < T && (!HasMask || mask[token + t]);
    UNROLL
    for (int w = 0; w < Tiles; ++w) {
      const size_t at = ((token + t) * Hv + hv) * Dv + column + 8 * w + lane_column;
      UNROLL
      for (int e = 0; e < 2; ++e) {
        U[i][w].thread_elements()[e] =
            real && column + 8 * w < Dv && w % Parts == part ? static_cast<float>(v[at + e]) : 0.0f;
      }
    }
  }
  for (int t = index; t < C; t += threads) to_end[t] = decay(g_chunk, t + 1, C - 1);

  // The tiles of A and P on and below the diagonal, shared out among the SIMD groups.
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    UNROLL
    for (int j = 0; j < chunk_tiles; ++j) {
      const int pair = i * (i + 1) / 2 + j;
      if (j > i || pair % groups != simd_index) continue;
      simdgroup_float8x8 k_k(0.0f);
      simdgroup_float8x8 q_k(0.0f);
      for (int d = 0; d < Dk; d += 8) {
        simdgroup_float8x8 x, y;
        simdgroup_load(y, k_chunk + 8 * j * row_size + d, row_size, ulong2(0, 0), true);
        simdgroup_load(x, k_chunk + 8 * i * row_size + d, row_size);
        simdgroup_multiply_accumulate(k_k, x, y, k_k);
        if (Checkpoints) continue;
        simdgroup_load(x, q_chunk + 8 * i * row_size + d, row_size);
        simdgroup_multiply_accumulate(q_k, x, y, q_k);
      }
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int t = 8 * i + lane_row;
        const int s = 8 * j + lane_column + e;
        const float through = decay(g_chunk, s + 1, t);
        const float scale = i == j ? beta_chunk[s] : -1.0f;
        k_k.thread_elements()[e] = s < t ? through * scale * k_k.thread_elements()[e] : 0.0f;
        q_k.thread_elements()[e] = s <= t ? through * q_k.thread_elements()[e] : 0.0f;
      }
      if (i == j) k_k = unit_lower_inverse(k_k, lane);
      simdgroup_store(k_k, A + 64 * pair, 8);
      if (!Checkpoints) simdgroup_store(q_k, P + 64 * pair, 8);
    }
  }

  // V - exp(G) K S^T and exp(G) Q S^T: of this SIMD group's columns, and of its part of the keys.
  simdgroup_float8x8 q_S[chunk_tiles][Tiles];
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    simdgroup_float8x8 k_S[Tiles];
    const float decayed = decay(g_chunk, 0, 8 * i + lane_row);
    UNROLL
    for (int w = 0; w < Tiles; ++w) {
      k_S[w] = simdgroup_float8x8(0.0f);
      q_S[i][w] = simdgroup_float8x8(0.0f);
    }
    UNROLL
    for (int j = 0; j < key_tiles; ++j) {
      if (first_key + 8 * j >= Dk) continue;
      simdgroup_float8x8 x;
      simdgroup_load(x, k_chunk + 8 * i * row_size + first_key + 8 * j, row_size);
      UNROLL
      for (int w = 0; w < Tiles; ++w) simdgroup_multiply_accumulate(k_S[w], x, S[j][w], k_S[w]);
      if (Checkpoints) continue;
      simdgroup_load(x, q_chunk + 8 * i * row_size + first_key + 8 * j, row_size);
      UNROLL
      for (int w = 0; w < Tiles; ++w)
        simdgroup_multiply_accumulate(q_S[i][w], x, S[j][w], q_S[i][w]);
    }
    UNROLL
    for (int w = 0; w < Tiles; ++w) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        U[i][w].thread_elements()[e] -= decayed * k_S[w].thread_elements()[e];
        q_S[i][w].thread_elements()[e] *= decayed;
      }
      if (Parts == 1) continue;
      simdgroup_store(U[i][w], own_half + (i * Tiles + w) * 128, 8);
      simdgroup_store(q_S[i][w], own_half + (i * Tiles + w) * 128 + 64, 8);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    UNROLL
    for (int w = 0; w < (Parts > 1 ? Tiles : 0); ++w) {
      simdgroup_float8x8 x, y;
      simdgroup_load(x, other_half + (i * Tiles + w) * 128, 8);
      simdgroup_load(y, other_half + (i * Tiles + w) * 128 + 64, 8);
      UNROLL
      for (int e = 0; e < 2; ++e) {
        U[i][w].thread_elements()[e] += x.thread_elements()[e];
        q_S[i][w].thread_elements()[e] += y.thread_elements()[e];
      }
    }
    UNROLL
    for (int j = 0; j < chunk_tiles; ++j) {
      if (j > i) continue;
      simdgroup_float8x8 x;
      simdgroup_load(x, A + 64 * (i * (i + 1) / 2 + j), 8);
      UNROLL
      for (int w = 0; w < Tiles; ++w) {
        if (j < i) {
          simdgroup_multiply_accumulate(U[i][w], x, U[j][w], U[i][w]);
        } else {
          simdgroup_multiply(U[i][w], x, U[i][w]);
        }
      }
    }
    const int t = 8 * i + lane_row;
    UNROLL
    for (int w = 0; w < Tiles; ++w) {
      const size_t at = ((token + t) * Hv + hv) * Dv + column + 8 * w + lane_column;
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const float y = U[i][w].thread_elements()[e];
        if (Checkpoints && start + t < T && column + 8 * w < Dv && w % Parts == part)
          state_out[at + e] = y;
        U[i][w].thread_elements()[e] = beta_chunk[t] * y;
      }
    }
  }
  UNROLL
  for (int i = 0; i < (Checkpoints ? 0 : chunk_tiles); ++i) {
    UNROLL
    for (int j = 0; j < chunk_tiles; ++j) {
      if (j > i) continue;
      simdgroup_float8x8 x;
      simdgroup_load(x, P + 64 * (i * (i + 1) / 2 + j), 8);
      UNROLL
      for (int w = 0; w < Tiles; ++w)
        simdgroup_multiply_accumulate(q_S[i][w], x, U[j][w], q_S[i][w]);
    }
    const int t = 8 * i + lane_row;
    const bool real = !HasMask || (start + t < T && mask[token + t]);
    UNROLL
    for (int w = 0; w < Tiles; ++w) {
      const size_t at = ((token + t) * Hv + hv) * Dv + column + 8 * w + lane_column;
      UNROLL
      for (int e = 0; e < 2; ++e) {
        if (start + t < T && column + 8 * w < Dv && w % Parts == part) {
          o[at + e] = static_cast<OutT>(real ? q_S[i][w].thread_elements()[e] : 0.0f);
        }
      }
    }
  }
  // The next chunk comes while S is renewed.
  UNROLL
  for (int i = 0; i < ahead; ++i) {
    const int t = simd_index + groups * (i / turns);
    const int d = lane + 32 * (i % turns);
    const bool real =
        t < C && d < Dk && start + C + t < T && (!HasMask || mask[token + C + t]);
    const size_t at = ((token + C + t) * Hk + hk) * Dk + d;
    q_next[i] = real && !Checkpoints ? static_cast<float>(q[at]) : 0.0f;
    k_next[i] = real ? static_cast<float>(k[at]) : 0.0f;
  }
  UNROLL
  for (int i = 0; i < chunk_tiles; ++i) {
    const float decayed = to_end[8 * i + lane_row];
    UNROLL
    for (int w = 0; w < Tiles; ++w) {
      U[i][w].thread_elements()[0] *= decayed;
      U[i][w].thread_elements()[1] *= decayed;
    }
  }
  const float through = decay(g_chunk, 0, C - 1);
  UNROLL
  for (int j = 0; j < key_tiles; ++j) {
    if (first_key + 8 * j >= Dk) continue;
    UNROLL
    for (int w = 0; w < Tiles; ++w) {
      S[j][w].thread_elements()[0] *= through;
      S[j][w].thread_elements()[1] *= through;
    }
    UNROLL
    for (int i = 0; i < chunk_tiles; ++i) {
      simdgroup_float8x8 x;
      simdgroup_load(x, k_chunk + 8 * i * row_size + first_key + 8 * j, row_size, ulong2(0, 0),
                     true);
      UNROLL
      for (int w = 0; w < Tiles; ++w) simdgroup_multiply_accumulate(S[j][w], x, U[i][w], S[j][w]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
UNROLL
for (int j = 0; j < (Checkpoints ? 0 : key_tiles); ++j) {
  UNROLL
  for (int w = 0; w < Tiles; ++w) {
    if (first_key + 8 * j >= Dk || column + 8 * w >= Dv) continue;
    simdgroup_store(S[j][w], state_out + state_at + (column + 8 * w) * Dk + 8 * j, Dk, ulong2(0, 0),
                    true);
  }
}
