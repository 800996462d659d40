// The functions of CUDA's runtime that `kernels/api.cu` calls. A kernel runs at once, and to its end.
#pragma once

#include <utility>

#include "simt.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct Stream *cudaStream_t;

namespace simt {

// The dynamic shared memory that a kernel may have without asking, and that it may ask for on sm_70.
constexpr size_t granted_bytes = 48 * 1024, most_bytes = 96 * 1024;

// What a kernel has asked for.
size_t &asked_bytes(const void *kernel);

template <typename... P, size_t... I>
void call(void (*kernel)(P...), void **arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P *>(arguments[I])...);
}

}  // namespace simt

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  if (static_cast<size_t>(value) > simt::most_bytes) return cudaErrorLaunchFailure;
  simt::asked_bytes(reinterpret_cast<const void *>(kernel)) = value;
  return cudaSuccess;
}

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                             cudaStream_t) {
  const size_t asked = simt::asked_bytes(reinterpret_cast<const void *>(kernel));
  if (shared_bytes > (asked > simt::granted_bytes ? asked : simt::granted_bytes)) return cudaErrorLaunchFailure;
  struct Launch {
    void (*kernel)(P...);
    void **arguments;
  } launch{kernel, arguments};
  const auto body = [](void *given) {
    auto &own = *static_cast<Launch *>(given);
    simt::call(own.kernel, own.arguments, std::index_sequence_for<P...>());
  };
  return simt::run(grid.x, block.x, shared_bytes, body, &launch) ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
