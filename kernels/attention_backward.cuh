// Attention's backward, in two kernels and a sum. Each result is added up by one block, in one order: there are no
// atomics, and every run has the same bits. For that, both kernels make the logits and the gradient of the
// probabilities, seven products in all instead of five.
//
//   p = exp(scale * q k^T - lse)      delta = rowsum(grad * out)      ds = scale * p * (grad v^T - delta)
//   dq = ds k                         dk = ds^T q                     dv = p^T grad
//
// p and ds are rounded to 16 bit for their products. dbias is the sum of dq, dk and dv in float32, before they are
// rounded: of a block's rows here, as a row of `partial`, and of all blocks in a kernel of its own.
#pragma once

#include "tiles.cuh"

namespace fastdeit {

// Adds up the column sums [kWarps][D] of the warps, in their order, into one row of `partial`.
template <int D>
__device__ __forceinline__ void store_partial(float *partial, const Place &place, int heads, int part,
                                              const float *column_sums) {
  float *row = partial + ((place.sample * place.blocks + place.block) * 3 + part) * heads * D + place.head * D;
  for (int column = threadIdx.x; column < D; column += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += column_sums[warp * D + column];
    row[column] = sum;
  }
}

// dq of 64 queries, and their delta.
template <int D>
__device__ __forceinline__ void attention_query_gradient(const Half *qkv, const Half *out, const Half *grad,
                                                         const float *lse, float *delta, Half *dqkv, float *partial,
                                                         int tokens, int heads, float scale) {
  constexpr int tile_pitch = D + kTilePadding;
  Half *queries = reinterpret_cast<Half *>(shared_memory);
  Half *grads = queries + kRows * tile_pitch;
  Half *keys = grads + kRows * tile_pitch;
  Half *values = keys + kColumns * tile_pitch;
  const Lane lane(shared_memory + 2 * tile_bytes(kRows, D) + 2 * tile_bytes(kColumns, D));
  const int warp = threadIdx.x / 32, warp_row = warp * kRowsOfWarp;

  const Place place(tokens, heads);
  const int pitch = 3 * heads * D, first_row = place.first() + warp_row, left = tokens - first_row;
  const long long row_of_head = (place.sample * heads + place.head) * tokens + first_row + lane.row();
  const Half *k = of_head<D>(qkv, place, tokens, heads, 3, 1);
  const Half *v = of_head<D>(qkv, place, tokens, heads, 3, 2);
  load_tile<D, kRows>(queries, of_head<D>(qkv, place, tokens, heads, 3, 0) +
                                   static_cast<long long>(place.first()) * pitch,
                      pitch, tokens - place.first());
  load_tile<D, kRows>(grads, of_head<D>(grad, place, tokens, heads, 1, 0) +
                                 static_cast<long long>(place.first()) * heads * D,
                      heads * D, tokens - place.first());
  __syncthreads();

  // Without a row, the base is infinite, and all its probabilities are 0.
  float base = infinity(), product = 0.0f;
  if (lane.row() < left) {
    base = lse[row_of_head] * kLog2E;
    const Half *row = of_head<D>(out, place, tokens, heads, 1, 0) +
                      static_cast<long long>(first_row + lane.row()) * heads * D + threadIdx.x % 2 * 8;
    const Half *other = grads + (warp_row + lane.row()) * tile_pitch + threadIdx.x % 2 * 8;
#pragma unroll
    for (int column = 0; column < D; column += 16) {
      const uint4 eight = *reinterpret_cast<const uint4 *>(row + column);
      const unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Half element{static_cast<unsigned short>(pairs[i / 2] >> i % 2 * 16)};
        product += to_float(element) * to_float(other[column + i]);
      }
    }
  }
  const float own_delta = row_sum(product);
  if (threadIdx.x % 2 == 0 && lane.row() < left) delta[row_of_head] = own_delta;

  Accumulator sums[D / 16];
  clear(sums);
  for (int first = 0; first < tokens; first += kColumns) {
    __syncthreads();  // the keys and values before are used
    load_tile<D, kColumns>(keys, k + static_cast<long long>(first) * pitch, pitch, tokens - first);
    load_tile<D, kColumns>(values, v + static_cast<long long>(first) * pitch, pitch, tokens - first);
    __syncthreads();
    if (left <= 0) continue;  // none of the warp's rows exists
    float p[kEach], ds[kEach];
    product_of_rows<D>(lane.strip, queries + warp_row * tile_pitch, keys);
    __syncwarp();
    lane.read(p);
    __syncwarp();
    product_of_rows<D>(lane.strip, grads + warp_row * tile_pitch, values);
    __syncwarp();
    lane.read(ds);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      // The exponential of a missing key could be infinite, and times zero that is NaN.
      const bool there = first + lane.column(i) < tokens;
      p[i] = there ? exp2f(p[i] * (scale * kLog2E) - base) : 0.0f;
      ds[i] = p[i] * (ds[i] - own_delta) * scale;
    }
    __syncwarp();  // both lanes of a row have read it
    lane.write(ds);
    __syncwarp();
    mix_rows<D>(sums, lane.factor(), keys);
  }

  __syncthreads();  // the keys are used: their memory is that of the column sums
  float *column_sums = reinterpret_cast<float *>(keys);
  Half *target = of_head<D>(dqkv, place, tokens, heads, 3, 0) + static_cast<long long>(first_row) * pitch;
  store_rows<D>(target, pitch, left, sums, lane.strip, partial == nullptr ? nullptr : column_sums + warp * D);
  if (partial == nullptr) return;
  __syncthreads();
  store_partial<D>(partial, place, heads, 0, column_sums);
}

// dk and dv of 64 keys. Logits and what follows from them are transposed here: a row is a key, a column a query.
template <int D>
__device__ __forceinline__ void attention_key_gradient(const Half *qkv, const Half *grad, const float *lse,
                                                       const float *delta, Half *dqkv, float *partial, int tokens,
                                                       int heads, float scale) {
  constexpr int tile_pitch = D + kTilePadding;
  Half *keys = reinterpret_cast<Half *>(shared_memory);
  Half *values = keys + kRows * tile_pitch;
  Half *queries = values + kRows * tile_pitch;
  Half *grads = queries + kColumns * tile_pitch;
  unsigned char *strips = shared_memory + 2 * tile_bytes(kRows, D) + 2 * tile_bytes(kColumns, D);
  float *bases = reinterpret_cast<float *>(strips + kStripBytes);
  float *deltas = bases + kColumns;
  const Lane lane(strips);
  const int warp = threadIdx.x / 32, warp_row = warp * kRowsOfWarp;

  const Place place(tokens, heads);
  const int pitch = 3 * heads * D, first_row = place.first() + warp_row, left = tokens - first_row;
  const long long first_of_head = (place.sample * heads + place.head) * tokens;
  const Half *q = of_head<D>(qkv, place, tokens, heads, 3, 0);
  const Half *g = of_head<D>(grad, place, tokens, heads, 1, 0);
  const long long offset = static_cast<long long>(place.first()) * pitch;
  load_tile<D, kRows>(keys, of_head<D>(qkv, place, tokens, heads, 3, 1) + offset, pitch, tokens - place.first());
  load_tile<D, kRows>(values, of_head<D>(qkv, place, tokens, heads, 3, 2) + offset, pitch, tokens - place.first());

  Accumulator key_sums[D / 16], value_sums[D / 16];
  clear(key_sums);
  clear(value_sums);
  for (int first = 0; first < tokens; first += kColumns) {
    __syncthreads();  // the queries and gradients before are used
    load_tile<D, kColumns>(queries, q + static_cast<long long>(first) * pitch, pitch, tokens - first);
    load_tile<D, kColumns>(grads, g + static_cast<long long>(first) * heads * D, heads * D, tokens - first);
    if (threadIdx.x < kColumns) {
      const int query = first + threadIdx.x;
      bases[threadIdx.x] = query < tokens ? lse[first_of_head + query] * kLog2E : infinity();
      deltas[threadIdx.x] = query < tokens ? delta[first_of_head + query] : 0.0f;
    }
    __syncthreads();
    if (left <= 0) continue;  // none of the warp's rows exists
    float p[kEach], ds[kEach];
    product_of_rows<D>(lane.strip, keys + warp_row * tile_pitch, queries);
    __syncwarp();
    lane.read(p);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      // The exponential of a missing key could be infinite; of a missing query, the base is.
      p[i] = lane.row() < left ? exp2f(p[i] * (scale * kLog2E) - bases[lane.column(i)]) : 0.0f;
    }
    __syncwarp();  // both lanes of a row have read it
    lane.write(p);
    __syncwarp();
    mix_rows<D>(value_sums, lane.factor(), grads);
    __syncwarp();
    product_of_rows<D>(lane.strip, values + warp_row * tile_pitch, grads);
    __syncwarp();
    lane.read(ds);
#pragma unroll
    for (int i = 0; i < kEach; ++i) ds[i] = p[i] * (ds[i] - deltas[lane.column(i)]) * scale;
    __syncwarp();
    lane.write(ds);
    __syncwarp();
    mix_rows<D>(key_sums, lane.factor(), queries);
  }

  __syncthreads();  // the queries are used: their memory is that of the column sums
  float *column_sums = reinterpret_cast<float *>(queries);
  float *own_sums = partial == nullptr ? nullptr : column_sums + warp * D;
  float *own_value_sums = partial == nullptr ? nullptr : own_sums + kWarps * D;
  const long long first_offset = static_cast<long long>(first_row) * pitch;
  Half *dk = of_head<D>(dqkv, place, tokens, heads, 3, 1) + first_offset;
  Half *dv = of_head<D>(dqkv, place, tokens, heads, 3, 2) + first_offset;
  store_rows<D>(dk, pitch, left, key_sums, lane.strip, own_sums);
  store_rows<D>(dv, pitch, left, value_sums, lane.strip, own_value_sums);
  if (partial == nullptr) return;
  __syncthreads();
  store_partial<D>(partial, place, heads, 1, column_sums);
  store_partial<D>(partial, place, heads, 2, column_sums + kWarps * D);
}

// dbias[column] = the sum of `partial[rows, columns]` over its rows: eight shares of every eighth row, then those. The
// columns are a multiple of 32, as every head dim is.
__device__ __forceinline__ void attention_bias_gradient(const float *partial, float *dbias, int rows, int columns) {
  float *shares = reinterpret_cast<float *>(shared_memory);
  const int group = threadIdx.x / kBiasColumns, own = threadIdx.x % kBiasColumns;
  const int column = blockIdx.x * kBiasColumns + own;
  float sum = 0.0f;
  for (int row = group; row < rows; row += kBiasGroups) sum += partial[static_cast<long long>(row) * columns + column];
  shares[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0) return;
  sum = 0.0f;
#pragma unroll
  for (int share = 0; share < kBiasGroups; ++share) sum += shares[share * kBiasColumns + own];
  dbias[column] = sum;
}

}  // namespace fastdeit
