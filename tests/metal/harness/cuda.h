// As much of the Metal Shading Language as the kernels use, in CUDA: what msl.h is for a CPU. A
// kernel's text is compiled after this file, inside of namespace msl, where float4 is Metal's.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// A kernel's own functions run on the device, too. Address spaces can't be macros as in msl.h,
// because CUDA's own words are made of them: cuda.py takes them out of the text.
#define HARNESS_THREADGROUP(type, name, dims) __shared__ type name dims
#define inline __device__ __forceinline__

namespace msl {

using half = ::__half;
using bfloat = ::__nv_bfloat16;
using uint = unsigned;
using ushort = unsigned short;
using ulong = unsigned long;

struct uint3 { uint x, y, z; };
struct ulong2 {
  ulong x, y;
  inline ulong2(ulong x, ulong y) : x(x), y(y) {}
};
struct float2 {
  float x, y;
  inline float& operator[](int i) { return i ? y : x; }
};
struct alignas(16) float4 {
  float x, y, z, w;
  float4() = default;
  inline float4(float a) : x(a), y(a), z(a), w(a) {}
  inline float4(float x, float y, float z, float w) : x(x), y(y), z(z), w(w) {}
};
#define HARNESS_OPERATOR(op)                                        \
  inline float4 operator op(const float4& a, const float4& b) {     \
    return {a.x op b.x, a.y op b.y, a.z op b.z, a.w op b.w};        \
  }
HARNESS_OPERATOR(+)
HARNESS_OPERATOR(-)
HARNESS_OPERATOR(*)
#undef HARNESS_OPERATOR

inline uint3 three(dim3 x) { return {x.x, x.y, x.z}; }
inline uint3 three(::uint3 x) { return {x.x, x.y, x.z}; }
// A grid of threads that its threadgroups do not divide is cut at its edge: threads beyond it
// return at once, and none of those kernels has a barrier.
inline uint3 in_grid() {
  return {blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
          blockIdx.z * blockDim.z + threadIdx.z};
}
inline uint index_in_group() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

namespace metal {

inline float dot(const float4& a, const float4& b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}
inline float clamp(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
namespace precise {
inline float exp(float x) { return ::expf(x); }
inline float log(float x) { return ::logf(x); }
}  // namespace precise

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
// Both order device and shared memory within their threads, whatever the flags say.
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }
inline float simd_sum(float x) {
  for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, step);
  return x;
}
inline float simd_shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFF, x, mask); }

// Each lane holds two neighbours of one row, in the places of msl.h.
struct simdgroup_float8x8 {
  simdgroup_float8x8() = default;
  inline explicit simdgroup_float8x8(float diagonal) {
    for (int i = 0; i < 2; ++i) elements[i] = row() == column() + i ? diagonal : 0.0f;
  }
  inline float2& thread_elements() { return elements; }
  static inline int lane() { return index_in_group() % 32; }
  static inline int row() { return (lane() >> 2 & 4) + (lane() >> 1 & 3); }
  static inline int column() { return (lane() >> 1 & 4) + (lane() & 1) * 2; }
  static inline int lane_of(int row, int column) {
    return (row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 | (column >> 1 & 1);
  }
  float2 elements;
};
inline long element(int i, ulong row_size, ulong2 origin, bool transpose) {
  long row = simdgroup_float8x8::row(), column = simdgroup_float8x8::column() + i;
  if (transpose) return (column + origin.y) * row_size + row + origin.x;
  return (row + origin.y) * row_size + column + origin.x;
}
inline void simdgroup_load(simdgroup_float8x8& m, const float* from, ulong row_size,
                           ulong2 origin = ulong2(0, 0), bool transpose = false) {
  for (int i = 0; i < 2; ++i) m.elements[i] = from[element(i, row_size, origin, transpose)];
}
inline void simdgroup_store(simdgroup_float8x8 m, float* to, ulong row_size,
                            ulong2 origin = ulong2(0, 0), bool transpose = false) {
  for (int i = 0; i < 2; ++i) to[element(i, row_size, origin, transpose)] = m.elements[i];
}
inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, const simdgroup_float8x8& a,
                                          const simdgroup_float8x8& b,
                                          const simdgroup_float8x8& c) {
  using M = simdgroup_float8x8;
  float2 sum = c.elements;
  for (int k = 0; k < 8; ++k) {
    const int a_lane = M::lane_of(M::row(), k), b_lane = M::lane_of(k, M::column());
    const float a_even = __shfl_sync(0xFFFFFFFF, a.elements.x, a_lane);
    const float a_odd = __shfl_sync(0xFFFFFFFF, a.elements.y, a_lane);
    const float x = k % 2 ? a_odd : a_even;
    sum.x = fmaf(x, __shfl_sync(0xFFFFFFFF, b.elements.x, b_lane), sum.x);
    sum.y = fmaf(x, __shfl_sync(0xFFFFFFFF, b.elements.y, b_lane), sum.y);
  }
  d.elements = sum;
}
inline void simdgroup_multiply(simdgroup_float8x8& d, const simdgroup_float8x8& a,
                               const simdgroup_float8x8& b) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_float8x8(0.0f));
}

}  // namespace metal
}  // namespace msl
