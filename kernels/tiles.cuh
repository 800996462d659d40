// What the attention kernels share: where a block works, tiles of tokens in shared memory, their products, and strips.
//
// A block has four warps, and 64 rows of one head of one sample: queries, or keys where these have the gradient. Each
// warp owns 16 rows. The other tokens pass by 32 at a time, and are the columns.
//
//   tile   rows of a head in 16 bit, [rows][head_dim + 8]
//   strip  a warp's own 16 rows and 32 columns of logits, probabilities or their gradients, [16][40] in float32; once
//          they are factors of a product, in 16 bit, with each row at the same place
//
// Two lanes share a row of the strip. Softmax and its gradient are computed there, since only memory says which row an
// element of a warp matrix belongs to.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace fastdeit {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kEach = kColumns / 2;  // columns of a row that one of its two lanes has

__device__ __forceinline__ float infinity() { return 1.0f / 0.0f; }

// Which rows of which head a block has. Blocks of a head follow one another, so that they find its other tokens in
// the cache.
struct Place {
  long long sample;
  int head, block, blocks;

  __device__ __forceinline__ Place(int tokens, int heads) {
    blocks = (tokens + kRows - 1) / kRows;
    const int own = blockIdx.x / blocks;
    block = blockIdx.x % blocks;
    head = own % heads;
    sample = own / heads;
  }

  __device__ __forceinline__ int first() const { return block * kRows; }
};

// The first row of one head of one sample in a packed tensor [batch, tokens, parts, heads, head_dim].
template <int D, typename T>
__device__ __forceinline__ T *of_head(T *packed, const Place &place, int tokens, int heads, int parts, int part) {
  return packed + (place.sample * tokens * parts + part) * heads * D + place.head * D;
}

// Copies `rows` rows into a tile, zeros where a row does not exist: `left` rows do. By all threads of the block.
template <int D, int rows>
__device__ __forceinline__ void load_tile(Half *tile, const Half *source, int pitch, int left) {
  constexpr int chunks = D / 8;  // of 16 bytes
  static_assert(rows * chunks % kThreads == 0, "every thread copies as many chunks");
#pragma unroll
  for (int step = 0; step < rows * chunks / kThreads; ++step) {
    const int i = step * kThreads + threadIdx.x, row = i / chunks, column = i % chunks * 8;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < left) value = *reinterpret_cast<const uint4 *>(source + static_cast<long long>(row) * pitch + column);
    *reinterpret_cast<uint4 *>(tile + row * (D + kTilePadding) + column) = value;
  }
}

// A lane's part of its warp's strip: row `row()`, and the columns `column(i)` of it, i from 0 to kEach - 1.
struct Lane {
  float *strip;

  __device__ __forceinline__ explicit Lane(unsigned char *strips)
      : strip(reinterpret_cast<float *>(strips) + threadIdx.x / 32 * kRowsOfWarp * kStripPitch) {}

  __device__ __forceinline__ static int row() { return threadIdx.x % 32 / 2; }

  // Groups of four, by turns: the 16 bytes that eight lanes read or write at once fall into different banks.
  __device__ __forceinline__ static int column(int i) { return i / 4 * 8 + threadIdx.x % 2 * 4 + i % 4; }

  // The strip as a factor of a product.
  __device__ __forceinline__ Half *factor() const { return reinterpret_cast<Half *>(strip); }

  __device__ __forceinline__ void read(float (&value)[kEach]) const {
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      const float4 four = *reinterpret_cast<const float4 *>(strip + row() * kStripPitch + column(i));
      value[i] = four.x, value[i + 1] = four.y, value[i + 2] = four.z, value[i + 3] = four.w;
    }
  }

  // In 16 bit, over what both lanes of the row have read.
  __device__ __forceinline__ void write(const float (&value)[kEach]) const {
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      Half four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = to_half(value[i + j]);
      const unsigned low = four[0].bits | static_cast<unsigned>(four[1].bits) << 16;
      const unsigned high = four[2].bits | static_cast<unsigned>(four[3].bits) << 16;
      *reinterpret_cast<uint2 *>(factor() + row() * 2 * kStripPitch + column(i)) = make_uint2(low, high);
    }
  }
};

// Sum over both lanes of a row.
__device__ __forceinline__ float row_sum(float value) { return value + __shfl_xor_sync(0xffffffffu, value, 1); }

// Maximum over both lanes of a row.
__device__ __forceinline__ float row_max(float value) {
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
}

template <int count>
__device__ __forceinline__ void clear(Accumulator (&sums)[count]) {
#pragma unroll
  for (auto &sum : sums)
#pragma unroll
    for (float &element : sum.x) element = 0.0f;
}

// strip = rows columns^T, of 16 rows of a tile and the 32 of another.
template <int D>
__device__ __forceinline__ void product_of_rows(float *strip, const Half *rows, const Half *columns) {
  constexpr int pitch = D + kTilePadding;
  Accumulator sums[kColumns / 16];
  clear(sums);
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    FragmentA a;
    load(a, rows + k, pitch);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      FragmentB<Stored::by_columns> b;
      load(b, columns + n * 16 * pitch + k, pitch);
      multiply_add(sums[n], a, b);
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns / 16; ++n) store(strip + n * 16, sums[n], kStripPitch);
}

// sums += factor tile, of a strip in 16 bit and the 32 rows of a tile: 16 x D.
template <int D>
__device__ __forceinline__ void mix_rows(Accumulator (&sums)[D / 16], const Half *factor, const Half *tile) {
#pragma unroll
  for (int k = 0; k < kColumns; k += 16) {
    FragmentA a;
    load(a, factor + k, 2 * kStripPitch);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      FragmentB<Stored::by_rows> b;
      load(b, tile + k * (D + kTilePadding) + n * 16, D + kTilePadding);
      multiply_add(sums[n], a, b);
    }
  }
}

// Stores the `left` rows that exist of a warp's sums as 16 bit, 32 columns at a time through its strip. With
// `column_sums`, writes there the sums over all 16 rows, in float32 and in the order of the rows.
template <int D>
__device__ __forceinline__ void store_rows(Half *target, int pitch, int left, const Accumulator (&sums)[D / 16],
                                           float *strip, float *column_sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < D; first += kColumns) {
    __syncwarp();  // the strip has been read
    store(strip, sums[first / 16], kStripPitch);
    store(strip + 16, sums[first / 16 + 1], kStripPitch);
    __syncwarp();
#pragma unroll
    for (int row = lane / 4; row < kRowsOfWarp; row += 8) {
      const float *from = strip + row * kStripPitch + lane % 4 * 8;
      unsigned two[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        two[i] = to_half(from[2 * i]).bits | static_cast<unsigned>(to_half(from[2 * i + 1]).bits) << 16;
      if (row < left)
        *reinterpret_cast<uint4 *>(target + static_cast<long long>(row) * pitch + first + lane % 4 * 8) =
            make_uint4(two[0], two[1], two[2], two[3]);
    }
    if (column_sums != nullptr) {
      float sum = 0.0f;
#pragma unroll
      for (int row = 0; row < kRowsOfWarp; ++row) sum += strip[row * kStripPitch + lane];
      column_sums[first + lane] = sum;
    }
  }
}

}  // namespace fastdeit
