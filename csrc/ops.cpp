// Registers the kernels with torch's dispatcher through the stable ABI. The schemas are declared in medcl_kernels/ops,
// beside their fake kernels and gradients, so that they exist without this library. CUDA: cuda/registration.cpp.
#include "cpu/pairs.h"
#include "cpu/patches.h"
#include "library.h"
#ifdef MEDCL_WITH_CUDA
#include "cuda/device.h"
#include "cuda/torch_stream.h"
#endif

namespace medcl {

std::string configure(std::string capability_name, std::string gemm) {
  const std::string cpu = set_capability(capability_name.c_str());
  return cpu + ";" + set_gemm(gemm.c_str());
}

// A library without CUDA kernels has no wgmma ones to use.
bool use_wgmma([[maybe_unused]] bool use) {
#ifdef MEDCL_WITH_CUDA
  return cuda::use_wgmma(use);
#else
  return false;
#endif
}

std::string build_info() {
  std::string s = "target_torch=";
  s += std::to_string((TORCH_FEATURE_VERSION >> 56) & 255) + "." + std::to_string((TORCH_FEATURE_VERSION >> 48) & 255);
  s += ";built_with_torch=" + std::string(TORCH_VERSION);
  s += ";compiler=" + std::string(__VERSION__);
  s += ";cpu=" + std::string(capability()) + ";gemm=" + gemm_name();
#ifdef MEDCL_WITH_CUDA
  s += ";cuda_archs=" MEDCL_CUDA_ARCHS ";cudart=" + std::to_string(cuda::runtime_version());
  s += ";cuda_devices=" + std::to_string(cuda::device_count());
  s += ";torch_cuda_stream=" + std::string(torch_has_cuda() ? "yes" : "no");
  s += ";cuda_wgmma=" + std::string(cuda::wgmma() ? "on" : "off");
#else
  s += ";cuda_archs=none";
#endif
  return s;
}

STABLE_TORCH_LIBRARY_IMPL(medcl, CPU, m) {
  m.impl("pair_logsumexp", TORCH_BOX(&pair_logsumexp_cpu));
  m.impl("pair_logsumexp_backward", TORCH_BOX(&pair_logsumexp_backward_cpu));
  m.impl("info_nce_sum", TORCH_BOX(&info_nce_sum_cpu));
  m.impl("supervised_sum", TORCH_BOX(&supervised_sum_cpu));
  m.impl("scale_gradients", TORCH_BOX(&scale_gradients_cpu));
  m.impl("pair_positive_log", TORCH_BOX(&pair_positive_log_cpu));
  m.impl("pair_positive_log_backward", TORCH_BOX(&pair_positive_log_backward_cpu));
  m.impl("pair_argmax", TORCH_BOX(&pair_argmax_cpu));
  m.impl("positive_mean", TORCH_BOX(&positive_mean_cpu));
  m.impl("positive_mean_backward", TORCH_BOX(&positive_mean_backward_cpu));
  m.impl("positive_at", TORCH_BOX(&positive_at_cpu));
  m.impl("positive_at_backward", TORCH_BOX(&positive_at_backward_cpu));
  m.impl("pair_topk", TORCH_BOX(&pair_topk_cpu));
  m.impl("pair_filtered_grad", TORCH_BOX(&pair_filtered_grad_cpu));
  m.impl("pair_filtered_grad_backward", TORCH_BOX(&pair_filtered_grad_backward_cpu));
  m.impl("pair_at", TORCH_BOX(&pair_at_cpu));
  m.impl("pair_at_backward", TORCH_BOX(&pair_at_backward_cpu));
  m.impl("mitigate_rows", TORCH_BOX(&mitigate_rows_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(medcl, CPU, m) {  // patch-affinity contrast
  m.impl("pair_affinity", TORCH_BOX(&pair_affinity_cpu));
  m.impl("pair_affinity_backward", TORCH_BOX(&pair_affinity_backward_cpu));
  m.impl("patch_class_ratio", TORCH_BOX(&patch_class_ratio_cpu));
  m.impl("uncertainty_reweight", TORCH_BOX(&uncertainty_reweight_cpu));
  m.impl("uncertainty_reweight_backward", TORCH_BOX(&uncertainty_reweight_backward_cpu));
}

}  // namespace medcl
