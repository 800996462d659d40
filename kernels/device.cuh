// What the kernels use of the instruction set: 16-bit floats, warp matrices and shared memory.
//
// This is `nvcuda::wmma` and `__half` in the few forms that are needed, written as PTX. CUDA's own headers for them
// (mma.h, cuda_fp16.h) are not used, because half of mma.h belongs to nvcc's package: without them NVRTC needs no
// header at all, and works where only the libraries of PyTorch's wheels are. All of it exists from sm_70 on.
#pragma once

namespace fastdeit {

// The dynamic shared memory of a block.
extern __shared__ __align__(32) unsigned char shared_memory[];

struct Half {
  unsigned short bits;
};

__device__ __forceinline__ float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// Rounded to nearest even; infinite beyond 65,504.
__device__ __forceinline__ Half to_half(float value) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// The 16 x 16 factors of a product: A is stored by rows, B by rows or, as the transpose of a tile, by columns. Which
// lane holds which element is not specified, and A's may be held twice.
struct FragmentA {
  unsigned x[8];
};

enum class Stored { by_rows, by_columns };

template <Stored stored>
struct FragmentB {
  unsigned x[8];
};

// A 16 x 16 sum in float32. Each lane holds eight elements: which ones is not specified, but always the same.
struct Accumulator {
  float x[8];
};

__device__ __forceinline__ unsigned shared_address(const void *pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Loads and stores of a whole warp. Pointers are 32-byte aligned, a pitch is in elements and a multiple of 16 bytes.
// They order nothing: __syncwarp() stands between what other lanes wrote and a load, and between a store and its use.

__device__ __forceinline__ void load(FragmentA &a, const Half *shared, int pitch) {
  asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3]), "=r"(a.x[4]), "=r"(a.x[5]), "=r"(a.x[6]),
                 "=r"(a.x[7])
               : "r"(shared_address(shared)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void load(FragmentB<Stored::by_rows> &b, const Half *shared, int pitch) {
  asm volatile("wmma.load.b.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(b.x[0]), "=r"(b.x[1]), "=r"(b.x[2]), "=r"(b.x[3]), "=r"(b.x[4]), "=r"(b.x[5]), "=r"(b.x[6]),
                 "=r"(b.x[7])
               : "r"(shared_address(shared)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void load(FragmentB<Stored::by_columns> &b, const Half *shared, int pitch) {
  asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(b.x[0]), "=r"(b.x[1]), "=r"(b.x[2]), "=r"(b.x[3]), "=r"(b.x[4]), "=r"(b.x[5]), "=r"(b.x[6]),
                 "=r"(b.x[7])
               : "r"(shared_address(shared)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void load(Accumulator &c, const float *shared, int pitch) {
  asm volatile("wmma.load.c.sync.aligned.row.m16n16k16.shared.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=f"(c.x[0]), "=f"(c.x[1]), "=f"(c.x[2]), "=f"(c.x[3]), "=f"(c.x[4]), "=f"(c.x[5]), "=f"(c.x[6]),
                 "=f"(c.x[7])
               : "r"(shared_address(shared)), "r"(pitch)
               : "memory");
}

__device__ __forceinline__ void store(float *shared, const Accumulator &c, int pitch) {
  asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;"
               :
               : "r"(shared_address(shared)), "f"(c.x[0]), "f"(c.x[1]), "f"(c.x[2]), "f"(c.x[3]), "f"(c.x[4]),
                 "f"(c.x[5]), "f"(c.x[6]), "f"(c.x[7]), "r"(pitch)
               : "memory");
}

// c += a b, of a whole warp.
__device__ __forceinline__ void multiply_add(Accumulator &c, const FragmentA &a,
                                             const FragmentB<Stored::by_rows> &b) {
  asm volatile(
      "wmma.mma.sync.aligned.row.row.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "
      "{%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3]), "+f"(c.x[4]), "+f"(c.x[5]), "+f"(c.x[6]), "+f"(c.x[7])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(a.x[4]), "r"(a.x[5]), "r"(a.x[6]), "r"(a.x[7]),
        "r"(b.x[0]), "r"(b.x[1]), "r"(b.x[2]), "r"(b.x[3]), "r"(b.x[4]), "r"(b.x[5]), "r"(b.x[6]), "r"(b.x[7]));
}

__device__ __forceinline__ void multiply_add(Accumulator &c, const FragmentA &a,
                                             const FragmentB<Stored::by_columns> &b) {
  asm volatile(
      "wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "
      "{%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3]), "+f"(c.x[4]), "+f"(c.x[5]), "+f"(c.x[6]), "+f"(c.x[7])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(a.x[4]), "r"(a.x[5]), "r"(a.x[6]), "r"(a.x[7]),
        "r"(b.x[0]), "r"(b.x[1]), "r"(b.x[2]), "r"(b.x[3]), "r"(b.x[4]), "r"(b.x[5]), "r"(b.x[6]), "r"(b.x[7]));
}

}  // namespace fastdeit
