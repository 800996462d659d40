// CUDA's language for the host's compiler: what the kernels in `kernels/` use of it, and no more.
//
// A block's threads are fibers of one thread of the host. One runs until it waits for others, and then the next; which
// one is next follows from a seed. So a run is repeatable, and other seeds are other orders of the threads.
//
// The kernels are compiled with -fsanitize=thread,alignment, without the libraries that belong to them: the compiler then
// calls a function before each access to memory, and `simt.cpp` has these functions. They refuse accesses outside of the
// arrays that a test has named, accesses of two threads to one place that nothing orders, and misaligned ones.
#pragma once

#include <math.h>
#include <stddef.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned size) : x(size) {}
};

namespace simt {

// The registers of the thread that runs. Blocks and grids have one dimension.
struct Index {
  unsigned x;
};
extern Index thread_index, block_index;

// Waits for all threads of the warp or block. Ends the launch where they wait at different places.
void wait_for_warp();
void wait_for_block();

float shuffle_xor(float value, int mask);

// The product of three 16 x 16 matrices spread over a warp, by all lanes at once: c += a b. Element i of a lane is
// number `place(kind, lane, i)` of the matrix, counted by rows.
void multiply_add(float *c, const float *a, const float *b);

enum Kind { kind_a, kind_b, kind_c };
int place(Kind kind, int lane, int i);

// Ends the launch with a reason.
[[noreturn]] void fail(const char *reason);

// Runs `body(argument)` in `threads` threads of each of `blocks` blocks. False where that failed: see `simt_fault`.
bool run(unsigned blocks, unsigned threads, size_t shared_bytes, void (*body)(void *), void *argument);

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index

inline void __syncthreads() { simt::wait_for_block(); }
inline void __syncwarp() { simt::wait_for_warp(); }
inline float __shfl_xor_sync(unsigned lanes, float value, int mask) {
  if (lanes != 0xffffffffu) simt::fail("a shuffle of some lanes only");
  return simt::shuffle_xor(value, mask);
}
