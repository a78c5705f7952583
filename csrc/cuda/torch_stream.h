// torch's current CUDA stream without linking libtorch_cuda: the symbol is weak, so it stays null under a CPU build of
// torch and is bound where libtorch.so brings libtorch_cuda.so along. Over the host emulator (csrc/host/library.cpp,
// which has the symbol itself) tensors are the CPU's, and there is no device to make the current one.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace medcl {
inline bool torch_has_cuda() { return &aoti_torch_get_current_cuda_stream != nullptr; }
#ifdef MEDCL_EMULATED
#define MEDCL_CUDA_KEY CPU
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
#define MEDCL_CUDA_KEY CUDA
using torch::stable::accelerator::DeviceGuard;
#endif
}  // namespace medcl
