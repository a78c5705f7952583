// Registers the kernels with torch's dispatcher through the stable ABI. The schemas are declared in medcl_kernels/ops,
// beside their fake kernels and gradients, so that they exist without this library.
#include <torch/csrc/stable/accelerator.h>

#include "cpu/pairs.h"
#include "cpu/patches.h"
#ifdef MEDCL_WITH_CUDA
#include "cuda/launch.h"
#include "cuda/torch_stream.h"
#endif

namespace medcl {
namespace {

std::string configure(std::string capability_name, std::string gemm) {
  const std::string cpu = set_capability(capability_name.c_str());
  return cpu + ";" + set_gemm(gemm.c_str());
}

std::string build_info() {
  std::string s = "target_torch=";
  s += std::to_string((TORCH_FEATURE_VERSION >> 56) & 255) + "." + std::to_string((TORCH_FEATURE_VERSION >> 48) & 255);
  s += ";built_with_torch=" + std::string(TORCH_VERSION);
  s += ";compiler=" + std::string(__VERSION__);
  s += ";cpu=" + std::string(capability()) + ";gemm=" + gemm_name();
#ifdef MEDCL_WITH_CUDA
  s += ";cuda_archs=" MEDCL_CUDA_ARCHS ";cudart=" + std::to_string(cuda_runtime_version());
  s += ";cuda_devices=" + std::to_string(cuda_device_count());
  s += ";torch_cuda_stream=" + std::string(torch_has_cuda() ? "yes" : "no");
#else
  s += ";cuda_archs=none";
#endif
  return s;
}

#ifdef MEDCL_WITH_CUDA
CudaType cuda_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return CudaType::f32;
    case ScalarType::Half:
      return CudaType::f16;
    case ScalarType::BFloat16:
      return CudaType::bf16;
    default:
      STD_TORCH_CHECK(false, "medcl: CUDA kernels take float32, float16 or bfloat16 features");
  }
  return CudaType::f32;
}

CudaRows cuda_rows(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.size(2)}; }

std::tuple<Tensor, Tensor> pair_argmax_gpu(const Tensor& query, const Tensor& key, bool normalize) {
  STD_TORCH_CHECK(torch_has_cuda(), "medcl: this torch has no CUDA support");
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && query.size(0) == key.size(0) && query.size(1) == key.size(1),
                  "medcl: rows must come as (B, D, L) with the same B and D");
  STD_TORCH_CHECK(query.scalar_type() == key.scalar_type(), "medcl: query and key need one dtype on CUDA");
  const int device = query.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto empty = [&](const Tensor& like, ScalarType t) {
    return torch::stable::new_empty(like, std::vector<int64_t>{like.size(0), like.size(2)}, t);
  };
  Tensor index = empty(query, ScalarType::Long), value = empty(query, ScalarType::Float);
  Tensor query_inverse = empty(query, ScalarType::Float), key_inverse = empty(key, ScalarType::Float);
  const int error = pair_argmax_cuda(
      cuda_rows(query), cuda_rows(key), cuda_type(query), query.size(0), query.size(1), normalize,
      static_cast<float*>(query_inverse.mutable_data_ptr()), static_cast<float*>(key_inverse.mutable_data_ptr()),
      static_cast<int64_t*>(index.mutable_data_ptr()), static_cast<float*>(value.mutable_data_ptr()), device, stream);
  STD_TORCH_CHECK(error == 0, "medcl::pair_argmax on (", query.size(0), ", ", query.size(1), ", ", query.size(2),
                  "): ", cuda_error_string(error));
  return {index, value};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(medcl, m) {
  m.def("configure(str capability, str gemm) -> str");
  m.def("build_info() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(medcl, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("build_info", TORCH_BOX(&build_info));
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
}
STABLE_TORCH_LIBRARY_IMPL(medcl, CPU, m) {  // patch-affinity contrast
  m.impl("pair_affinity", TORCH_BOX(&pair_affinity_cpu));
  m.impl("pair_affinity_backward", TORCH_BOX(&pair_affinity_backward_cpu));
  m.impl("patch_class_ratio", TORCH_BOX(&patch_class_ratio_cpu));
  m.impl("uncertainty_reweight", TORCH_BOX(&uncertainty_reweight_cpu));
  m.impl("uncertainty_reweight_backward", TORCH_BOX(&uncertainty_reweight_backward_cpu));
}
#ifdef MEDCL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(medcl, CUDA, m) { m.impl("pair_argmax", TORCH_BOX(&pair_argmax_gpu)); }
#endif

}  // namespace medcl
