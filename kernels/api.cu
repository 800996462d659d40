// The C API: checks what it is given, and enqueues kernels through CUDA's runtime.

#include <cuda_runtime.h>

#include "attention.h"
#include "fastdeit_native.h"

using fastdeit::Half;
using fastdeit::Kernel;
using fastdeit::LaunchShape;

namespace {

static_assert(FASTDEIT_ATTENTION_ROWS == fastdeit::kRows, "the header says how large `partial` is");
static_assert(static_cast<int>(Kernel::bias_gradient) == FASTDEIT_ATTENTION_BIAS_GRADIENT, "one numbering of kernels");

struct Sizes {
  int64_t batch, tokens, heads, head_dim;
};

bool has_kernels(int64_t head_dim) {
#define FASTDEIT_IS(D) || head_dim == D
  return false FASTDEIT_HEAD_DIMS(FASTDEIT_IS);
#undef FASTDEIT_IS
}

// Blocks are counted in 32 bits, and so are a row's elements, and the rows and columns of `partial`.
fastdeit_status check(const Sizes &sizes) {
  if (!has_kernels(sizes.head_dim)) return FASTDEIT_UNSUPPORTED_HEAD_DIM;
  if (sizes.batch < 1 || sizes.tokens < 1 || sizes.heads < 1) return FASTDEIT_UNSUPPORTED_SIZE;
  const int64_t most = fastdeit::kMostBlocks - fastdeit::kRows;
  if (sizes.tokens > most || sizes.heads > most / (3 * sizes.head_dim)) return FASTDEIT_UNSUPPORTED_SIZE;
  const int64_t blocks = (sizes.tokens + fastdeit::kRows - 1) / fastdeit::kRows;
  if (sizes.batch > most / blocks / sizes.heads) return FASTDEIT_UNSUPPORTED_SIZE;
  return FASTDEIT_OK;
}

fastdeit_status check(int dtype, const Sizes &sizes) {
  return dtype == FASTDEIT_FLOAT16 ? check(sizes) : FASTDEIT_UNSUPPORTED_DTYPE;
}

bool aligned(const void *pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename... P, typename... A>
fastdeit_status launch(Kernel name, void (*kernel)(P...), const Sizes &sizes, void *stream, A... given) {
  const LaunchShape shape =
      launch_shape(name, sizes.batch, sizes.tokens, sizes.heads, static_cast<int>(sizes.head_dim));
  // CUDA has to be asked for more than 48 KiB.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
  if (error == cudaSuccess) {
    // Pointers to copies of the parameters, in the types that the kernel has them in.
    const auto call = [&](P... parameters) {
      void *pointers[] = {&parameters...};
      return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(shape.grid)), dim3(shape.block), pointers,
                              shape.shared_bytes, static_cast<cudaStream_t>(stream));
    };
    error = call(static_cast<P>(given)...);
  }
  if (error == cudaSuccess) return FASTDEIT_OK;
  cudaGetLastError();  // it is reported here: the next call of somebody else shall not find it
  return error == cudaErrorNoKernelImageForDevice ? FASTDEIT_NO_KERNEL_IMAGE : FASTDEIT_LAUNCH_FAILED;
}

}  // namespace

extern "C" {

int fastdeit_native_api_version(void) { return FASTDEIT_NATIVE_API_VERSION; }

const char *fastdeit_status_text(int status) {
  switch (status) {
    case FASTDEIT_OK:
      return "it was enqueued";
    case FASTDEIT_NULL_POINTER:
      return "a pointer is null";
    case FASTDEIT_UNSUPPORTED_DTYPE:
      return "only float16 is supported";
    case FASTDEIT_UNSUPPORTED_HEAD_DIM:
      return "the library has no kernel for this head dim: 32, 64, 96 and 128 exist";
    case FASTDEIT_UNSUPPORTED_SIZE:
      return "a size is not positive, or too large for one launch";
    case FASTDEIT_MISALIGNED:
      return "a 16-bit tensor is not aligned to 16 bytes, or a float32 tensor not to 4";
    case FASTDEIT_NO_KERNEL_IMAGE:
      return "the library was not built for this architecture";
    case FASTDEIT_LAUNCH_FAILED:
      return "CUDA refused a launch";
    default:
      return "no such status";
  }
}

int fastdeit_attention_launch_shape(int kernel, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                                    fastdeit_launch_shape *shape) {
  if (shape == nullptr) return FASTDEIT_NULL_POINTER;
  if (kernel < FASTDEIT_ATTENTION_FORWARD || kernel > FASTDEIT_ATTENTION_BIAS_GRADIENT)
    return FASTDEIT_UNSUPPORTED_SIZE;
  const Sizes sizes{batch, tokens, heads, head_dim};
  if (const fastdeit_status status = check(sizes)) return status;
  const LaunchShape found =
      launch_shape(static_cast<Kernel>(kernel), batch, tokens, heads, static_cast<int>(head_dim));
  *shape = {found.grid, found.block, found.shared_bytes};
  return FASTDEIT_OK;
}

int fastdeit_attention_forward(const void *qkv, void *out, float *lse, int64_t batch, int64_t tokens, int64_t heads,
                               int64_t head_dim, float scale, int dtype, void *stream) {
  const Sizes sizes{batch, tokens, heads, head_dim};
  if (const fastdeit_status status = check(dtype, sizes)) return status;
  if (qkv == nullptr || out == nullptr || lse == nullptr) return FASTDEIT_NULL_POINTER;
  if (!aligned(qkv, 16) || !aligned(out, 16) || !aligned(lse, 4)) return FASTDEIT_MISALIGNED;
  switch (head_dim) {
#define FASTDEIT_CASE(D)                                                                                              \
  case D:                                                                                                             \
    return launch(Kernel::forward, fastdeit_attention_forward_##D, sizes, stream, static_cast<const Half *>(qkv),     \
                  static_cast<Half *>(out), lse, tokens, heads, scale);
    FASTDEIT_HEAD_DIMS(FASTDEIT_CASE)
#undef FASTDEIT_CASE
  }
  return FASTDEIT_UNSUPPORTED_HEAD_DIM;
}

int fastdeit_attention_backward(const void *grad, const void *qkv, const void *out, const float *lse, void *dqkv,
                                float *dbias, float *delta, float *partial, int64_t batch, int64_t tokens,
                                int64_t heads, int64_t head_dim, float scale, int dtype, void *stream) {
  const Sizes sizes{batch, tokens, heads, head_dim};
  if (const fastdeit_status status = check(dtype, sizes)) return status;
  if (grad == nullptr || qkv == nullptr || out == nullptr || lse == nullptr || dqkv == nullptr || delta == nullptr ||
      (dbias == nullptr) != (partial == nullptr))
    return FASTDEIT_NULL_POINTER;
  if (!aligned(grad, 16) || !aligned(qkv, 16) || !aligned(out, 16) || !aligned(dqkv, 16) || !aligned(lse, 4) ||
      !aligned(dbias, 4) || !aligned(delta, 4) || !aligned(partial, 4))
    return FASTDEIT_MISALIGNED;
  const auto *g = static_cast<const Half *>(grad), *x = static_cast<const Half *>(qkv), *y = static_cast<const Half *>(out);
  auto *dx = static_cast<Half *>(dqkv);
  fastdeit_status status = FASTDEIT_UNSUPPORTED_HEAD_DIM;
  switch (head_dim) {
#define FASTDEIT_CASE(D)                                                                                              \
  case D:                                                                                                             \
    status = launch(Kernel::query_gradient, fastdeit_attention_query_gradient_##D, sizes, stream, x, y, g, lse,       \
                    delta, dx, partial, tokens, heads, scale);                                                        \
    if (status == FASTDEIT_OK)                                                                                        \
      status = launch(Kernel::key_gradient, fastdeit_attention_key_gradient_##D, sizes, stream, x, g, lse, delta, dx, \
                      partial, tokens, heads, scale);                                                                 \
    break;
    FASTDEIT_HEAD_DIMS(FASTDEIT_CASE)
#undef FASTDEIT_CASE
  }
  if (status != FASTDEIT_OK || dbias == nullptr) return status;
  const int64_t rows = batch * ((tokens + fastdeit::kRows - 1) / fastdeit::kRows);
  return launch(Kernel::bias_gradient, fastdeit_attention_bias_gradient, sizes, stream, partial, dbias, rows,
                3 * heads * head_dim);
}

}  // extern "C"
