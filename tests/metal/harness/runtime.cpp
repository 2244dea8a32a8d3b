// Runs one kernel launch: every GPU thread is a fiber that yields at SIMD operations and barriers.
//
// The kernel is compiled with -fsanitize=thread and =bounds and linked without their libraries: the
// compiler then calls the functions at the end of this file before each access to memory that is
// not a register, and they check it. This file is compiled without it, and knows nothing of MSL.
#define _XOPEN_SOURCE 700  // macOS has ucontext with this only
#define _DARWIN_C_SOURCE
#include "runtime.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

extern "C" void harness_thread(void** buffers, const harness::Ids* ids);  // the kernel

namespace harness {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kGap = 64 << 20;  // unmapped, between two buffers: no stride jumps over it
constexpr size_t kPage = 4096;
constexpr size_t kThreadgroupLimit = 32 << 10;
constexpr size_t kRedZone = 256;  // between two threadgroup arrays
constexpr int kMaxThreads = 1024;

// When, and by whom, an address was touched.
struct Stamp {
  uint32_t group = 0;  // threadgroup + 1; 0 is never
  uint32_t epoch, simd_epoch;
  uint32_t thread;
};

// Two bytes of memory. Three reads, so that neither another lane of the last reader's SIMD group
// nor another SIMD group is forgotten.
struct Cell {
  Stamp write, read, read_in_simdgroup, read_elsewhere;
};

enum Kind { kInput, kOutput, kConstant };  // constant: few bytes, kept near; not counted

struct Buffer {
  char* data;
  size_t bytes;
  Kind kind;
  std::vector<Cell> cells;  // outputs only
};

enum State { kReady, kAtSimd, kAtBarrier, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf where;
  bool started = false;
  State state;
  Ids ids;
  uint32_t epoch[3], simd_epoch[3];  // by Memory
  const char* what;
  int line;
};

// The lanes of a SIMD group, or the threads of a threadgroup, on their way to one operation.
struct Meeting {
  int arrived = 0, size = 0;
  const char* what;
  int line, argument;
  void* operands[kMaxThreads];
};

struct Array {
  int key;
  char* data;
  size_t bytes;
};

struct Machine {
  std::vector<Buffer> buffers;
  std::vector<void*> pointers;
  Fiber fibers[kMaxThreads];
  Meeting simd[kMaxThreads / 32], group;
  char* stacks;
  char* memory;  // threadgroup memory with its red zones
  std::vector<Array> arrays;
  std::vector<Cell> cells;
  size_t used = 0, declared = 0;
  uint32_t group_index = 0;
  bool lanes_may_collide = false;
  Fiber* running = nullptr;
  jmp_buf scheduler, failed;
  ucontext_t first;
  Counts counts{};
  char* message;
  size_t message_size;
  void* pc = nullptr;
};
constexpr size_t kMemoryArena = 256 << 10;
Machine* m;

[[noreturn]] void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  int n = vsnprintf(m->message, m->message_size, format, args);
  va_end(args);
  if (Fiber* f = m->running; f && n >= 0 && size_t(n) < m->message_size) {
    const Ids& i = f->ids;
    snprintf(m->message + n, m->message_size - n, " [thread (%u, %u, %u) of threadgroup (%u, %u, %u)]",
             i.in_group[0], i.in_group[1], i.in_group[2], i.group[0], i.group[1], i.group[2]);
  }
  _longjmp(m->failed, 1);
}

void yield() {
  Fiber* self = m->running;
  if (!_setjmp(self->where)) _longjmp(m->scheduler, 1);
}

void fiber_main() {
  for (;;) {
    Fiber* self = m->running;
    harness_thread(m->pointers.data(), &self->ids);
    self->state = kDone;
    yield();  // comes back for the next threadgroup
  }
}

void resume(Fiber& f) {
  m->running = &f;
  if (!_setjmp(m->scheduler)) {
    if (f.started) _longjmp(f.where, 1);
    f.started = true;
    swapcontext(&m->first, &f.context);
  }
  m->running = nullptr;
}

void describe(Fiber& f, char* out, size_t size) {
  if (f.state == kDone) snprintf(out, size, "has ended");
  else snprintf(out, size, "waits at %s, line %d", f.what, f.line);
}

// Nothing can run: some thread is where another will never come.
[[noreturn]] void stuck(int threads) {
  Fiber* a = nullptr;
  for (int i = 0; i < threads; ++i)
    if (m->fibers[i].state != kDone) { a = &m->fibers[i]; break; }
  // Another of those it waits for: of its SIMD group, or of the threadgroup.
  for (int i = 0; i < threads; ++i) {
    Fiber& b = m->fibers[i];
    bool awaited = a->state == kAtBarrier || b.ids.simdgroup == a->ids.simdgroup;
    if (!awaited || (b.state == a->state && b.line == a->line)) continue;
    char first[160], second[160];
    describe(*a, first, sizeof first);
    describe(b, second, sizeof second);
    fail("divergence: thread %u %s, but thread %u %s", a->ids.index, first, b.ids.index, second);
  }
  fail("divergence: no thread can go on");
}

bool ordered(const Stamp& before, const Fiber& now, int memory) {
  if (before.group != m->group_index + 1) return before.group == 0;
  if (before.thread == now.ids.index || before.epoch < now.epoch[memory]) return true;
  return before.thread / 32 == now.ids.simdgroup && before.simd_epoch < now.simd_epoch[memory];
}

void touch(Cell& cell, bool write, int memory, const char* name) {
  Fiber& f = *m->running;
  bool same_group = cell.write.group == m->group_index + 1;
  bool forgiven = write && m->lanes_may_collide && same_group &&
                  cell.write.thread / 32 == f.ids.simdgroup;
  if (!forgiven && !ordered(cell.write, f, memory))
    fail("race: %s of %s that thread %u of threadgroup %u wrote with no barrier between",
         write ? "write" : "read", name, cell.write.thread, cell.write.group - 1);
  Stamp now{m->group_index + 1, f.epoch[memory], f.simd_epoch[memory], f.ids.index};
  if (write) {
    for (const Stamp* read : {&cell.read, &cell.read_in_simdgroup, &cell.read_elsewhere})
      if (!ordered(*read, f, memory))
        fail("race: write of %s that thread %u of threadgroup %u read with no barrier between",
             name, read->thread, read->group - 1);
    cell.write = now;
    return;
  }
  if (cell.write.group == 0) fail("uninitialised: read of %s that was not written", name);
  if (cell.read.group && cell.read.thread != now.thread) {
    bool same = cell.read.group == now.group && cell.read.thread / 32 == now.thread / 32;
    (same ? cell.read_in_simdgroup : cell.read_elsewhere) = cell.read;
  }
  cell.read = now;
}

void access(void* address, size_t size, bool write, void* pc) {
  if (!m || !m->running) return;
  char* p = static_cast<char*>(address);
  if (p >= m->stacks && p < m->stacks + kMaxThreads * kStack) return;  // private to a thread
  m->pc = pc;
  const char* verb = write ? "write" : "read";
  if (p >= m->memory && p < m->memory + kMemoryArena) {
    for (auto& a : m->arrays) {
      if (p < a.data || p + size > a.data + a.bytes) continue;
      (write ? m->counts.threadgroup_written : m->counts.threadgroup_read) += size;
      if (size < 2) fail("threadgroup memory of one-byte elements is more than the harness checks");
      for (size_t i = (p - m->memory) / 2, end = (p - m->memory + size) / 2; i < end; ++i)
        touch(m->cells[i], write, kThreadgroup, "threadgroup memory");
      return;
    }
    fail("out of bounds: %s of %zu bytes outside every threadgroup array", verb, size);
  }
  for (size_t i = 0; i < m->buffers.size(); ++i) {
    Buffer& b = m->buffers[i];
    if (p < b.data || p + size > b.data + b.bytes) continue;
    if (b.kind != kConstant) (write ? m->counts.device_written : m->counts.device_read) += size;
    if (b.kind != kOutput) {
      if (write) fail("write to input buffer %zu", i);
      return;
    }
    if (size < 2) fail("outputs of one-byte elements are more than the harness checks");
    for (size_t c = (p - b.data) / 2, end = (p - b.data + size) / 2; c < end; ++c)
      touch(b.cells[c], write, kDevice, "an output buffer");
    return;
  }
  for (size_t i = 0; i < m->buffers.size(); ++i) {  // name the one it missed
    Buffer& b = m->buffers[i];
    if (p >= b.data - kGap / 2 && p < b.data + b.bytes + kGap / 2)
      fail("out of bounds: %s of %zu bytes at byte %td of buffer %zu, which has %zu", verb, size,
           p - b.data, i, b.bytes);
  }
  fail("out of bounds: %s of %zu bytes in no buffer", verb, size);
}

void run_threadgroup(const Ids& base, int order, std::mt19937& random) {
  int threads = base.group_size[0] * base.group_size[1] * base.group_size[2];
  m->arrays.clear();
  std::fill(m->cells.begin(), m->cells.end(), Cell{});
  m->used = m->declared = 0;
  m->group.arrived = 0;
  m->group.size = threads;
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = m->fibers[i];
    f.state = kReady;
    f.ids = base;
    const uint32_t in_group[3] = {uint32_t(i) % base.group_size[0],
                                  uint32_t(i) / base.group_size[0] % base.group_size[1],
                                  uint32_t(i) / base.group_size[0] / base.group_size[1]};
    for (int d = 0; d < 3; ++d) {
      f.ids.in_group[d] = in_group[d];
      f.ids.in_grid[d] = base.group[d] * base.full_group_size[d] + in_group[d];
    }
    f.ids.index = i;
    f.ids.lane = i % 32;
    f.ids.simdgroup = i / 32;
    f.ids.simdgroups = (threads + 31) / 32;
    memset(f.epoch, 0, sizeof f.epoch);
    memset(f.simd_epoch, 0, sizeof f.simd_epoch);
    m->simd[i / 32].arrived = 0;
    m->simd[i / 32].size = std::min(32, threads - i / 32 * 32);
    turn[i] = order < 0 ? threads - 1 - i : i;
  }
  for (int left = threads; left;) {
    if (order > 0) std::shuffle(turn.begin(), turn.end(), random);
    bool moved = false;
    for (int i : turn) {
      Fiber& f = m->fibers[i];
      if (f.state != kReady) continue;
      resume(f);
      moved = true;
      left -= f.state == kDone;
    }
    if (!moved) stuck(threads);
  }
  m->counts.threadgroup_memory = std::max<uint64_t>(m->counts.threadgroup_memory, m->declared);
}

// A thread comes to a meeting; true for the last one.
bool arrive(Meeting& at, State waiting, const char* what, int line, void* operand, int argument) {
  Fiber& f = *m->running;
  f.what = what;
  f.line = line;
  if (at.arrived && (strcmp(at.what, what) || at.line != line))
    fail("divergence: %s, line %d, while others wait at %s, line %d", what, line, at.what, at.line);
  if (at.arrived && at.argument != argument)
    fail("divergence: lanes call %s with different arguments", what);
  at.what = what;
  at.line = line;
  at.argument = argument;
  at.operands[waiting == kAtSimd ? f.ids.lane : f.ids.index] = operand;
  f.state = waiting;
  return ++at.arrived == at.size;
}

void release(Meeting& at, int first) {
  at.arrived = 0;
  for (int i = first; i < first + at.size; ++i) m->fibers[i].state = kReady;
}

}  // namespace

void together(const char* what, int line, void* operand, Work work, int argument) {
  const Ids& ids = m->running->ids;
  Meeting& at = m->simd[ids.simdgroup];
  if (!arrive(at, kAtSimd, what, line, operand, argument)) return yield();
  work(at.operands, at.size, argument);
  ++m->counts.simd_ops;
  release(at, ids.simdgroup * 32);
}

void barrier(int memory, int line) {
  if (arrive(m->group, kAtBarrier, "threadgroup_barrier", line, nullptr, memory)) {
    ++m->counts.barriers;
    release(m->group, 0);
  } else {
    yield();
  }
  for (int kind : {kDevice, kThreadgroup}) m->running->epoch[kind] += (memory & kind) != 0;
}

void simdgroup_barrier(int memory, int line) {
  const Ids& ids = m->running->ids;
  Meeting& at = m->simd[ids.simdgroup];
  if (arrive(at, kAtSimd, "simdgroup_barrier", line, nullptr, memory)) {
    ++m->counts.simdgroup_barriers;
    release(at, ids.simdgroup * 32);
  } else {
    yield();
  }
  for (int kind : {kDevice, kThreadgroup}) m->running->simd_epoch[kind] += (memory & kind) != 0;
}

void* threadgroup_memory(size_t bytes, int key) {
  for (auto& a : m->arrays)
    if (a.key == key) return a.data;
  m->declared += (bytes + 15) / 16 * 16;
  if (m->declared > kThreadgroupLimit)
    fail("threadgroup memory: %zu bytes, more than the 32 KiB that Metal has", m->declared);
  m->used += kRedZone;
  char* data = m->memory + m->used;
  m->used += (bytes + 15) / 16 * 16;
  m->arrays.push_back({key, data, bytes});
  return data;
}

void count_matrix_load() {
  m->counts.simd_ops += m->running->ids.lane == 0;
  m->counts.matrix_loads += m->running->ids.lane == 0;
}
void count_matrix_store() { m->counts.simd_ops += m->running->ids.lane == 0; }
void count_matrix_product() {
  m->counts.matrix_products += m->running->ids.lane == 0;
  m->counts.multiply_adds += m->running->ids.lane == 0 ? 512 : 0;
}
void count_multiply_add(int many) { m->counts.multiply_adds += many; }
uint32_t lane() { return m->running->ids.lane; }

void outside_of_array(void* pc) {
  m->pc = pc;
  fail("out of bounds: index outside of a thread's or threadgroup's array");
}

}  // namespace harness

// Runs a launch. `data`, `bytes`, `kinds`: one for each buffer, the inputs first. `order`: 0 is
// forward, -1 backward, otherwise the seed of a random order. `lanes_may_collide`: lanes of one SIMD
// group may write one address. Returns 0, or 1 with a message and
// with the place in the library where it happened (or 0).
extern "C" int harness_launch(int n, void** data, const uint64_t* bytes, const uint8_t* kinds,
                              const uint32_t* grid, const uint32_t* threadgroup, int order,
                              int lanes_may_collide, harness::Counts* counts, char* message, uint64_t message_size,
                              void** pc) {
  using namespace harness;
  auto machine = std::make_unique<Machine>();  // too large for a stack
  m = machine.get();
  m->message = message;
  m->message_size = message_size;
  m->lanes_may_collide = lanes_may_collide;
  auto map = [](size_t size, int protection) {
    return static_cast<char*>(mmap(nullptr, size, protection,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  };
  size_t arena_size = kGap;
  for (int i = 0; i < n; ++i) arena_size += (bytes[i] + kPage - 1) / kPage * kPage + kGap;
  char* arena = map(arena_size, PROT_NONE);
  m->stacks = map(kMaxThreads * kStack, PROT_READ | PROT_WRITE);
  m->memory = map(kMemoryArena, PROT_READ | PROT_WRITE);
  m->cells.resize(kMemoryArena / 2);
  char* at = arena + kGap;
  for (int i = 0; i < n; ++i) {
    size_t size = (bytes[i] + kPage - 1) / kPage * kPage;
    if (size) mprotect(at, size, PROT_READ | PROT_WRITE);
    m->buffers.push_back({at, bytes[i], Kind(kinds[i]), {}});
    if (kinds[i] == kOutput) {
      memset(at, 0xFF, bytes[i]);  // NaN in every float type
      m->buffers.back().cells.resize((bytes[i] + 1) / 2);
    } else {
      memcpy(at, data[i], bytes[i]);
    }
    m->pointers.push_back(at);
    at += size + kGap;
  }
  for (int i = 0; i < kMaxThreads; ++i) {
    ucontext_t& c = m->fibers[i].context;
    getcontext(&c);
    c.uc_stack.ss_sp = m->stacks + i * kStack;
    c.uc_stack.ss_size = kStack;
    c.uc_link = nullptr;
    makecontext(&c, fiber_main, 0);
  }
  Ids ids{};
  for (int d = 0; d < 3; ++d) {
    ids.grid[d] = grid[d];
    ids.full_group_size[d] = std::min(threadgroup[d], grid[d]);  // as MLX dispatches
    ids.threadgroups[d] = (grid[d] + ids.full_group_size[d] - 1) / ids.full_group_size[d];
  }
  std::mt19937 random(order);
  volatile int failed = 0;
  if (_setjmp(m->failed)) {
    failed = 1;
  } else {
    uint32_t all = ids.threadgroups[0] * ids.threadgroups[1] * ids.threadgroups[2];
    std::vector<uint32_t> groups(all);
    for (uint32_t i = 0; i < all; ++i) groups[i] = order < 0 ? all - 1 - i : i;
    if (order > 0) std::shuffle(groups.begin(), groups.end(), random);
    for (uint32_t g : groups) {
      m->group_index = g;
      ids.group[0] = g % ids.threadgroups[0];
      ids.group[1] = g / ids.threadgroups[0] % ids.threadgroups[1];
      ids.group[2] = g / ids.threadgroups[0] / ids.threadgroups[1];
      for (int d = 0; d < 3; ++d)
        ids.group_size[d] =
            std::min(ids.full_group_size[d], grid[d] - ids.group[d] * ids.full_group_size[d]);
      run_threadgroup(ids, order, random);
    }
    m->pc = nullptr;
    for (size_t i = 0; i < m->buffers.size(); ++i) {
      Buffer& b = m->buffers[i];
      size_t missing = std::count_if(b.cells.begin(), b.cells.end(),
                                     [](const Cell& c) { return c.write.group == 0; });
      if (missing)
        fail("unwritten: %zu of %zu bytes of output buffer %zu", 2 * missing, b.bytes, i);
    }
  }
  for (int i = 0; i < n; ++i)
    if (kinds[i] == kOutput && !failed) memcpy(data[i], m->buffers[i].data, bytes[i]);
  *counts = m->counts;
  Dl_info here;
  *pc = nullptr;
  if (failed && m->pc && dladdr(m->pc, &here))
    *pc = reinterpret_cast<void*>(static_cast<char*>(m->pc) - static_cast<char*>(here.dli_fbase));
  m = nullptr;
  munmap(arena, arena_size);
  munmap(machine->stacks, kMaxThreads * kStack);
  munmap(machine->memory, kMemoryArena);
  return failed;
}

// What -fsanitize=thread and -fsanitize=bounds call, by GCC's and Clang's names.
#define HERE __builtin_return_address(0)
#define ACCESS(size)                                                                          \
  void __tsan_read##size(void* p) { harness::access(p, size, false, HERE); }                  \
  void __tsan_write##size(void* p) { harness::access(p, size, true, HERE); }                  \
  void __tsan_unaligned_read##size(void* p) { harness::access(p, size, false, HERE); }        \
  void __tsan_unaligned_write##size(void* p) { harness::access(p, size, true, HERE); }        \
  void __tsan_read_write##size(void* p) {                                                     \
    harness::access(p, size, false, HERE);                                                    \
    harness::access(p, size, true, HERE);                                                     \
  }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t size) { harness::access(p, size, false, HERE); }
void __tsan_write_range(void* p, size_t size) { harness::access(p, size, true, HERE); }
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  harness::access(const_cast<void*>(from), size, false, HERE);
  harness::access(to, size, true, HERE);
  return memcpy(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  harness::access(to, size, true, HERE);
  return memset(to, value, size);
}
void __ubsan_handle_out_of_bounds(void*, void*) { harness::outside_of_array(HERE); }
void __ubsan_handle_out_of_bounds_abort(void*, void*) { harness::outside_of_array(HERE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
