// The CUDA operations of patch-affinity contrast and the uncertainty gate for torch's dispatcher.
#include "cuda/torch_calls.h"

namespace medcl {
namespace {

using namespace torch_calls;

void same_device(const Tensor& a, const Tensor& b, const char* what) {
  STD_TORCH_CHECK(a.get_device_index() == b.get_device_index(), "medcl: ", what, " are on different devices");
}

cuda::Patches patches_of(const Tensor& query, const OptionalTensor& key, const Tensor& query_ratios,
                         const OptionalTensor& key_ratios, const OptionalTensor& shift, const std::string& form) {
  STD_TORCH_CHECK(form == "affinity" || form == "release2d", "medcl: form must be affinity or release2d, got ", form);
  STD_TORCH_CHECK(key.has_value() == key_ratios.has_value(), "medcl: a key and its ratios come together");
  cuda::Patches p;
  p.swapped = form == "release2d";
  const auto shares = [&](const Tensor& r, const Tensor& rows) {
    STD_TORCH_CHECK(r.dim() == 4 && r.size(1) == rows.size(0) && r.size(3) == rows.size(2) && r.size(0) > 0 &&
                        r.size(2) > 0 && r.size(0) == query_ratios.size(0) && r.size(2) == query_ratios.size(2),
                    "medcl: ratios must be (P, B, K, N)");
    same_device(query, r, "features and ratios");
    return contiguous<float>(r, r.numel(), "ratios");
  };
  p.query_ratios = shares(query_ratios, query);
  if (key.has_value()) p.key_ratios = shares(*key_ratios, *key);
  p.count = query_ratios.size(0);
  p.classes = query_ratios.size(2);
  if (shift.has_value()) {
    same_device(query, *shift, "features and shift");
    p.shift = contiguous<float>(*shift, 1, "shift");
  }
  return p;
}

std::tuple<Tensor, Tensor> pair_affinity(const Tensor& query, const OptionalTensor& key, const Tensor& query_ratios,
                                         const OptionalTensor& key_ratios, const OptionalTensor& shift,
                                         std::string form, double temperature, bool normalize) {
  const cuda::Sides s = sides(query, key, false);
  const cuda::Options o = options(query, -1, temperature, normalize, false);
  const cuda::Patches patches = patches_of(query, key, query_ratios, key_ratios, shift, form);
  Tensor log_z, linear;
  on_device("pair_affinity", query, [&](cuda::Workspace& w) {
    log_z = per_row(query, static_cast<int>(patches.count));
    linear = per_row(query, static_cast<int>(patches.count));
    cuda::pair_affinity(w, s, o, patches, floats(log_z), floats(linear));
  });
  return {log_z, linear};
}

std::tuple<Tensor, Tensor, Tensor> pair_affinity_backward(const Tensor& d_log_z, const Tensor& d_linear,
                                                          const Tensor& log_z, const Tensor& query,
                                                          const OptionalTensor& key, const Tensor& query_ratios,
                                                          const OptionalTensor& key_ratios, const OptionalTensor& shift,
                                                          std::string form, double temperature, bool normalize,
                                                          bool need_query, bool need_key, bool need_shift) {
  const cuda::Sides s = sides(query, key, false);
  const cuda::Options o = options(query, -1, temperature, normalize, false);
  const cuda::Patches patches = patches_of(query, key, query_ratios, key_ratios, shift, form);
  const int64_t n = patches.count * s.query.batch * s.query.length;
  const float *g = contiguous<float>(d_log_z, n, "d_log_z"), *h = contiguous<float>(d_linear, n, "d_linear");
  const float* level = contiguous<float>(log_z, n, "log_z");
  std::optional<Gradients> out;
  Tensor d_shift;
  on_device("pair_affinity_backward", query, [&](cuda::Workspace& w) {
    out.emplace(query, key, need_query, need_key);
    d_shift = torch::stable::new_empty(query, std::vector<int64_t>{}, ScalarType::Float);
    cuda::pair_affinity_backward(w, s, o, patches, g, h, level, out->query_rows, out->key_rows,
                                 need_shift ? floats(d_shift) : nullptr);
  });
  return {out->query, out->key, d_shift};
}

cuda::LabelMap label_map(const Tensor& y) {
  cuda::LabelMap map;
  switch (y.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Bool:
      map.type = cuda::LabelType::u8;
      break;
    case ScalarType::Char:
      map.type = cuda::LabelType::i8;
      break;
    case ScalarType::Short:
      map.type = cuda::LabelType::i16;
      break;
    case ScalarType::Int:
      map.type = cuda::LabelType::i32;
      break;
    case ScalarType::Long:
      map.type = cuda::LabelType::i64;
      break;
    default:
      STD_TORCH_CHECK(false, "medcl: labels must be integers");
  }
  const int64_t dims = y.dim() - 1;
  STD_TORCH_CHECK(dims == 2 || dims == 3, "medcl: labels must be (B, H, W) or (B, D, H, W)");
  map.data = y.const_data_ptr();
  map.batch = y.size(0);
  map.stride_b = y.stride(0);
  int64_t cells = 1;
  for (int64_t axis = 0; axis < 3; ++axis) {
    const int64_t own = axis + dims - 2;  // of the tensor
    map.size[axis] = own < 1 ? 1 : y.size(own);
    map.stride[axis] = own < 1 ? 0 : y.stride(own);
    cells *= map.size[axis];
  }
  STD_TORCH_CHECK(cells < int64_t{1} << 31, "medcl: an image of labels must have fewer than 2^31 cells");
  return map;
}

Tensor patch_class_ratio(const Tensor& labels, const Tensor& centers, std::vector<int64_t> windows, int64_t num_classes,
                         bool full, bool double_precision) {
  const cuda::LabelMap map = label_map(labels);
  const int64_t dims = labels.dim() - 1, per = 2 * dims, count = centers.size(0);
  STD_TORCH_CHECK(centers.dim() == 2 && centers.size(1) == dims, "medcl: centers must be (N, dims)");
  const auto* center = contiguous<int64_t>(centers, count * dims, "centers");
  same_device(labels, centers, "labels and centers");
  STD_TORCH_CHECK(!windows.empty() && static_cast<int64_t>(windows.size()) % per == 0 && num_classes >= 2,
                  "medcl: windows must be (P, dims, 2) bounds and num_classes at least 2");
  for (size_t i = 0; i < windows.size(); i += 2)
    STD_TORCH_CHECK(windows[i] < windows[i + 1], "medcl: a window is empty");
  const int64_t patches = static_cast<int64_t>(windows.size()) / per;
  Tensor out;
  on_device("patch_class_ratio", labels, [&](cuda::Workspace& w) {
    out = torch::stable::new_empty(labels, std::vector<int64_t>{patches, map.batch, num_classes - 1, count},
                                   double_precision ? ScalarType::Double : ScalarType::Float);
    cuda::patch_class_ratio(w, map, center, count, static_cast<int>(dims), windows.data(), patches,
                            static_cast<int>(num_classes), full, double_precision, out.mutable_data_ptr());
  });
  return out;
}

void check_gate(const Tensor& x, const Tensor& z) {
  STD_TORCH_CHECK(x.dim() == 3 && z.dim() == 3 && x.size(0) == z.size(0) && x.size(2) == z.size(2) && z.size(1) >= 2,
                  "medcl: features (B, C, L) need logits (B, M, L) with M >= 2");
  STD_TORCH_CHECK(x.scalar_type() == z.scalar_type(), "medcl: features and logits need one dtype");
  same_device(x, z, "features and logits");
}

Tensor uncertainty_reweight(const Tensor& features, const Tensor& logits) {
  check_gate(features, logits);
  Tensor out;
  on_device("uncertainty_reweight", features, [&](cuda::Workspace& w) {
    out = torch::stable::empty_like(features);
    cuda::uncertainty_reweight(w, rows(features), rows(logits), rows(out, out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor> uncertainty_reweight_backward(const Tensor& d_out, const Tensor& features,
                                                         const Tensor& logits, bool need_features, bool need_logits) {
  check_gate(features, logits);
  STD_TORCH_CHECK(d_out.scalar_type() == features.scalar_type() && d_out.dim() == 3 &&
                      d_out.size(0) == features.size(0) && d_out.size(1) == features.size(1) &&
                      d_out.size(2) == features.size(2),
                  "medcl: the upstream gradient must be like the features");
  same_device(features, d_out, "features and their upstream gradient");
  std::optional<Gradients> out;
  on_device("uncertainty_reweight_backward", features, [&](cuda::Workspace& w) {
    out.emplace(features, logits, need_features, need_logits);
    cuda::uncertainty_reweight_backward(w, rows(d_out), rows(features), rows(logits), out->query_rows, out->key_rows);
  });
  return out->tensors();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medcl, MEDCL_CUDA_KEY, m) {
  m.impl("pair_affinity", TORCH_BOX(&pair_affinity));
  m.impl("pair_affinity_backward", TORCH_BOX(&pair_affinity_backward));
  m.impl("patch_class_ratio", TORCH_BOX(&patch_class_ratio));
  m.impl("uncertainty_reweight", TORCH_BOX(&uncertainty_reweight));
  m.impl("uncertainty_reweight_backward", TORCH_BOX(&uncertainty_reweight_backward));
}

}  // namespace medcl
