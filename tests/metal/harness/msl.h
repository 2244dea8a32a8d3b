// As much of the Metal Shading Language as the kernels use, in C++14. A kernel's text is compiled
// after this file, as MLX compiles it after its own. Section numbers are those of Apple's
// "Metal Shading Language Specification".
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#define UNWATCHED __attribute__((no_sanitize_thread))  // accesses not checked nor counted

// Threadgroup arrays (4.4) are one array for all threads; declarations are written as a call of
// this macro before the text is compiled, because C++ has no word for them.
#define HARNESS_THREADGROUP(type, name, dims)   \
  type(&name) dims = *static_cast<type(*) dims>( \
      harness::threadgroup_memory(sizeof(type dims), __COUNTER__))
#define device
#define constant
#define thread
#define threadgroup

using uint = unsigned;
using uchar = unsigned char;
using ushort = unsigned short;
using ulong = unsigned long;

// ---- 2.1 half and bfloat: rounded to nearest even after every operation ----

namespace harness {

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct Half {
  static uint16_t pack(float x) {
    uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000;
    u &= 0x7FFFFFFF;
    if (u > 0x7F800000) return sign | 0x7E00;   // NaN
    if (u >= 0x477FF000) return sign | 0x7C00;  // rounds to infinity
    if (u < 0x38800000)                         // a multiple of 2^-24
      return sign | uint16_t(std::nearbyint(bits<float>(u) * 16777216.0f));
    return sign | uint16_t((u - 0x38000000 + 0xFFF + (u >> 13 & 1)) >> 13);
  }
  static float unpack(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7FFF;
    if (rest >= 0x7C00) return bits<float>(sign | 0x7F800000 | rest << 13);
    if (rest < 0x400) return bits<float>(sign | bits<uint32_t>(rest / 16777216.0f));
    return bits<float>(sign | ((rest << 13) + 0x38000000));
  }
};

struct Bfloat {
  static uint16_t pack(float x) {
    uint32_t u = bits<uint32_t>(x);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return u >> 16 | 0x40;  // NaN stays NaN
    return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  }
  static float unpack(uint16_t h) { return bits<float>(uint32_t(h) << 16); }
};

template <typename Format>
struct Float16 {
  uint16_t raw;
  Float16() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic<T>::value>>
  Float16(T x) : raw(Format::pack(static_cast<float>(x))) {}
  template <typename Other>
  explicit Float16(Float16<Other> x) : raw(Format::pack(static_cast<float>(x))) {}
  __attribute__((always_inline)) operator float() const { return Format::unpack(raw); }
};
#define HARNESS_OPERATOR(op)                                                \
  template <typename F>                                                     \
  Float16<F> operator op(Float16<F> a, Float16<F> b) {                      \
    return static_cast<float>(a) op static_cast<float>(b);                  \
  }
HARNESS_OPERATOR(+)
HARNESS_OPERATOR(-)
HARNESS_OPERATOR(*)
HARNESS_OPERATOR(/)
#undef HARNESS_OPERATOR

}  // namespace harness

using half = harness::Float16<harness::Half>;
using bfloat = harness::Float16<harness::Bfloat>;
using float16_t = half;
using bfloat16_t = bfloat;

// ---- 2.2 vectors: always inlined and by reference, because GCC does not report the read of an
// aggregate in memory that is passed by value ----

#define HARNESS_INLINE __attribute__((always_inline)) inline

template <typename T, int N>
struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  HARNESS_INLINE vec(T a) : x(a), y(a) {}
  HARNESS_INLINE vec(T x, T y) : x(x), y(y) {}
  T& operator[](int i) { return (&x)[i]; }
  T operator[](int i) const { return (&x)[i]; }
};
template <typename T>
struct vec<T, 3> {
  T x, y, z;
  vec() = default;
  HARNESS_INLINE vec(T a) : x(a), y(a), z(a) {}
  HARNESS_INLINE vec(T x, T y, T z) : x(x), y(y), z(z) {}
  T& operator[](int i) { return (&x)[i]; }
  T operator[](int i) const { return (&x)[i]; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  HARNESS_INLINE vec(T a) : x(a), y(a), z(a), w(a) {}
  HARNESS_INLINE vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  template <typename U>
  HARNESS_INLINE explicit vec(const vec<U, 4>& v) : x(v.x), y(v.y), z(v.z), w(v.w) {}
  T& operator[](int i) { return (&x)[i]; }
  T operator[](int i) const { return (&x)[i]; }
};
#define HARNESS_OPERATOR(op)                                                          \
  template <typename T>                                                               \
  HARNESS_INLINE vec<T, 4> operator op(const vec<T, 4>& a, const vec<T, 4>& b) {      \
    return {a.x op b.x, a.y op b.y, a.z op b.z, a.w op b.w};                          \
  }                                                                                   \
  template <typename T>                                                               \
  HARNESS_INLINE vec<T, 4> operator op(T a, const vec<T, 4>& b) {                     \
    return {a op b.x, a op b.y, a op b.z, a op b.w};                                  \
  }                                                                                   \
  template <typename T>                                                               \
  HARNESS_INLINE vec<T, 4> operator op(const vec<T, 4>& a, T b) {                     \
    return {a.x op b, a.y op b, a.z op b, a.w op b};                                  \
  }
HARNESS_OPERATOR(+)
HARNESS_OPERATOR(-)
HARNESS_OPERATOR(*)
#undef HARNESS_OPERATOR
using float2 = vec<float, 2>;
using float4 = vec<float, 4>;
using uint2 = vec<uint, 2>;
using uint3 = vec<uint, 3>;
using ulong2 = vec<ulong, 2>;

namespace metal {

// ---- 6.5 mathematics, in float ----

#define HARNESS_MATH(name) \
  inline float name(float x) { return std::name(x); }
#define HARNESS_MATH_ALL                                                                    \
  HARNESS_MATH(exp) HARNESS_MATH(log) HARNESS_MATH(sqrt) HARNESS_MATH(abs) HARNESS_MATH(tanh) \
  HARNESS_MATH(exp2) HARNESS_MATH(log2)                                                     \
  inline float rsqrt(float x) { return 1 / std::sqrt(x); }
HARNESS_MATH_ALL
namespace fast { HARNESS_MATH_ALL }
namespace precise { HARNESS_MATH_ALL }
#undef HARNESS_MATH
#undef HARNESS_MATH_ALL
template <typename T>
inline T min(T a, T b) { return b < a ? b : a; }
template <typename T>
inline T max(T a, T b) { return a < b ? b : a; }
template <typename T>
inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
inline bool isnan(float x) { return x != x; }
inline float fma(float a, float b, float c) {
  harness::count_multiply_add(1);
  return static_cast<float>(double(a) * b + c);
}
HARNESS_INLINE float dot(const float4& a, const float4& b) {
  harness::count_multiply_add(4);
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}
template <typename To, typename From>
inline To as_type(From x) { return harness::bits<To>(x); }

// ---- 6.9 synchronisation, SIMD-group functions ----

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

#define LINE int line = __builtin_LINE()
inline void threadgroup_barrier(mem_flags f, LINE) { harness::barrier(int(f), line); }
inline void simdgroup_barrier(mem_flags f, LINE) { harness::simdgroup_barrier(int(f), line); }
template <typename T, typename Reduce>
UNWATCHED T simd_reduce(const char* what, T x, Reduce, int line) {
  harness::together(what, line, &x, [](void** lanes, int n, int) UNWATCHED {
    T values[32];
    for (int i = 0; i < n; ++i) values[i] = *static_cast<T*>(lanes[i]);
    for (int step = 1; step < n; step *= 2)  // the tree of Apple's GPUs
      for (int i = 0; i + step < n; i += 2 * step)
        values[i] = Reduce::apply(values[i], values[i + step]);
    for (int i = 0; i < n; ++i) *static_cast<T*>(lanes[i]) = values[0];
  }, 0);
  return x;
}
#define HARNESS_REDUCE(name, expression)                       \
  struct Reduce_##name {                                       \
    template <typename T>                                      \
    UNWATCHED static T apply(T a, T b) { return expression; }  \
  };                                                           \
  template <typename T>                                        \
  inline T simd_##name(T x, LINE) {                            \
    return simd_reduce("simd_" #name, x, Reduce_##name(), line); \
  }
HARNESS_REDUCE(sum, a + b)
HARNESS_REDUCE(product, a * b)
HARNESS_REDUCE(max, a < b ? b : a)
HARNESS_REDUCE(min, b < a ? b : a)
#undef HARNESS_REDUCE

// A lane takes the value of lane `from`; 6.9.2 leaves it undefined where there is none.
template <typename T>
struct Shuffle { T value; int from; };
template <typename T>
UNWATCHED T shuffle(const char* what, T x, int from, int line) {
  Shuffle<T> lane{x, from};
  harness::together(what, line, &lane, [](void** lanes, int n, int) UNWATCHED {
    T values[32];
    for (int i = 0; i < n; ++i) values[i] = static_cast<Shuffle<T>*>(lanes[i])->value;
    for (int i = 0; i < n; ++i) {
      auto lane = static_cast<Shuffle<T>*>(lanes[i]);
      if (lane->from >= 0 && lane->from < n) lane->value = values[lane->from];
      else memset(&lane->value, 0xFF, sizeof(T));
    }
  }, 0);
  return lane.value;
}
#define HARNESS_SHUFFLE(name, from)                            \
  template <typename T>                                        \
  inline T name(T x, ushort i, LINE) { return shuffle(#name, x, from, line); }
HARNESS_SHUFFLE(simd_shuffle, i)
HARNESS_SHUFFLE(simd_broadcast, i)
HARNESS_SHUFFLE(simd_shuffle_xor, int(harness::lane()) ^ i)
HARNESS_SHUFFLE(simd_shuffle_down, int(harness::lane()) + i)
HARNESS_SHUFFLE(simd_shuffle_up, int(harness::lane()) - i)
#undef HARNESS_SHUFFLE

// ---- 2.4, 6.7 SIMD-group matrices: each lane holds two neighbours of one row ----

template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has 8x8 only");
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 2; ++i) elements[i] = row() == column() + i ? diagonal : T(0);
  }
  vec<T, 2>& thread_elements() { return elements; }
  static int row() { return row_of(harness::lane()); }
  static int column() { return column_of(harness::lane()); }
  UNWATCHED static int row_of(int lane) { return (lane >> 2 & 4) + (lane >> 1 & 3); }
  UNWATCHED static int column_of(int lane) { return (lane >> 1 & 4) + (lane & 1) * 2; }
  vec<T, 2> elements;
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;

template <typename T>
inline simdgroup_matrix<T, 8, 8> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, 8, 8> m;
  m.elements = value;
  return m;
}
template <typename T>
inline long element(int i, ulong row_size, ulong2 origin, bool transpose) {
  long row = simdgroup_matrix<T, 8, 8>::row(), column = simdgroup_matrix<T, 8, 8>::column() + i;
  if (transpose) return (column + origin.y) * row_size + row + origin.x;
  return (row + origin.y) * row_size + column + origin.x;
}
template <typename T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong row_size,
                           ulong2 origin = ulong2(0), bool transpose = false) {
  harness::count_matrix_load();
  for (int i = 0; i < 2; ++i) m.elements[i] = from[element<T>(i, row_size, origin, transpose)];
}
template <typename T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* to, ulong row_size,
                            ulong2 origin = ulong2(0), bool transpose = false) {
  harness::count_matrix_store();
  for (int i = 0; i < 2; ++i) to[element<T>(i, row_size, origin, transpose)] = m.elements[i];
}

template <typename T>
struct Product { T d[2], a[2], b[2], c[2]; };
template <typename T>
UNWATCHED void multiply_accumulate(simdgroup_matrix<T, 8, 8>& d, const simdgroup_matrix<T, 8, 8>& a,
                                   const simdgroup_matrix<T, 8, 8>& b, const vec<T, 2>& c,
                                   const char* what, int line) {
  Product<T> mine{{},
                  {a.elements.x, a.elements.y},
                  {b.elements.x, b.elements.y},
                  {c.x, c.y}};
  harness::together(what, line, &mine, [](void** lanes, int n, int) UNWATCHED {
    using M = simdgroup_matrix<T, 8, 8>;
    T A[8][8], B[8][8];
    for (int l = 0; l < n; ++l)
      for (int i = 0; i < 2; ++i) {
        A[M::row_of(l)][M::column_of(l) + i] = static_cast<Product<T>*>(lanes[l])->a[i];
        B[M::row_of(l)][M::column_of(l) + i] = static_cast<Product<T>*>(lanes[l])->b[i];
      }
    for (int l = 0; l < n; ++l)
      for (int i = 0; i < 2; ++i) {
        auto p = static_cast<Product<T>*>(lanes[l]);
        float sum = p->c[i];
        for (int k = 0; k < 8; ++k) sum += float(A[M::row_of(l)][k]) * float(B[k][M::column_of(l) + i]);
        p->d[i] = sum;
      }
  }, 0);
  d.elements = {mine.d[0], mine.d[1]};
  harness::count_matrix_product();
}
template <typename T>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<T, 8, 8>& d,
                                          const simdgroup_matrix<T, 8, 8>& a,
                                          const simdgroup_matrix<T, 8, 8>& b,
                                          const simdgroup_matrix<T, 8, 8>& c, LINE) {
  multiply_accumulate(d, a, b, c.elements, "simdgroup_multiply_accumulate", line);
}
template <typename T>
inline void simdgroup_multiply(simdgroup_matrix<T, 8, 8>& d, const simdgroup_matrix<T, 8, 8>& a,
                               const simdgroup_matrix<T, 8, 8>& b, LINE) {
  multiply_accumulate(d, a, b, vec<T, 2>(T(0)), "simdgroup_multiply", line);
}
#undef LINE

}  // namespace metal

namespace harness {
UNWATCHED inline uint3 three(const uint32_t* x) { return {x[0], x[1], x[2]}; }
}  // namespace harness

using namespace metal;
