// torch's current CUDA stream without linking libtorch_cuda: the symbol is weak, so it stays null under a CPU build of
// torch and is bound where libtorch.so brings libtorch_cuda.so along.
#pragma once
#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace medcl {
inline bool torch_has_cuda() { return &aoti_torch_get_current_cuda_stream != nullptr; }
}  // namespace medcl
