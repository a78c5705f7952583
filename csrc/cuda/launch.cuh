// One spelling of a launch for nvcc and for the emulator. A launch that fails throws: nothing after it may run.
#pragma once
#include <string>

#include "cuda/operations.h"
#include "cuda/ptx.cuh"

namespace medcl::cuda {

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, void* stream, A... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::length_error("more than 2^31 thread blocks");
#ifdef __CUDACC__
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  };
  if (shared_bytes > 48 * 1024) {
    int device = 0, most = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (shared_bytes > static_cast<size_t>(most))
      throw std::runtime_error("a block needs " + std::to_string(shared_bytes) +
                               " bytes of shared memory, this device has " + std::to_string(most));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
#else
  if (stream != emulator::config().stream) throw std::logic_error("a launch on another stream than the call's");
  emulator::launch(dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, [=] { kernel(arguments...); });
#endif
}

// One thread per element.
template <class... P, class... A>
void launch_each(void (*kernel)(P...), int64_t elements, void* stream, A... arguments) {
  constexpr int threads = 256;
  launch(kernel, (elements + threads - 1) / threads, threads, 0, stream, arguments...);
}

}  // namespace medcl::cuda
