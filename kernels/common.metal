// What the kernels share. `source.py` puts it in the place of #include "common.metal".

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

// The elements of a SIMD-group matrix that a lane holds are two neighbours of one row: row
// `row_of(lane)`, columns `column_of(lane)` and the next. MLX's own matrix products rely on it.
inline int row_of(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline int column_of(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

// The sum over a row of the matrix whose elements the lanes hold, in each of its lanes.
inline float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

// (I + A)^-1 of a strictly lower triangular A. Diagonal blocks of 1, 2 and 4 rows are merged in
// pairs, [[P, 0], [R, Q]]^-1 = [[P', 0], [-Q' R P', Q']] with ' for the inverse: as exact as
// forward substitution, where a power series of A is not once keys repeat.
inline simdgroup_float8x8 unit_lower_inverse(simdgroup_float8x8 A, int lane) {
  const int row = row_of(lane);
  simdgroup_float8x8 inverse, block;
  UNROLL
  for (int e = 0; e < 2; ++e) {
    const int column = column_of(lane) + e;
    const bool pair = row / 2 == column / 2 && row > column;
    inverse.thread_elements()[e] =
        (row == column ? 1.0f : 0.0f) - (pair ? A.thread_elements()[e] : 0.0f);
  }
  UNROLL
  for (int size = 2; size < 8; size *= 2) {
    UNROLL
    for (int e = 0; e < 2; ++e) {
      const int column = column_of(lane) + e;
      const bool below = row / (2 * size) == column / (2 * size) && row / size > column / size;
      block.thread_elements()[e] = below ? A.thread_elements()[e] : 0.0f;
    }
    simdgroup_multiply(block, inverse, block);
    simdgroup_multiply(block, block, inverse);
    UNROLL
    for (int e = 0; e < 2; ++e) inverse.thread_elements()[e] -= block.thread_elements()[e];
  }
  return inverse;
}
