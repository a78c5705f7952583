// lse_i = log sum_j exp(s_ij) over the allowed candidates of each selection, and its gradient.
#include "cpu/logsumexp.h"

namespace medcl {
namespace {

template <class T>
Tensor forward(const Pairing<T>& pairs, const Tensor& query) {
  const int64_t S = static_cast<int64_t>(pairs.kinds.size()), stride = query.size(0) * query.size(2);
  Tensor lse = per_row(query, {S, query.size(0), query.size(2)});
  T* out = static_cast<T*>(lse.mutable_data_ptr());
  if (pairs.query.partial) std::fill_n(out, S * stride, kNegInf<T>);
  each_group(pairs.groups(), [&](int64_t g) { forward_group(pairs.problem(g), out, stride); });
  return lse;
}

template <class T>
std::tuple<Tensor, Tensor> backward(const Pairing<T>& pairs, const Tensor& d_lse, const Tensor& lse,
                                    const Tensor& query, const OptionalTensor& key, bool need_query, bool need_key) {
  const int64_t S = static_cast<int64_t>(pairs.kinds.size()), stride = query.size(0) * query.size(2);
  const T* g_all = row_values<T>(d_lse, S * stride);
  const T* l_all = row_values<T>(lse, S * stride);
  GradientPair<T> out(pairs, query, key, need_query, need_key);
  each_group(pairs.groups(), [&](int64_t group) {
    const Problem<T> p = pairs.problem(group);
    const int64_t n = p.query.rows.n;
    // row terms in packed order; a row without candidates has lse = -inf and no gradient
    Buffer<T> g(S * n), l(S * n);
    for (int64_t k = 0; k < S; ++k)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = k * stride + p.query.slot[i];
        const bool none = l_all[at] == kNegInf<T>;
        g.get()[k * n + i] = none ? T(0) : g_all[at];
        l.get()[k * n + i] = none ? T(0) : l_all[at];
      }
    const RowsOut d_query = out.query(pairs, group), d_key = out.key(pairs, group);
    if (p.self) {
      if (!need_query) return;
      if (p.plain())
        triangle_backward(p, g.get(), l.get(), d_query);
      else
        symmetric_gradient<T>(p, g.get(), l.get(), tile_kernels<T>().softmax_weights, d_query);
    } else if (p.single()) {
      StripTask<T> task;
      task.g = g.get();
      task.lse = l.get();
      strip_gradient(p, task, need_query ? &d_query : nullptr, need_key ? &d_key : nullptr);
    } else {
      two_sided_gradient<T>(p, g.get(), l.get(), tile_kernels<T>().softmax_weights, need_query ? &d_query : nullptr,
                            need_key ? &d_key : nullptr);
    }
  });
  return out.tensors();
}

}  // namespace

Tensor pair_logsumexp_cpu(const Tensor& query, const OptionalTensor& key, const OptionalTensor& query_labels,
                          const OptionalTensor& key_labels, std::string kinds, int64_t ignore_index, double temperature,
                          bool normalize, bool across) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    return forward(
        Pairing<T>(query, key, query_labels, key_labels, kinds, ignore_index, temperature, normalize, across), query);
  });
}

std::tuple<Tensor, Tensor> pair_logsumexp_backward_cpu(const Tensor& d_lse, const Tensor& lse, const Tensor& query,
                                                       const OptionalTensor& key, const OptionalTensor& query_labels,
                                                       const OptionalTensor& key_labels, std::string kinds,
                                                       int64_t ignore_index, double temperature, bool normalize,
                                                       bool across, bool need_query, bool need_key) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    return backward(
        Pairing<T>(query, key, query_labels, key_labels, kinds, ignore_index, temperature, normalize, across), d_lse,
        lse, query, key, need_query, need_key);
  });
}

}  // namespace medcl
