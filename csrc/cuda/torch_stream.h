// torch's current CUDA stream without linking libtorch_cuda: the symbol is weak, so it stays null under a CPU build of
// torch and is bound where libtorch.so brings libtorch_cuda.so along. MEDCL_EMULATED: the library of
// csrc/host/library.cpp, which defines the symbol; its operations serve the CPU's tensors, and there is no device to be
// made the current one.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

#ifdef MEDCL_EMULATED
#define MEDCL_CUDA_KEY CPU
#else
#define MEDCL_CUDA_KEY CUDA
#endif

namespace medcl {
inline bool torch_has_cuda() { return &aoti_torch_get_current_cuda_stream != nullptr; }
#ifdef MEDCL_EMULATED
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
using torch::stable::accelerator::DeviceGuard;
#endif
}  // namespace medcl
