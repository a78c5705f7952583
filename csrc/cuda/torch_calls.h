// What the CUDA operations need of torch: tensors to pointers, the current stream, memory from torch's allocator.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>

#include "cuda/device.h"
#include "cuda/operations.h"
#include "cuda/torch_stream.h"

namespace medcl::torch_calls {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Tensors that live as long as the call: the caching allocator hands their memory on in stream order.
class TorchWorkspace : public cuda::Workspace {
 public:
  explicit TorchWorkspace(const Tensor& like) : like_(like) {}
  void* allocate(size_t bytes) override {
    const std::vector<int64_t> size{static_cast<int64_t>(bytes)};
    return held_.emplace_back(torch::stable::new_empty(like_, size, ScalarType::Byte)).mutable_data_ptr();
  }
  void sort(const int64_t* keys, int64_t lists, int64_t n, const int64_t** sorted, const int64_t** order) override {
    const Tensor view =
        torch::stable::from_blob(const_cast<int64_t*>(keys), {lists, n}, {n, 1}, like_.device(), ScalarType::Long);
    std::array<StableIValue, 4> stack{torch::stable::detail::from(view),
                                      torch::stable::detail::from(std::optional<bool>(true)),
                                      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    held_.push_back(torch::stable::detail::to<Tensor>(stack[0]));
    *sorted = static_cast<const int64_t*>(held_.back().const_data_ptr());
    held_.push_back(torch::stable::detail::to<Tensor>(stack[1]));
    *order = static_cast<const int64_t*>(held_.back().const_data_ptr());
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> held_;
};

inline std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

// Runs f(workspace) on the tensor's device and torch's current stream of it.
template <class F>
void on_device(const char* operation, const Tensor& x, F&& f) {
  STD_TORCH_CHECK(torch_has_cuda(), "medcl::", operation, ": this torch has no CUDA support");
  const int device = x.get_device_index();
  const DeviceGuard guard(device);
  const std::string reason = cuda::use_device(device);
  STD_TORCH_CHECK(reason.empty(), "medcl::", operation, " on rows ", shape_of(x), ": ", reason);
  TorchWorkspace w(x);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &w.stream));
  try {
    f(w);
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, "medcl::", operation, " on rows ", shape_of(x), ": ", error.what());
  }
}

inline cuda::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return cuda::Type::f32;
    case ScalarType::Half:
      return cuda::Type::f16;
    case ScalarType::BFloat16:
      return cuda::Type::bf16;
    default:
      STD_TORCH_CHECK(false, "medcl: CUDA kernels take float32, float16 or bfloat16 features");
  }
  return cuda::Type::f32;
}

inline cuda::Rows rows(const Tensor& x, void* data) {
  STD_TORCH_CHECK(x.dim() == 3, "medcl: rows must come as (B, D, L), got ", x.dim(), " dimensions");
  return {data, type_of(x), x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1), x.stride(2)};
}
inline cuda::Rows rows(const Tensor& x) { return rows(x, const_cast<void*>(x.const_data_ptr())); }  // only read

// 16-bit rows are multiplied as they are; float32 follows torch.get_float32_matmul_precision(), which only Python
// knows: medcl_kernels/ops/registration.py answers.
inline cuda::Product product_of(const Tensor& x) {
  const cuda::Type type = type_of(x);
  if (type != cuda::Type::f32) return type == cuda::Type::bf16 ? cuda::Product::bf16 : cuda::Product::fp16;
  std::array<StableIValue, 1> stack{};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("medcl::float32_matmul_precision", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<std::string>(stack[0]) == "highest" ? cuda::Product::ieee : cuda::Product::tf32;
}

inline cuda::Sides sides(const Tensor& query, const OptionalTensor& key, bool across) {
  cuda::Sides s;
  s.query = rows(query);
  if (!key.has_value()) return s;
  STD_TORCH_CHECK(key->numel() > 0, "medcl: key is empty");  // without memory it would be taken for none
  s.key = rows(*key);
  STD_TORCH_CHECK(s.key.type == s.query.type, "medcl: query and key need one dtype on CUDA");
  STD_TORCH_CHECK(s.key.dim == s.query.dim, "medcl: query and key need the same number of channels");
  STD_TORCH_CHECK(across || s.key.batch == s.query.batch, "medcl: query and key need the same batch size");
  STD_TORCH_CHECK(key->get_device_index() == query.get_device_index(), "medcl: query and key are on different devices");
  return s;
}

template <class T>
const T* contiguous(const Tensor& x, int64_t n, const char* what) {
  constexpr ScalarType type = sizeof(T) == 8 ? ScalarType::Long : ScalarType::Float;
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == n, "medcl: ", what,
                  " must be contiguous, ", n, " values of ", sizeof(T) == 8 ? "int64" : "float32");
  return static_cast<const T*>(x.const_data_ptr());
}

inline cuda::Options options(const Tensor& query, int64_t ignore_index, double temperature, bool normalize,
                             bool across) {
  STD_TORCH_CHECK(temperature > 0, "medcl: temperature must be positive");
  cuda::Options o;
  o.product = product_of(query);
  o.ignore_index = ignore_index;
  o.temperature = static_cast<float>(temperature);
  o.normalize = normalize;
  o.across = across;
  o.wgmma = cuda::wgmma();
  return o;
}

inline void add_labels(cuda::Sides& s, const cuda::Options& o, const OptionalTensor& query_labels,
                       const OptionalTensor& key_labels) {
  const auto data = [&](const OptionalTensor& labels, const cuda::Rows& of) -> const int64_t* {
    if (!labels.has_value()) return nullptr;
    return contiguous<int64_t>(*labels, o.selections * of.batch * of.length, "labels (selections, B, L)");
  };
  s.query_labels = data(query_labels, s.query);
  s.key_labels = data(key_labels, s.key);
}

inline void parse_kinds(const std::string& text, cuda::Options& o) {
  o.selections = 0;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, end - at);
    STD_TORCH_CHECK(word == "all" || word == "same" || word == "different",
                    "medcl: kinds are all, same or different, got '", word, "'");
    STD_TORCH_CHECK(o.selections < cuda::kMaxSelections, "medcl: at most ", cuda::kMaxSelections, " kinds at once");
    o.kinds[o.selections++] = word == "all" ? cuda::kAll : word == "same" ? cuda::kSame : cuda::kDifferent;
    at = end + 1;
  }
}

inline void same_kinds(const Tensor& labels, cuda::Options& o) {
  const int64_t selections = labels.size(0);
  STD_TORCH_CHECK(selections <= cuda::kMaxSelections, "medcl: at most ", cuda::kMaxSelections, " label maps at once");
  o.selections = static_cast<int>(selections);
  std::fill_n(o.kinds, selections, cuda::kSame);
}

inline Tensor per_row(const Tensor& query, int selections, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(query, std::vector<int64_t>{selections, query.size(0), query.size(2)}, type);
}
inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
inline int64_t* integers(const Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); }

// The gradients that are asked for, in the layout of their tensors; the others are empty.
struct Gradients {
  Tensor query, key;
  cuda::Rows query_rows, key_rows;
  Gradients(const Tensor& q, const OptionalTensor& k, bool need_query, bool need_key)
      : query(make(q, need_query)), key(make(k.has_value() ? *k : q, need_key && k.has_value())) {
    if (need_query) query_rows = rows(query, query.mutable_data_ptr());
    if (need_key && k.has_value()) key_rows = rows(key, key.mutable_data_ptr());
  }
  static Tensor make(const Tensor& x, bool needed) {
    return needed ? torch::stable::empty_like(x) : torch::stable::new_empty(x, std::vector<int64_t>{0});
  }
  std::tuple<Tensor, Tensor> tensors() const { return {query, key}; }
};

}  // namespace medcl::torch_calls
