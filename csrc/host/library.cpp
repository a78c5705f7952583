// The library medcl_emulated: impl="cuda" without a device. The operations of cuda/registration.cpp, its glue to torch
// and the kernels, all as they are, on CPU tensors over the emulator, under torch's key for the CPU. For tests; in no
// wheel.
#include <torch/csrc/stable/library.h>

#include <string>
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

namespace {
// There are no CPU kernels here to be configured.
std::string configure(std::string, std::string) { return ";"; }
std::string build_info() { return "cuda_archs=emulator;torch_cuda_stream=yes"; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(medcl, m) {
  m.def("configure(str capability, str gemm) -> str");
  m.def("use_wgmma(bool use) -> bool");
  m.def("build_info() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(medcl, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("use_wgmma", TORCH_BOX(&cuda::use_wgmma));
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace medcl
