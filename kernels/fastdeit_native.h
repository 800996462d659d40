/* The C API of fastdeit's native kernels.
 *
 * Plain C: raw device pointers, sizes, a dtype code and a stream, so that one build serves every version of PyTorch.
 * Every function returns a status; `fastdeit_status_text` has the sentence for it. Work is only enqueued: a function
 * neither waits for the device nor allocates memory. Tensors are contiguous, and live on the current device.
 */
#ifndef FASTDEIT_NATIVE_H
#define FASTDEIT_NATIVE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by every change of a signature, of a layout or of the meaning of a number below. */
#define FASTDEIT_NATIVE_API_VERSION 1

/* Rows of a block: `partial` below has one row for each block of each sample. */
#define FASTDEIT_ATTENTION_ROWS 64

enum fastdeit_dtype { FASTDEIT_FLOAT16 = 1 };

enum fastdeit_status {
  FASTDEIT_OK = 0,
  FASTDEIT_NULL_POINTER = 1,
  FASTDEIT_UNSUPPORTED_DTYPE = 2,
  FASTDEIT_UNSUPPORTED_HEAD_DIM = 3,
  FASTDEIT_UNSUPPORTED_SIZE = 4,
  FASTDEIT_MISALIGNED = 5,
  FASTDEIT_NO_KERNEL_IMAGE = 6,
  FASTDEIT_LAUNCH_FAILED = 7
};

/* The version that the library was built with: compare it with FASTDEIT_NATIVE_API_VERSION before any other call. */
int fastdeit_native_api_version(void);

/* One English sentence for a status; never null, and valid for ever. */
const char *fastdeit_status_text(int status);

/* out = softmax(scale * q k^T) v for each head of each sample.
 *
 * qkv    dtype [batch, tokens, 3, heads, head_dim], 16-byte aligned
 * out    dtype [batch, tokens, heads, head_dim], 16-byte aligned; written
 * lse    float32 [batch, heads, tokens], natural logarithm of the sum of the exponentials of a row of logits; written
 * head_dim  32, 64, 96 or 128
 * stream    a cudaStream_t; null is the default stream
 */
int fastdeit_attention_forward(const void *qkv, void *out, float *lse, int64_t batch, int64_t tokens, int64_t heads,
                               int64_t head_dim, float scale, int dtype, void *stream);

/* The gradient of qkv, and the sum of it over all tokens of all samples, which is that of the bias qkv was made with.
 *
 * grad     dtype [batch, tokens, heads, head_dim], the gradient of out, 16-byte aligned
 * qkv, out, lse  as the forward read and wrote them
 * dqkv     dtype [batch, tokens, 3, heads, head_dim], 16-byte aligned; written
 * dbias    float32 [3, heads, head_dim]; written. Null where it is not wanted
 * delta    float32 [batch, heads, tokens]; scratch, overwritten
 * partial  float32 [batch * ceil(tokens / FASTDEIT_ATTENTION_ROWS), 3, heads, head_dim]; scratch, overwritten. Null
 *          exactly where dbias is
 */
int fastdeit_attention_backward(const void *grad, const void *qkv, const void *out, const float *lse, void *dqkv,
                                float *dbias, float *delta, float *partial, int64_t batch, int64_t tokens,
                                int64_t heads, int64_t head_dim, float scale, int dtype, void *stream);

/* The kernels, for programs that launch them by name through the driver. */
enum fastdeit_kernel {
  FASTDEIT_ATTENTION_FORWARD = 0,
  FASTDEIT_ATTENTION_QUERY_GRADIENT = 1,
  FASTDEIT_ATTENTION_KEY_GRADIENT = 2,
  FASTDEIT_ATTENTION_BIAS_GRADIENT = 3
};

/* Grid and block have one dimension. */
struct fastdeit_launch_shape {
  int64_t grid;         /* blocks */
  int64_t block;        /* threads of a block */
  int64_t shared_bytes; /* dynamic shared memory of a block */
};

/* The launch of one kernel: the table in `launch.h`. */
int fastdeit_attention_launch_shape(int kernel, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                                    struct fastdeit_launch_shape *shape);

#ifdef __cplusplus
}
#endif

#endif
