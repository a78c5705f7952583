// The CUDA operations over pairs for torch's dispatcher. Those of patches: registration_patches.cpp.
#include "cuda/torch_calls.h"

namespace medcl {
namespace {

using namespace torch_calls;

Tensor pair_logsumexp(const Tensor& query, const OptionalTensor& key, const OptionalTensor& query_labels,
                      const OptionalTensor& key_labels, std::string kinds, int64_t ignore_index, double temperature,
                      bool normalize, bool across) {
  cuda::Sides s = sides(query, key, across);
  cuda::Options o = options(query, ignore_index, temperature, normalize, across);
  parse_kinds(kinds, o);
  add_labels(s, o, query_labels, key_labels);
  Tensor lse;
  on_device("pair_logsumexp", query, [&](cuda::Workspace& w) {
    lse = per_row(query, o.selections);
    cuda::pair_logsumexp(w, s, o, floats(lse));
  });
  return lse;
}

std::tuple<Tensor, Tensor> pair_logsumexp_backward(const Tensor& d_lse, const Tensor& lse, const Tensor& query,
                                                   const OptionalTensor& key, const OptionalTensor& query_labels,
                                                   const OptionalTensor& key_labels, std::string kinds,
                                                   int64_t ignore_index, double temperature, bool normalize,
                                                   bool across, bool need_query, bool need_key) {
  cuda::Sides s = sides(query, key, across);
  cuda::Options o = options(query, ignore_index, temperature, normalize, across);
  parse_kinds(kinds, o);
  add_labels(s, o, query_labels, key_labels);
  const int64_t n = o.selections * s.query.batch * s.query.length;
  const float *upstream = contiguous<float>(d_lse, n, "d_lse"), *level = contiguous<float>(lse, n, "lse");
  std::optional<Gradients> out;
  on_device("pair_logsumexp_backward", query, [&](cuda::Workspace& w) {
    out.emplace(query, key, need_query, need_key);
    cuda::pair_logsumexp_backward(w, s, o, upstream, level, out->query_rows, out->key_rows);
  });
  return out->tensors();
}

std::tuple<Tensor, Tensor> pair_positive_log(const Tensor& query, const OptionalTensor& key, const Tensor& query_labels,
                                             const OptionalTensor& key_labels, const Tensor& lse_negative,
                                             int64_t ignore_index, double temperature, bool normalize, bool across) {
  cuda::Sides s = sides(query, key, across);
  cuda::Options o = options(query, ignore_index, temperature, normalize, across);
  same_kinds(query_labels, o);
  add_labels(s, o, query_labels, key_labels);
  const float* level = contiguous<float>(lse_negative, query_labels.numel(), "lse_negative");
  Tensor sum, tail;
  on_device("pair_positive_log", query, [&](cuda::Workspace& w) {
    sum = per_row(query, o.selections);
    tail = per_row(query, o.selections);
    cuda::pair_positive_log(w, s, o, level, floats(sum), floats(tail));
  });
  return {sum, tail};
}

std::tuple<Tensor, Tensor> pair_positive_log_backward(const Tensor& d_sum, const Tensor& query,
                                                      const OptionalTensor& key, const Tensor& query_labels,
                                                      const OptionalTensor& key_labels, const Tensor& lse_negative,
                                                      int64_t ignore_index, double temperature, bool normalize,
                                                      bool across, bool need_query, bool need_key) {
  cuda::Sides s = sides(query, key, across);
  cuda::Options o = options(query, ignore_index, temperature, normalize, across);
  same_kinds(query_labels, o);
  add_labels(s, o, query_labels, key_labels);
  const float* upstream = contiguous<float>(d_sum, query_labels.numel(), "d_sum");
  const float* level = contiguous<float>(lse_negative, query_labels.numel(), "lse_negative");
  std::optional<Gradients> out;
  on_device("pair_positive_log_backward", query, [&](cuda::Workspace& w) {
    out.emplace(query, key, need_query, need_key);
    cuda::pair_positive_log_backward(w, s, o, upstream, level, out->query_rows, out->key_rows);
  });
  return out->tensors();
}

std::tuple<Tensor, Tensor> pair_argmax(const Tensor& query, const Tensor& key, bool normalize) {
  const cuda::Sides s = sides(query, key, false);
  const cuda::Options o = options(query, -1, 1.0, normalize, false);
  Tensor index, value;
  on_device("pair_argmax", query, [&](cuda::Workspace& w) {
    const std::vector<int64_t> shape{query.size(0), query.size(2)};
    index = torch::stable::new_empty(query, shape, ScalarType::Long);
    value = torch::stable::new_empty(query, shape, ScalarType::Float);
    cuda::pair_argmax(w, s, o, integers(index), floats(value));
  });
  return {index, value};
}

std::tuple<Tensor, Tensor> positive_mean(const Tensor& query, const OptionalTensor& key, const Tensor& query_labels,
                                         const OptionalTensor& key_labels, int64_t ignore_index, double temperature,
                                         bool normalize, bool across) {
  cuda::Sides s = sides(query, key, across);
  cuda::Options o = options(query, ignore_index, temperature, normalize, across);
  same_kinds(query_labels, o);
  add_labels(s, o, query_labels, key_labels);
  Tensor mean, count;
  on_device("positive_mean", query, [&](cuda::Workspace& w) {
    mean = per_row(query, o.selections);
    count = per_row(query, o.selections, ScalarType::Long);
    cuda::positive_mean(w, s, o, floats(mean), integers(count));
  });
  return {mean, count};
}

std::tuple<Tensor, Tensor> positive_mean_backward(const Tensor& d_mean, const Tensor& query, const OptionalTensor& key,
                                                  const Tensor& query_labels, const OptionalTensor& key_labels,
                                                  int64_t ignore_index, double temperature, bool normalize, bool across,
                                                  bool need_query, bool need_key) {
  cuda::Sides s = sides(query, key, across);
  cuda::Options o = options(query, ignore_index, temperature, normalize, across);
  same_kinds(query_labels, o);
  add_labels(s, o, query_labels, key_labels);
  const float* upstream = contiguous<float>(d_mean, query_labels.numel(), "d_mean");
  std::optional<Gradients> out;
  on_device("positive_mean_backward", query, [&](cuda::Workspace& w) {
    out.emplace(query, key, need_query, need_key);
    cuda::positive_mean_backward(w, s, o, upstream, out->query_rows, out->key_rows);
  });
  return out->tensors();
}

int64_t per_anchor(const Tensor& positives) { return positives.dim() == 3 ? positives.size(2) : 1; }

const int64_t* indices(const Tensor& positives, const cuda::Rows& query) {
  return contiguous<int64_t>(positives, query.batch * query.length * per_anchor(positives), "positives");
}

Tensor positive_at(const Tensor& query, const Tensor& key, const Tensor& positives, double temperature,
                   bool normalize) {
  const cuda::Sides s = sides(query, key, false);
  const cuda::Options o = options(query, -1, temperature, normalize, false);
  const int64_t* index = indices(positives, s.query);
  Tensor out;
  on_device("positive_at", query, [&](cuda::Workspace& w) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < positives.dim(); ++i) shape.push_back(positives.size(i));
    out = torch::stable::new_empty(query, shape, ScalarType::Float);
    cuda::positive_at(w, s, o, index, per_anchor(positives), floats(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> positive_at_backward(const Tensor& d_out, const Tensor& query, const Tensor& key,
                                                const Tensor& positives, double temperature, bool normalize,
                                                bool need_query, bool need_key) {
  const cuda::Sides s = sides(query, key, false);
  const cuda::Options o = options(query, -1, temperature, normalize, false);
  const int64_t* index = indices(positives, s.query);
  const float* upstream = contiguous<float>(d_out, positives.numel(), "d_out");
  std::optional<Gradients> out;
  on_device("positive_at_backward", query, [&](cuda::Workspace& w) {
    out.emplace(query, key, need_query, need_key);
    cuda::positive_at_backward(w, s, o, index, per_anchor(positives), upstream, out->query_rows, out->key_rows);
  });
  return out->tensors();
}

cuda::PairList pair_list(const Tensor& anchor, const Tensor& candidate) {
  const int64_t n = anchor.numel();
  return {n, contiguous<int64_t>(anchor, n, "anchor"), contiguous<int64_t>(candidate, n, "candidate")};
}

Tensor pair_at(const Tensor& query, const OptionalTensor& key, const Tensor& anchor, const Tensor& candidate,
               double temperature, bool normalize) {
  const cuda::Sides s = sides(query, key, true);
  const cuda::Options o = options(query, -1, temperature, normalize, true);
  const cuda::PairList pairs = pair_list(anchor, candidate);
  Tensor out;
  on_device("pair_at", query, [&](cuda::Workspace& w) {
    out = torch::stable::new_empty(query, std::vector<int64_t>{pairs.length}, ScalarType::Float);
    cuda::pair_at(w, s, o, pairs, floats(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> pair_at_backward(const Tensor& d_at, const Tensor& query, const OptionalTensor& key,
                                            const Tensor& anchor, const Tensor& candidate, double temperature,
                                            bool normalize, bool need_query, bool need_key) {
  const cuda::Sides s = sides(query, key, true);
  const cuda::Options o = options(query, -1, temperature, normalize, true);
  const cuda::PairList pairs = pair_list(anchor, candidate);
  const float* upstream = contiguous<float>(d_at, pairs.length, "d_at");
  std::optional<Gradients> out;
  on_device("pair_at_backward", query, [&](cuda::Workspace& w) {
    out.emplace(query, key, need_query, need_key);
    cuda::pair_at_backward(w, s, o, pairs, upstream, out->query_rows, out->key_rows);
  });
  return out->tensors();
}

template <size_t N>
int position(const char* what, const std::array<const char*, N>& names, const std::string& name) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return static_cast<int>(i);
  STD_TORCH_CHECK(false, "medcl: unknown ", what, " '", name, "'");
  return 0;
}

int64_t units_of(cuda::Scope scope, const cuda::Rows& query) {
  return scope == cuda::Scope::global ? 1 : query.batch * (scope == cuda::Scope::image ? 1 : query.length);
}

cuda::Filter filter_of(const cuda::Sides& s, const cuda::Options& o, const OptionalTensor& positives,
                       const Tensor& statistics, const std::string& form, const std::string& score,
                       const std::string& scope, int64_t classes) {
  constexpr std::array<const char*, 3> forms{"out", "in", "pixel"}, scopes{"global", "image", "anchor"};
  cuda::Filter f;
  f.form = static_cast<Form>(position("form", forms, form));
  f.scope = static_cast<cuda::Scope>(position("scope", scopes, scope));
  f.representation = score == "representation";
  STD_TORCH_CHECK(!f.representation || o.normalize, "medcl: score representation needs normalize");
  const int64_t rows = s.query.batch * s.query.length;
  f.statistics = contiguous<float>(statistics, 3 * rows, "statistics (3, B, L)");
  STD_TORCH_CHECK(classes == 1 || classes == 2, "medcl: one class of pairs or two");
  f.classes = static_cast<int>(classes);
  if (positives.has_value()) {
    STD_TORCH_CHECK(s.key.data && !s.key_labels && positives->dim() == 3,
                    "medcl: positives by index (B, L, R) need a key without labels");
    f.several = positives->size(2);
    STD_TORCH_CHECK(f.several > 0, "medcl: positives (B, L, R) name no candidate: R is 0");
    f.positives = contiguous<int64_t>(*positives, rows * f.several, "positives (B, L, R)");
  } else {
    STD_TORCH_CHECK(s.query_labels && (s.key_labels || !s.key.data), "medcl: positives need labels or an index");
  }
  return f;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_topk(const Tensor& query, const OptionalTensor& key,
                                                             const OptionalTensor& query_labels,
                                                             const OptionalTensor& key_labels,
                                                             const OptionalTensor& positives, const Tensor& statistics,
                                                             const Tensor& k, int64_t capacity, std::string form,
                                                             std::string score, std::string scope, int64_t ignore_index,
                                                             double temperature, bool normalize, bool across) {
  cuda::Sides s = sides(query, key, across);
  const cuda::Options o = options(query, ignore_index, temperature, normalize, across);
  add_labels(s, o, query_labels, key_labels);
  STD_TORCH_CHECK(k.dim() == 2, "medcl: k must be (1 or 2, units)");
  const cuda::Filter f = filter_of(s, o, positives, statistics, form, score, scope, k.size(0));
  const int64_t* counts = contiguous<int64_t>(k, f.classes * units_of(f.scope, s.query), "k (1 or 2, units)");
  Tensor anchor, candidate, gradient, threshold, cut;
  on_device("pair_topk", query, [&](cuda::Workspace& w) {
    const auto make = [&](std::vector<int64_t> shape, ScalarType type) {
      return torch::stable::new_empty(query, shape, type);
    };
    anchor = make({capacity}, ScalarType::Long);
    candidate = make({capacity}, ScalarType::Long);
    gradient = make({capacity}, ScalarType::Float);
    threshold = make({k.size(0), k.size(1)}, ScalarType::Float);
    cut = make({k.size(0), k.size(1)}, ScalarType::Long);
    cuda::pair_topk(
        w, s, o, f, counts,
        {capacity, integers(anchor), integers(candidate), floats(gradient), floats(threshold), integers(cut)});
  });
  return {anchor, candidate, gradient, threshold, cut};
}

Tensor pair_filtered_grad(const Tensor&, const OptionalTensor&, const Tensor& value, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                          std::string, std::string, std::string, int64_t, double, bool, bool) {
  return torch::stable::clone(value);
}

std::tuple<Tensor, Tensor> pair_filtered_grad_backward(
    const Tensor& d_value, const Tensor& query, const OptionalTensor& key, const Tensor& value,
    const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& positives,
    const Tensor& statistics, const OptionalTensor& threshold, const OptionalTensor& cut, const OptionalTensor& anchor,
    const OptionalTensor& candidate, const OptionalTensor& gradient, std::string form, std::string score,
    std::string scope, int64_t ignore_index, double temperature, bool normalize, bool across, bool need_query,
    bool need_key) {
  cuda::Sides s = sides(query, key, across);
  const cuda::Options o = options(query, ignore_index, temperature, normalize, across);
  const float* upstream = contiguous<float>(d_value, value.numel(), "d_value");
  std::optional<Gradients> out;
  if (anchor.has_value()) {
    STD_TORCH_CHECK(candidate.has_value() && gradient.has_value(),
                    "medcl: a list of pairs is anchor, candidate and gradient");
    const cuda::PairList pairs = pair_list(*anchor, *candidate);
    const float* weight = contiguous<float>(*gradient, pairs.length, "gradient");
    on_device("pair_filtered_grad_backward", query, [&](cuda::Workspace& w) {
      out.emplace(query, key, need_query, need_key);
      cuda::listed_grad_backward(w, s, o, pairs, weight, upstream, out->query_rows, out->key_rows);
    });
    return out->tensors();
  }
  STD_TORCH_CHECK(threshold.has_value() && cut.has_value() && threshold->dim() == 2,
                  "medcl: a selection is a rule, threshold and cut (1 or 2, units), or a list");
  add_labels(s, o, query_labels, key_labels);
  const cuda::Filter f = filter_of(s, o, positives, statistics, form, score, scope, threshold->size(0));
  const int64_t cells = f.classes * units_of(f.scope, s.query);
  const float* limit = contiguous<float>(*threshold, cells, "threshold");
  const int64_t* last = contiguous<int64_t>(*cut, cells, "cut");
  on_device("pair_filtered_grad_backward", query, [&](cuda::Workspace& w) {
    out.emplace(query, key, need_query, need_key);
    cuda::pair_filtered_grad_backward(w, s, o, f, upstream, limit, last, out->query_rows, out->key_rows);
  });
  return out->tensors();
}

Tensor mitigate_rows(const Tensor& gradients, const Tensor& order, std::string method, std::string unit,
                     std::string reduction, double strength, bool rows_first) {
  STD_TORCH_CHECK(gradients.dim() == 4, "medcl: gradients must be (M, B, D, L)");
  const int64_t M = gradients.size(0), B = gradients.size(1), D = gradients.size(2), L = gradients.size(3);
  STD_TORCH_CHECK(M >= 1 && M <= kPerspectives, "medcl: 1 to ", kPerspectives, " gradients, got ", M);
  cuda::Stack stack;
  stack.rows = {const_cast<void*>(gradients.const_data_ptr()),
                type_of(gradients),
                B,
                D,
                L,
                gradients.stride(1),
                gradients.stride(2),
                gradients.stride(3)};
  stack.count = M;
  stack.stride_m = gradients.stride(0);
  constexpr std::array<const char*, 5> methods{"pcgrad", "cagrad", "consensus", "mean", "sum"};
  cuda::Mitigation o;
  o.method = static_cast<cuda::Method>(position("method", methods, method));
  o.flat = unit == "flat";
  o.how.count = static_cast<int>(M);
  o.how.pcgrad = o.method == cuda::Method::pcgrad;
  o.how.strength = strength;
  o.how.factor = reduction == "sum" ? static_cast<double>(M) : 1.0;
  const int64_t* meeting = contiguous<int64_t>(order, M * (M - 1), "order (M, M - 1)");
  if (order.is_cuda())
    o.order = meeting;
  else
    for (int64_t e = 0; e < M * (M - 1); ++e) o.how.order[e / (M - 1)][e % (M - 1)] = static_cast<int8_t>(meeting[e]);
  Tensor out;
  on_device("mitigate_rows", gradients, [&](cuda::Workspace& w) {
    out =
        torch::stable::new_empty(gradients, rows_first ? std::vector<int64_t>{B, L, D} : std::vector<int64_t>{B, D, L});
    const cuda::Rows to{out.mutable_data_ptr(), stack.rows.type,   B, D, L, D * L,
                        rows_first ? 1 : L,     rows_first ? D : 1};
    cuda::mitigate_rows(w, stack, o, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medcl, MEDCL_CUDA_KEY, m) {
  m.impl("pair_logsumexp", TORCH_BOX(&pair_logsumexp));
  m.impl("pair_logsumexp_backward", TORCH_BOX(&pair_logsumexp_backward));
  m.impl("pair_positive_log", TORCH_BOX(&pair_positive_log));
  m.impl("pair_positive_log_backward", TORCH_BOX(&pair_positive_log_backward));
  m.impl("pair_argmax", TORCH_BOX(&pair_argmax));
  m.impl("positive_mean", TORCH_BOX(&positive_mean));
  m.impl("positive_mean_backward", TORCH_BOX(&positive_mean_backward));
  m.impl("positive_at", TORCH_BOX(&positive_at));
  m.impl("positive_at_backward", TORCH_BOX(&positive_at_backward));
  m.impl("pair_at", TORCH_BOX(&pair_at));
  m.impl("pair_at_backward", TORCH_BOX(&pair_at_backward));
  m.impl("pair_topk", TORCH_BOX(&pair_topk));
  m.impl("pair_filtered_grad", TORCH_BOX(&pair_filtered_grad));
  m.impl("pair_filtered_grad_backward", TORCH_BOX(&pair_filtered_grad_backward));
  m.impl("mitigate_rows", TORCH_BOX(&mitigate_rows));
}

}  // namespace medcl
