// Attention's forward: 64 queries of one head against all keys, 32 at a time, by online softmax (Milakov & Gimelshein,
// 2018). Logits and probabilities never reach global memory.
//
//   s = scale * log2(e) * q k^T      p = exp2(s - max s)      out = (p v) / sum p      lse = (max s + log2 sum p) ln 2
//
// Where a larger maximum turns up, what was summed so far shrinks. p is rounded to 16 bit for its product with v, and
// summed before that.
#pragma once

#include "tiles.cuh"

namespace fastdeit {

// Multiplies each row of the sums by its own number.
template <int count>
__device__ __forceinline__ void scale_rows(Accumulator (&sums)[count], const float *of_row, const int (&row)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float factor = of_row[row[i]];
#pragma unroll
    for (auto &sum : sums) sum.x[i] *= factor;
  }
}

// The row of each element of an accumulator that this lane holds: read from a matrix of row numbers.
__device__ __forceinline__ void rows_of_elements(int (&row)[8], float *strip) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = lane; i < 256; i += 32) strip[i / 16 * kStripPitch + i % 16] = static_cast<float>(i / 16);
  __syncwarp();
  Accumulator numbers;
  load(numbers, strip, kStripPitch);
#pragma unroll
  for (int i = 0; i < 8; ++i) row[i] = static_cast<int>(numbers.x[i]);
}

template <int D>
__device__ __forceinline__ void attention_forward(const Half *qkv, Half *out, float *lse, int tokens, int heads,
                                                  float scale) {
  constexpr int tile_pitch = D + kTilePadding;
  Half *queries = reinterpret_cast<Half *>(shared_memory);
  Half *keys = queries + kRows * tile_pitch;
  Half *values = keys + kColumns * tile_pitch;
  unsigned char *strips = shared_memory + tile_bytes(kRows, D) + 2 * tile_bytes(kColumns, D);
  const int warp_row = threadIdx.x / 32 * kRowsOfWarp;
  float *of_row = reinterpret_cast<float *>(strips + kStripBytes) + warp_row;

  const Place place(tokens, heads);
  const int pitch = 3 * heads * D, first_row = place.first() + warp_row;
  const Half *q = of_head<D>(qkv, place, tokens, heads, 3, 0);
  const Half *k = of_head<D>(qkv, place, tokens, heads, 3, 1);
  const Half *v = of_head<D>(qkv, place, tokens, heads, 3, 2);
  const Lane lane(strips);

  int row[8];
  rows_of_elements(row, lane.strip);
  load_tile<D, kRows>(queries, q + static_cast<long long>(place.first()) * pitch, pitch, tokens - place.first());
  Accumulator mixed[D / 16];
  clear(mixed);
  float top = -infinity(), total = 0.0f;
  for (int first = 0; first < tokens; first += kColumns) {
    __syncthreads();  // the keys and values before are used
    load_tile<D, kColumns>(keys, k + static_cast<long long>(first) * pitch, pitch, tokens - first);
    load_tile<D, kColumns>(values, v + static_cast<long long>(first) * pitch, pitch, tokens - first);
    __syncthreads();
    if (first_row >= tokens) continue;  // none of the warp's rows exists
    product_of_rows<D>(lane.strip, queries + warp_row * tile_pitch, keys);
    __syncwarp();
    float s[kEach], largest = -infinity();
    lane.read(s);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      s[i] = first + lane.column(i) < tokens ? s[i] * (scale * kLog2E) : -infinity();
      largest = fmaxf(largest, s[i]);
    }
    const float new_top = fmaxf(top, row_max(largest)), shrink = exp2f(top - new_top);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      s[i] = exp2f(s[i] - new_top);
      sum += s[i];
    }
    total = total * shrink + row_sum(sum);
    top = new_top;
    __syncwarp();  // both lanes of a row have read it
    lane.write(s);
    if (threadIdx.x % 2 == 0) of_row[lane.row()] = shrink;
    __syncwarp();
    scale_rows(mixed, of_row, row);
    mix_rows<D>(mixed, lane.factor(), values);
  }
  if (first_row >= tokens) return;
  __syncwarp();
  if (threadIdx.x % 2 == 0) {
    of_row[lane.row()] = 1.0f / total;
    if (first_row + lane.row() < tokens)
      lse[(place.sample * heads + place.head) * tokens + first_row + lane.row()] = (top + log2f(total)) / kLog2E;
  }
  __syncwarp();
  scale_rows(mixed, of_row, row);
  Half *target = of_head<D>(out, place, tokens, heads, 1, 0) + static_cast<long long>(first_row) * heads * D;
  store_rows<D>(target, heads * D, tokens - first_row, mixed, lane.strip, nullptr);
}

}  // namespace fastdeit
