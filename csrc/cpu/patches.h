// The CPU operations of patch-affinity contrast.
#pragma once
#include <tuple>

#include "cpu/problem.h"

namespace medcl {

std::tuple<Tensor, Tensor> pair_affinity_cpu(const Tensor& query, const OptionalTensor& key, const Tensor& query_ratios,
                                             const OptionalTensor& key_ratios, const OptionalTensor& shift,
                                             std::string form, double temperature, bool normalize);
std::tuple<Tensor, Tensor, Tensor> pair_affinity_backward_cpu(
    const Tensor& d_log_z, const Tensor& d_linear, const Tensor& log_z, const Tensor& query, const OptionalTensor& key,
    const Tensor& query_ratios, const OptionalTensor& key_ratios, const OptionalTensor& shift, std::string form,
    double temperature, bool normalize, bool need_query, bool need_key, bool need_shift);
Tensor patch_class_ratio_cpu(const Tensor& labels, const Tensor& centers, std::vector<int64_t> windows,
                             int64_t num_classes, bool full, bool double_precision);
Tensor uncertainty_reweight_cpu(const Tensor& features, const Tensor& logits);
std::tuple<Tensor, Tensor> uncertainty_reweight_backward_cpu(const Tensor& d_out, const Tensor& features,
                                                             const Tensor& logits, bool need_features,
                                                             bool need_logits);

}  // namespace medcl
