// The attention kernels, declared: what `attention.cu` defines and `api.cu` launches. `launch.h` says how.
#pragma once

#include "device.cuh"
#include "launch.h"

// The head dims that there are kernels for. Whoever compiles when a kernel is needed may name fewer.
#ifndef FASTDEIT_HEAD_DIMS
#define FASTDEIT_HEAD_DIMS(each) each(32) each(64) each(96) each(128)
#endif

#define FASTDEIT_DECLARE(D)                                                                                            \
  __global__ void fastdeit_attention_forward_##D(const fastdeit::Half *qkv, fastdeit::Half *out, float *lse,           \
                                                 int tokens, int heads, float scale);                                  \
  __global__ void fastdeit_attention_query_gradient_##D(                                                               \
      const fastdeit::Half *qkv, const fastdeit::Half *out, const fastdeit::Half *grad, const float *lse,              \
      float *delta, fastdeit::Half *dqkv, float *partial, int tokens, int heads, float scale);                         \
  __global__ void fastdeit_attention_key_gradient_##D(                                                                 \
      const fastdeit::Half *qkv, const fastdeit::Half *grad, const float *lse, const float *delta,                     \
      fastdeit::Half *dqkv, float *partial, int tokens, int heads, float scale);

extern "C" {
FASTDEIT_HEAD_DIMS(FASTDEIT_DECLARE)
__global__ void fastdeit_attention_bias_gradient(const float *partial, float *dbias, int rows, int columns);
}
