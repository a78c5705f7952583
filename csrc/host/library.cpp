// The library medcl_emulated: impl="cuda" without a device. The operations of cuda/registration.cpp, its glue to torch
// and the kernels, all as they are, on CPU tensors over the emulator, under torch's key for the CPU. For tests; in no
// wheel.
#include "library.h"

#include <utility>

#include "cuda/device.h"
#include "cuda/torch_stream.h"
#include "host/emulator/emulator.h"

// What libtorch_cuda has: the current stream. Every launch must be on it.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  static int current;
  emulator::config().stream = *stream = &current;
  return 0;
}

namespace medcl {
namespace cuda {
namespace {
bool wgmma_used = false;
}
std::string use_device(int) { return ""; }
bool wgmma() { return wgmma_used; }
bool use_wgmma(bool use) { return std::exchange(wgmma_used, use); }
}  // namespace cuda

std::string configure(std::string, std::string) { return ";"; }  // there are no CPU kernels here
bool use_wgmma(bool use) { return cuda::use_wgmma(use); }
std::string build_info() { return "cuda_archs=emulator;torch_cuda_stream=yes"; }

}  // namespace medcl
