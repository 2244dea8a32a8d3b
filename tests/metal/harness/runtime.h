// What the C++ side of a kernel (msl.h) asks of the machine that runs it (runtime.cpp).
#pragma once
#include <cstddef>
#include <cstdint>

namespace harness {

// The position of the running thread, in Metal's names and units.
struct Ids {
  uint32_t grid[3], threadgroups[3];            // threads_per_grid, threadgroups_per_grid
  uint32_t group_size[3];                       // threads_per_threadgroup (cut at the grid's edge)
  uint32_t full_group_size[3];                  // dispatch_threads_per_threadgroup
  uint32_t in_grid[3], in_group[3], group[3];   // positions
  uint32_t index, lane, simdgroup, simdgroups;  // in the threadgroup
};

struct Counts {
  uint64_t device_read, device_written;            // bytes, as the threads ask for them
  uint64_t threadgroup_read, threadgroup_written;  // bytes
  uint64_t threadgroup_memory;                     // bytes that one threadgroup declares
  uint64_t barriers;                               // threadgroup barriers, once a threadgroup
  uint64_t simdgroup_barriers;                     // once a SIMD group
  uint64_t simd_ops;                               // reductions, shuffles, matrix operations
  uint64_t matrix_loads, matrix_products;          // of SIMD groups: 8 x 8 operands
  uint64_t multiply_adds;                          // of matrix products and fma()
};

enum Memory { kDevice = 1, kThreadgroup = 2 };

// Every lane of the SIMD group comes here with its operand; the last one to arrive calls `work`
// on all of them. Lanes that never arrive, or arrive at another `what` or line, are an error.
using Work = void (*)(void** operands, int lanes, int argument);
void together(const char* what, int line, void* operand, Work work, int argument);

void barrier(int memory, int line);            // threadgroup_barrier
void simdgroup_barrier(int memory, int line);
void* threadgroup_memory(size_t bytes, int key);  // the same address for one key and threadgroup
void count_matrix_load();                      // called by every lane, counted once, as below
void count_matrix_store();
void count_matrix_product();
void count_multiply_add(int many);
uint32_t lane();

}  // namespace harness
