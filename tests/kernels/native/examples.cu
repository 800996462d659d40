// Small kernels, right and wrong, to see what the SIMT shim does with them (`test_simt.py`). All have the same parameters.

#include <string.h>

#include "device.cuh"

using namespace fastdeit;

static float *shared() { return reinterpret_cast<float *>(shared_memory); }

extern "C" {

// ---- right -----------------------------------------------------------------------------------------------------------

__global__ void reversed(const float *in, float *out) {
  const unsigned i = blockIdx.x * 64 + threadIdx.x;
  shared()[threadIdx.x] = in[i];
  __syncthreads();
  out[i] = shared()[63 - threadIdx.x];
}

__global__ void reversed_in_warp(const float *in, float *out) {
  const unsigned i = blockIdx.x * 64 + threadIdx.x, warp = threadIdx.x / 32 * 32;
  shared()[threadIdx.x] = in[i];
  __syncwarp();
  out[i] = shared()[warp + 31 - threadIdx.x % 32];
}

__global__ void exchanged(const float *in, float *out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1), 4);
}

// out [16, 16] = a b + a b^T + c, of a and b in 16 bit and c in float32, all [16, 16], one after the other.
__global__ void product(const float *in, float *out) {
  const Half *given = reinterpret_cast<const Half *>(in);
  Half *a = reinterpret_cast<Half *>(shared_memory), *b = a + 16 * 24;
  float *c = reinterpret_cast<float *>(b + 16 * 24);
  for (int i = threadIdx.x; i < 256; i += 32) {
    a[i / 16 * 24 + i % 16] = given[i];
    b[i / 16 * 24 + i % 16] = given[256 + i];
    c[i / 16 * 20 + i % 16] = in[256 + i];
  }
  __syncwarp();
  FragmentA left;
  FragmentB<Stored::by_rows> right;
  FragmentB<Stored::by_columns> transposed;
  Accumulator sum;
  load(left, a, 24);
  load(right, b, 24);
  load(transposed, b, 24);
  load(sum, c, 20);
  multiply_add(sum, left, right);
  multiply_add(sum, left, transposed);
  __syncwarp();
  store(c, sum, 20);
  __syncwarp();
  for (int i = threadIdx.x; i < 256; i += 32) out[i] = c[i / 16 * 20 + i % 16];
}

__global__ void rounded(const float *in, float *out) {
  const unsigned i = blockIdx.x * 32 + threadIdx.x;
  out[i] = to_float(to_half(in[i]));
}

__global__ void unwritten(const float *, float *out) { out[threadIdx.x] = shared()[threadIdx.x]; }

// ---- wrong -----------------------------------------------------------------------------------------------------------

__global__ void no_barrier(const float *in, float *out) {
  shared()[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = shared()[63 - threadIdx.x];
}

__global__ void barrier_of_the_warp_only(const float *in, float *out) {
  shared()[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = shared()[63 - threadIdx.x];
}

__global__ void no_barrier_before_the_next_write(const float *in, float *out) {
  shared()[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared()[63 - threadIdx.x];
  shared()[threadIdx.x] = 0.0f;
}

__global__ void two_write_one_place(const float *in, float *) { shared()[threadIdx.x / 2] = in[threadIdx.x]; }

// A shuffle orders no memory.
__global__ void shuffle_for_a_barrier(const float *in, float *out) {
  shared()[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  out[threadIdx.x] = shared()[threadIdx.x ^ 1];
}

__global__ void reads_beyond_the_end(const float *in, float *out) { out[threadIdx.x] = in[threadIdx.x + 65]; }

__global__ void writes_before_the_start(const float *, float *out) { (out - 1)[threadIdx.x] = 0.0f; }

__global__ void writes_its_input(const float *in, float *) { const_cast<float *>(in)[threadIdx.x] = 0.0f; }

__global__ void blocks_write_one_place(const float *in, float *out) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void reads_what_another_block_wrote(const float *in, float *out) {
  const unsigned i = blockIdx.x * 64 + threadIdx.x;
  out[i] = blockIdx.x == 0 ? in[i] : out[threadIdx.x];
}

__global__ void more_shared_memory_than_asked(const float *in, float *) { shared()[threadIdx.x + 1] = in[threadIdx.x]; }

__global__ void some_threads_at_the_barrier(const float *, float *) {
  if (threadIdx.x != 7) __syncthreads();
}

__global__ void lanes_in_different_operations(const float *in, float *out) {
  if (threadIdx.x % 32 == 7)
    __syncwarp();
  else
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

__global__ void shuffle_of_some_lanes(const float *in, float *out) { out[threadIdx.x] = __shfl_xor_sync(1u, in[threadIdx.x], 1); }

__global__ void matrix_that_is_not_aligned(const float *, float *) {
  Accumulator sum;
  load(sum, shared() + 4, 16);
}

__global__ void pitch_that_is_not_a_multiple(const float *, float *) {
  FragmentA a;
  load(a, reinterpret_cast<const Half *>(shared()), 20);
}

__global__ void vector_that_is_not_aligned(const float *in, float *out) {
  const uint2 two = *reinterpret_cast<const uint2 *>(in + 1);
  memcpy(out + threadIdx.x, &two.x, 4);
}

}  // extern "C"
