// Fibers, barriers, warp products, and the checks of every access to memory: see `simt.h`.

#include "simt.h"

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "cuda_runtime.h"

namespace fastdeit {
alignas(128) unsigned char shared_memory[simt::most_bytes];
}

namespace simt {

Index thread_index, block_index;

namespace {

constexpr unsigned most_threads = 256, most_warps = most_threads / 32, most_regions = 16, most_kernels = 64;
constexpr size_t stack_bytes = 64 * 1024;

enum State { ready, in_warp, in_block, done };
enum Operation { no_operation, operation_sync, operation_shuffle, operation_product };

struct Fiber {
  jmp_buf registers;
  State state;
  Operation operation;  // the one of its warp that it waits in
  unsigned warp_epoch;  // barriers of the warp that it has passed
  float value;          // what it gives to a shuffle
  float *c;
  const float *a, *b;
};

alignas(64) unsigned char stacks[most_threads][stack_bytes];
Fiber fibers[most_threads];
jmp_buf scheduler;
ucontext_t starter;
unsigned current, threads, block_epoch;
size_t shared_size;
void (*body)(void *);
void *argument;
uint64_t seed, noise;
int places[3][256];
char fault[512];
bool failed;

unsigned random_below(unsigned n) {  // xorshift64*
  noise ^= noise >> 12, noise ^= noise << 25, noise ^= noise >> 27;
  return static_cast<unsigned>((noise * 0x2545F4914F6CDD1Dull >> 33) % n);
}

template <typename T>
void shuffle(T *items, unsigned count) {
  for (unsigned i = count; i > 1; --i) {
    const unsigned j = random_below(i);
    const T kept = items[i - 1];
    items[i - 1] = items[j], items[j] = kept;
  }
}

// ---- accesses to memory ----------------------------------------------------------------------------------------------

struct Access {
  unsigned block_epoch, warp_epoch;
  int thread;  // or one of:
};
constexpr int nobody = -1, several = -2;

// Two bytes of shared memory: the last write, and the last reads of each warp.
struct Cell {
  Access write;
  Access read[most_warps];
};
Cell cells[most_bytes / 2];

// An array of a test: outside of them nothing may be read. `writer` has, for each two bytes, 1 + the number of the
// thread in the grid that wrote them in this launch.
struct Region {
  char name[32];
  uintptr_t start;
  size_t bytes;
  uint32_t *writer;  // null: read only
};
Region regions[most_regions];
unsigned region_count;

// Whether the access comes before what the current thread does now.
bool before_now(const Access &access) {
  if (access.thread == nobody || access.block_epoch < block_epoch) return true;
  if (access.thread == static_cast<int>(current)) return true;
  const bool same_warp = access.thread >= 0 && access.thread / 32 == static_cast<int>(current / 32);
  return same_warp && access.warp_epoch < fibers[current].warp_epoch;
}

[[noreturn]] void fail_at(const char *what, size_t bytes, const char *where, long long offset, const char *reason) {
  char text[400];
  snprintf(text, sizeof text, "thread %u of block %u %s %zu bytes at offset %lld of %s: %s", current, block_index.x,
           what, bytes, offset, where, reason);
  fail(text);
}

void access_shared(size_t offset, size_t bytes, bool write) {
  const char *what = write ? "writes" : "reads";
  if (offset + bytes > shared_size)
    fail_at(what, bytes, "shared memory", offset, "the launch has asked for less of it");
  const Access now{block_epoch, fibers[current].warp_epoch, static_cast<int>(current)};
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Cell &cell = cells[i];
    if (!before_now(cell.write)) fail_at(what, bytes, "shared memory", offset, "another thread writes there");
    Access &own = cell.read[current / 32];
    if (write) {
      for (unsigned warp = 0; warp * 32 < threads; ++warp) {
        const Access &read = cell.read[warp];
        const bool ordered = read.thread == several && warp == current / 32
                                 ? read.block_epoch < block_epoch || read.warp_epoch < now.warp_epoch
                                 : before_now(read);
        if (!ordered) fail_at(what, bytes, "shared memory", offset, "another thread reads there");
      }
      cell.write = now;
    } else if (own.block_epoch == block_epoch && own.warp_epoch == now.warp_epoch && own.thread != nobody &&
               own.thread != now.thread) {
      own.thread = several;
    } else {
      own = now;
    }
  }
}

void access_global(uintptr_t at, size_t bytes, bool write) {
  const char *what = write ? "writes" : "reads";
  for (Region *region = regions; region < regions + region_count; ++region) {
    if (at < region->start || at + bytes > region->start + region->bytes) continue;
    const size_t offset = at - region->start;
    if (region->writer == nullptr) {
      if (write) fail_at(what, bytes, region->name, offset, "it is an input");
      return;
    }
    const uint32_t own = 1 + block_index.x * threads + current;
    for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
      uint32_t &writer = region->writer[i];
      if (writer != 0 && writer != own) fail_at(what, bytes, region->name, offset, "another thread has written there");
      if (write) writer = own;
    }
    return;
  }
  // The nearest array, for the message.
  const Region *nearest = nullptr;
  long long best = 0;
  for (Region *region = regions; region < regions + region_count; ++region) {
    const long long offset = static_cast<long long>(at) - static_cast<long long>(region->start);
    const long long distance = offset < 0 ? -offset : offset - static_cast<long long>(region->bytes);
    if (nearest == nullptr || distance < best) nearest = region, best = distance;
  }
  fail_at(what, bytes, nearest ? nearest->name : "no array", nearest ? static_cast<long long>(at - nearest->start) : 0,
          "that is outside of every array");
}

bool inside(uintptr_t at, const void *start, size_t bytes) {
  return at - reinterpret_cast<uintptr_t>(start) < bytes;
}

void access(void *pointer, size_t bytes, bool write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  if (inside(at, stacks, sizeof stacks) || inside(at, &thread_index, sizeof(Index)) ||
      inside(at, &block_index, sizeof(Index)))
    return;
  if (inside(at, fastdeit::shared_memory, sizeof fastdeit::shared_memory))
    access_shared(at - reinterpret_cast<uintptr_t>(fastdeit::shared_memory), bytes, write);
  else
    access_global(at, bytes, write);
}

// ---- fibers ----------------------------------------------------------------------------------------------------------

// Leaves the current fiber for the scheduler; returns when that resumes it.
void leave() {
  if (_setjmp(fibers[current].registers) == 0) _longjmp(scheduler, 1);
}

void enter_fiber() {
  leave();  // made, but not yet wanted
  body(argument);
  fibers[current].state = done;
  _longjmp(scheduler, 1);
}

void resume(unsigned thread) {
  current = thread, thread_index.x = thread;
  if (_setjmp(scheduler) == 0) _longjmp(fibers[thread].registers, 1);
}

void make_fiber(unsigned thread) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[thread];
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter_fiber, 0);
  current = thread;
  fibers[thread].state = ready, fibers[thread].operation = no_operation, fibers[thread].warp_epoch = 0;
  if (_setjmp(scheduler) == 0) swapcontext(&starter, &context);
}

void product_of_warp(Fiber *warp) {
  float a[256], b[256];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i) {
      a[place(kind_a, lane, i)] = warp[lane].a[i];
      b[place(kind_b, lane, i)] = warp[lane].b[i];
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i) {
      const int at = place(kind_c, lane, i), row = at / 16, column = at % 16;
      float sum = warp[lane].c[i];
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * 16 + column];
      warp[lane].c[i] = sum;
    }
}

// Waits until all lanes of the warp are in the same operation. The last one carries it out.
void meet_warp(Operation operation) {
  Fiber *warp = fibers + current / 32 * 32;
  Fiber &own = fibers[current];
  own.operation = operation, own.state = in_warp;
  for (int lane = 0; lane < 32; ++lane) {
    if (warp[lane].state != in_warp) return leave();
    if (warp[lane].operation != operation) fail("lanes of a warp meet in different operations");
  }
  if (operation == operation_product) product_of_warp(warp);
  for (int lane = 0; lane < 32; ++lane) {
    warp[lane].state = ready;
    if (operation == operation_sync) ++warp[lane].warp_epoch;
  }
}

// Lets all go on that wait for the block, if all do.
bool release_block() {
  for (unsigned thread = 0; thread < threads; ++thread)
    if (fibers[thread].state != in_block) return false;
  for (unsigned thread = 0; thread < threads; ++thread) fibers[thread].state = ready;
  ++block_epoch;
  return true;
}

void run_block(unsigned *order) {
  memset(fastdeit::shared_memory, 0xff, sizeof fastdeit::shared_memory);  // NaN
  ++block_epoch;
  for (unsigned thread = 0; thread < threads; ++thread) make_fiber(thread);
  for (;;) {
    bool progress = false, finished = true;
    if (seed != 0) shuffle(order, threads);
    for (unsigned i = 0; i < threads && !failed; ++i) {
      finished &= fibers[order[i]].state == done;
      if (fibers[order[i]].state != ready) continue;
      progress = true;
      resume(order[i]);
    }
    if (failed || finished) return;
    if (!release_block() && !progress) {
      snprintf(fault, sizeof fault, "block %u: threads wait for others that never come", block_index.x);
      failed = true;
      return;
    }
  }
}

}  // namespace

void wait_for_warp() { meet_warp(operation_sync); }

void wait_for_block() {
  fibers[current].state = in_block;
  leave();
}

float shuffle_xor(float value, int mask) {
  fibers[current].value = value;
  meet_warp(operation_shuffle);
  const float result = fibers[current ^ mask].value;
  meet_warp(operation_shuffle);  // all have read
  return result;
}

void multiply_add(float *c, const float *a, const float *b) {
  Fiber &own = fibers[current];
  own.c = c, own.a = a, own.b = b;
  meet_warp(operation_product);
}

int place(Kind kind, int lane, int i) { return places[kind][lane * 8 + i]; }

void fail(const char *reason) {
  if (!failed) snprintf(fault, sizeof fault, "%s", reason);
  failed = true;
  _longjmp(scheduler, 1);
}

bool run(unsigned blocks, unsigned block_threads, size_t shared_bytes, void (*what)(void *), void *with) {
  body = what, argument = with, threads = block_threads, shared_size = shared_bytes;
  failed = false, fault[0] = 0;
  noise = seed * 0x9E3779B97F4A7C15ull + 0x1234567ull;
  for (auto &kind : places) {
    for (int i = 0; i < 256; ++i) kind[i] = i;
    shuffle(kind, 256);
  }
  for (unsigned i = 0; i < region_count; ++i)
    if (regions[i].writer != nullptr) memset(regions[i].writer, 0, (regions[i].bytes + 1) / 2 * sizeof(uint32_t));
  unsigned order[most_threads];
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  for (unsigned block = 0; block < blocks && !failed; ++block) {
    block_index.x = block;
    run_block(order);
  }
  return !failed;
}

size_t &asked_bytes(const void *kernel) {
  static const void *kernels[most_kernels];
  static size_t asked[most_kernels];
  unsigned i = 0;
  while (kernels[i] != kernel && kernels[i] != nullptr)
    if (++i == most_kernels) abort();
  kernels[i] = kernel;
  return asked[i];
}

}  // namespace simt

// ---- for tests -------------------------------------------------------------------------------------------------------

extern "C" {

// Seed 0 runs the threads of a block in the order of their numbers, another in an order drawn from it.
void simt_seed(uint64_t seed) { simt::seed = seed; }

// Names an array that kernels may read, and where `writer` (uint32, one for two bytes) is given, write.
void simt_region(const char *name, void *start, size_t bytes, uint32_t *writer) {
  if (simt::region_count == simt::most_regions) abort();
  simt::Region &region = simt::regions[simt::region_count++];
  snprintf(region.name, sizeof region.name, "%s", name);
  region.start = reinterpret_cast<uintptr_t>(start), region.bytes = bytes, region.writer = writer;
}

// Launches a kernel of two parameters. Not 0 where that failed.
int simt_launch(void (*kernel)(const float *, float *), unsigned blocks, unsigned threads, size_t shared_bytes,
                const float *in, float *out) {
  void *arguments[] = {&in, &out};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, shared_bytes, nullptr);
}

void simt_forget_regions() { simt::region_count = 0; }

// Why the last launch failed; empty where it did not.
const char *simt_fault() { return simt::fault; }

// The compiler calls it before an access by a pointer that is not aligned as its type has to be.
void __ubsan_handle_type_mismatch_v1(void *, uintptr_t) {
  simt::fail("an access to memory is not aligned as its type has to be");
}

void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_read_range(void *at, size_t bytes) { simt::access(at, bytes, false); }
void __tsan_write_range(void *at, size_t bytes) { simt::access(at, bytes, true); }

#define ACCESS(bytes)                                                                   \
  void __tsan_read##bytes(void *at) { simt::access(at, bytes, false); }                 \
  void __tsan_write##bytes(void *at) { simt::access(at, bytes, true); }                 \
  void __tsan_unaligned_read##bytes(void *at) { simt::access(at, bytes, false); }       \
  void __tsan_unaligned_write##bytes(void *at) { simt::access(at, bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
}
