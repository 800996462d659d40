// The attention kernels by the names and with the parameters that `launch.h` lists, one for each head dim.

#include "attention.h"
#include "attention_backward.cuh"
#include "attention_forward.cuh"

using fastdeit::Half;

#define FASTDEIT_DEFINE(D)                                                                                             \
  extern "C" __global__ void __launch_bounds__(fastdeit::kThreads) fastdeit_attention_forward_##D(                     \
      const Half *qkv, Half *out, float *lse, int tokens, int heads, float scale) {                                    \
    fastdeit::attention_forward<D>(qkv, out, lse, tokens, heads, scale);                                               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(fastdeit::kThreads) fastdeit_attention_query_gradient_##D(              \
      const Half *qkv, const Half *out, const Half *grad, const float *lse, float *delta, Half *dqkv, float *partial,  \
      int tokens, int heads, float scale) {                                                                            \
    fastdeit::attention_query_gradient<D>(qkv, out, grad, lse, delta, dqkv, partial, tokens, heads, scale);            \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(fastdeit::kThreads) fastdeit_attention_key_gradient_##D(                \
      const Half *qkv, const Half *grad, const float *lse, const float *delta, Half *dqkv, float *partial, int tokens, \
      int heads, float scale) {                                                                                        \
    fastdeit::attention_key_gradient<D>(qkv, grad, lse, delta, dqkv, partial, tokens, heads, scale);                   \
  }

FASTDEIT_HEAD_DIMS(FASTDEIT_DEFINE)

extern "C" __global__ void __launch_bounds__(fastdeit::kBiasColumns *fastdeit::kBiasGroups)
    fastdeit_attention_bias_gradient(const float *partial, float *dbias, int rows, int columns) {
  fastdeit::attention_bias_gradient(partial, dbias, rows, columns);
}
