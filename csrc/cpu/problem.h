// From tensors (B, D, L) to pair problems: which rows take part, where they lie, their norms and label codes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <unordered_map>

#include "cpu/engine.h"

namespace medcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "medcl: features must be float64, float32, float16 or bfloat16");
  }
  return DType::f32;
}

inline std::vector<Kind> parse_kinds(const std::string& text) {
  std::vector<Kind> kinds;
  size_t at = 0;
  while (at <= text.size()) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, end - at);
    STD_TORCH_CHECK(word == "all" || word == "same" || word == "different",
                    "medcl: kinds are all, same or different, got '", word, "'");
    kinds.push_back(word == "all" ? Kind::all : word == "same" ? Kind::same : Kind::different);
    at = end + 1;
  }
  return kinds;
}

inline std::string same_kinds(int64_t selections) {
  std::string text = "same";
  for (int64_t k = 1; k < selections; ++k) text += ",same";
  return text;
}

// Equality of labels is all that matters: codes count from 0 in order of appearance, separately per selection.
class LabelCodes {
 public:
  int32_t operator()(int64_t label) {
    if (label == last_label_ && last_code_ >= 0) return last_code_;  // labels come in runs
    const auto found = codes_.emplace(label, static_cast<int32_t>(codes_.size()));
    last_label_ = label;
    return last_code_ = found.first->second;
  }
  int64_t size() const { return static_cast<int64_t>(codes_.size()); }

 private:
  std::unordered_map<int64_t, int32_t> codes_;
  int64_t last_label_ = 0;
  int32_t last_code_ = -1;
};

// All groups of one tensor: rows of group g are [begin[g], begin[g + 1]) of the packed lists.
template <class T>
struct Table {
  std::vector<int64_t> offset, slot, begin;
  std::vector<int32_t> code;  // (selections, rows)
  Buffer<double> inverse;
  bool normalize = false, partial = false;  // partial: some rows are left out
  Rows rows;
  int64_t length = 0;

  // labels: (selections, B, L) int64 or null. A row takes part when any selection knows it. codes null: labels only
  // say which rows those are.
  Table(const Tensor& x, const Tensor* labels, int64_t ignore, std::vector<LabelCodes>* codes, bool across,
        bool normalize_)
      : normalize(normalize_) {
    STD_TORCH_CHECK(x.dim() == 3, "medcl: rows must come as (B, D, L), got ", x.dim(), " dimensions");
    const int64_t B = x.size(0), L = x.size(2);
    const int64_t stride_b = x.stride(0), stride_l = x.stride(2);
    rows.data = x.const_data_ptr();
    rows.dtype = dtype_of(x);
    rows.stride_d = x.stride(1);
    rows.dim = x.size(1);
    length = L;
    const int64_t S = labels ? labels->size(0) : 0;
    const int64_t* y = labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr;
    if (labels)
      STD_TORCH_CHECK(labels->dim() == 3 && labels->size(1) == B && labels->size(2) == L &&
                          labels->scalar_type() == ScalarType::Long && labels->is_contiguous(),
                      "medcl: labels must be contiguous int64 (selections, B, L)");
    offset.reserve(B * L);
    slot.reserve(B * L);
    begin.push_back(0);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t l = 0; l < L; ++l) {
        bool take = S == 0;
        for (int64_t k = 0; k < S && !take; ++k) take = y[(k * B + b) * L + l] != ignore;
        if (!take) continue;
        offset.push_back(b * stride_b + l * stride_l);
        slot.push_back(b * L + l);
      }
      if (!across || b + 1 == B) begin.push_back(static_cast<int64_t>(slot.size()));
    }
    const int64_t n = count();
    partial = n < B * L;
    if (codes) code.resize(S * n);
    for (int64_t k = 0; codes && k < S; ++k)
      for (int64_t r = 0; r < n; ++r) {
        const int64_t label = y[k * B * L + slot[r]];
        code[k * n + r] = label == ignore ? -1 : (*codes)[k](label);
      }
    if (normalize) {
      inverse.reserve(n);
      const Rows all = view(0, n);
      constexpr int64_t grain = 2048;
      parallel(ceil_div(n, grain), [&](int64_t i) {
        const int64_t first = i * grain;
        tile_kernels<T>().inverse_norm(all, first, std::min(grain, n - first), inverse.get() + first);
      });
    }
  }

  int64_t count() const { return static_cast<int64_t>(slot.size()); }
  int64_t groups() const { return static_cast<int64_t>(begin.size()) - 1; }

  Rows view(int64_t first, int64_t n) const {
    Rows r = rows;
    r.offset = offset.data() + first;
    r.n = n;
    return r;
  }
  Side<T> side(int64_t g) const {
    const int64_t first = begin[g];
    Side<T> s;
    s.rows = view(first, begin[g + 1] - first);
    s.inverse = normalize ? inverse.get() + first : nullptr;
    s.code = code.empty() ? nullptr : code.data() + first;
    s.code_stride = count();
    s.slot = slot.data() + first;
    return s;
  }
  // Where the gradient of group g goes: a tensor of the same shape, any strides.
  RowsOut out(const Tensor& y, std::vector<int64_t>& offsets) const {
    const int64_t stride_b = y.stride(0), stride_l = y.stride(2);
    offsets.resize(slot.size());
    for (size_t r = 0; r < slot.size(); ++r) offsets[r] = slot[r] / length * stride_b + slot[r] % length * stride_l;
    RowsOut o;
    o.data = y.mutable_data_ptr();
    o.dtype = dtype_of(y);
    o.stride_d = y.stride(1);
    o.dim = y.size(1);
    o.n = count();
    o.offset = offsets.data();
    return o;
  }
};

// The two tables of a call and the problems between them.
template <class T>
struct Pairing {
  std::vector<Kind> kinds;
  std::vector<LabelCodes> codes;
  bool coded;  // labels are compared or counted, not only tested for the ignored value
  bool self, across;
  T alpha;
  Table<T> query;
  std::unique_ptr<Table<T>> key_table;

  Pairing(const Tensor& q, const OptionalTensor& k, const OptionalTensor& query_labels,
          const OptionalTensor& key_labels, const std::string& kind_text, int64_t ignore, double temperature,
          bool normalize, bool across_, bool classes = false)
      : kinds(parse_kinds(kind_text)),
        codes(kinds.size()),
        coded(classes || kinds.size() > 1 || kinds[0] != Kind::all),
        self(!k.has_value()),
        across(across_),
        alpha(static_cast<T>(1.0 / temperature)),
        query(q, pointer(query_labels), ignore, coded ? &codes : nullptr, across_, normalize) {
    STD_TORCH_CHECK(temperature > 0, "medcl: temperature must be positive");
    if (query_labels.has_value())
      STD_TORCH_CHECK(query_labels->size(0) == static_cast<int64_t>(kinds.size()),
                      "medcl: one label map per selection is needed");
    if (self) return;
    STD_TORCH_CHECK(k->dim() == 3 && k->size(1) == q.size(1), "medcl: query and key need the same number of channels");
    STD_TORCH_CHECK(across || k->size(0) == q.size(0), "medcl: query and key need the same batch size");
    key_table =
        std::make_unique<Table<T>>(*k, pointer(key_labels), ignore, coded ? &codes : nullptr, across_, normalize);
  }

  const Table<T>& key() const { return self ? query : *key_table; }
  int64_t groups() const { return query.groups(); }
  Problem<T> problem(int64_t g) const {
    Problem<T> p;
    p.query = query.side(g);
    p.key = self ? p.query : key_table->side(g);
    p.self = self;
    p.alpha = alpha;
    p.kind = kinds.data();
    p.selections = static_cast<int64_t>(kinds.size());
    if (p.single()) p.query.code = p.key.code = nullptr;  // who is excluded is not packed, so there is nothing to test
    return p;
  }

 private:
  static const Tensor* pointer(const OptionalTensor& x) { return x.has_value() ? &*x : nullptr; }
};

// The codes of one group as (selections, rows of the group), so that row terms and codes share a stride.
template <class T>
std::vector<int32_t> compact_codes(const Side<T>& side, int64_t selections) {
  std::vector<int32_t> codes;
  if (!side.code) return codes;
  for (int64_t k = 0; k < selections; ++k)
    codes.insert(codes.end(), side.code + k * side.code_stride, side.code + k * side.code_stride + side.rows.n);
  return codes;
}

// Many small problems run side by side, one large one uses the threads inside; the results are the same.
template <class F>
void each_group(int64_t groups, F&& f) {
  if (groups > 1 && groups >= static_cast<int64_t>(torch::stable::get_num_threads()))
    parallel(groups, f);
  else
    for (int64_t g = 0; g < groups; ++g) f(g);
}

inline RowsOut shifted(RowsOut o, int64_t first) {
  o.offset += first;
  return o;
}

inline Tensor gradient_like(const Tensor& x, bool partial) {
  Tensor y = torch::stable::empty_like(x);
  return partial ? torch::stable::zero_(y) : y;
}

// Runs body(T{}) in the compute type: double for float64 features, else float.
template <class F>
auto in_compute_type(const Tensor& x, F&& body) {
  return x.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

// Per-row values as the kernels read them: contiguous, in the compute type.
template <class T>
const T* row_values(const Tensor& x, int64_t n) {
  const ScalarType t = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(x.scalar_type() == t && x.is_contiguous() && x.numel() == n,
                  "medcl: per-row values must be contiguous, ", n, " of them, in the compute dtype");
  return static_cast<const T*>(x.const_data_ptr());
}

inline Tensor per_row(const Tensor& like, std::vector<int64_t> shape) {
  const ScalarType t = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, shape, t);
}

}  // namespace medcl
