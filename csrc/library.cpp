#include "library.h"

#include <torch/csrc/stable/library.h>

namespace medcl {

STABLE_TORCH_LIBRARY_FRAGMENT(medcl, m) {
  m.def("configure(str capability, str gemm) -> str");
  m.def("use_wgmma(bool use) -> bool");
  m.def("build_info() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(medcl, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("use_wgmma", TORCH_BOX(&use_wgmma));
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace medcl
