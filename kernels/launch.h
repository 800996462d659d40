// How the attention kernels are launched: the sizes of their blocks, and one table for everyone who launches them.
//
//   kernel (name in the cubin)                grid                    block  dynamic shared memory, bytes
//   fastdeit_attention_forward_<d>            blocks * heads * batch  128    128 * (d + 8) * 2 + 10,240 +  256
//   fastdeit_attention_query_gradient_<d>     blocks * heads * batch  128    192 * (d + 8) * 2 + 10,240
//   fastdeit_attention_key_gradient_<d>       blocks * heads * batch  128    192 * (d + 8) * 2 + 10,240 +  256
//   fastdeit_attention_bias_gradient          3 * heads * d / 32      256    1,024
//
// with d the head dim, 32, 64, 96 or 128, and blocks = ceil(tokens / 64). All grids and blocks have one dimension.
// More than 48 KiB of shared memory have to be asked for (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES):
// d = 96 and 128 of the gradients do. Parameters, in this order, with `half` as 16 raw bits:
//
//   forward         (const half *qkv, half *out, float *lse, int tokens, int heads, float scale)
//   query_gradient  (const half *qkv, const half *out, const half *grad, const float *lse, float *delta, half *dqkv,
//                    float *partial, int tokens, int heads, float scale)
//   key_gradient    (const half *qkv, const half *grad, const float *lse, const float *delta, half *dqkv,
//                    float *partial, int tokens, int heads, float scale)
//   bias_gradient   (const float *partial, float *dbias, int rows, int columns)
//
// What they point to, and its alignment, is that of `fastdeit_native.h`. A backward is query_gradient, key_gradient
// (which reads the delta of the first) and, where `partial` is not null, bias_gradient with rows = batch * blocks and
// columns = 3 * heads * d, on one stream.
#pragma once

namespace fastdeit {

constexpr int kWarps = 4;                  // of a block of attention
constexpr int kThreads = 32 * kWarps;
constexpr int kRowsOfWarp = 16;            // the side of a warp matrix
constexpr int kRows = kWarps * kRowsOfWarp;  // of a block: queries, or keys where these have the gradient
constexpr int kColumns = 32;               // of a step of a block's loop over the other tokens
constexpr int kTilePadding = 8;            // halves: eight rows of 16 bytes then fall into different banks
constexpr int kStripPitch = kColumns + 8;  // floats, for the same reason

constexpr int kBiasColumns = 32;  // of a block of the bias gradient: a thread for each, and
constexpr int kBiasGroups = 8;    // so many times, each with its own share of the rows

constexpr long long kMostBlocks = 2147483647;  // in the first dimension of a CUDA grid

enum class Kernel { forward = 0, query_gradient = 1, key_gradient = 2, bias_gradient = 3 };

struct LaunchShape {
  long long grid;
  int block;
  int shared_bytes;
};

__host__ __device__ constexpr int tile_bytes(int rows, int head_dim) { return rows * (head_dim + kTilePadding) * 2; }

constexpr int kStripBytes = kRows * kStripPitch * 4;

// The row of the table above. `tokens` and `batch` are positive, and head_dim is one of the four.
__host__ __device__ constexpr LaunchShape launch_shape(Kernel kernel, long long batch, long long tokens,
                                                       long long heads, int head_dim) {
  const long long blocks = (tokens + kRows - 1) / kRows * heads * batch;
  const int of_rows = tile_bytes(kRows, head_dim), of_columns = tile_bytes(kColumns, head_dim);
  switch (kernel) {
    case Kernel::forward:
      return {blocks, kThreads, of_rows + 2 * of_columns + kStripBytes + kRows * 4};
    case Kernel::query_gradient:
      return {blocks, kThreads, 2 * of_rows + 2 * of_columns + kStripBytes};
    case Kernel::key_gradient:
      return {blocks, kThreads, 2 * of_rows + 2 * of_columns + kStripBytes + 2 * kColumns * 4};
    default:
      return {3 * heads * head_dim / kBiasColumns, kBiasColumns * kBiasGroups, kBiasColumns * kBiasGroups * 4};
  }
}

}  // namespace fastdeit
