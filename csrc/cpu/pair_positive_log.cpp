// sum over positives p of log(exp(s_ip) + exp(negative_i)): one log per positive against the negatives only.
// d/ds_ip = sigmoid(s_ip - negative_i); d/dnegative_i = sum_p sigmoid(negative_i - s_ip), kept as `tail`.
#include "cpu/pairs.h"

namespace medcl {
namespace {

// Row terms (selections, rows) of one group from tensors (selections, B, L).
template <class T>
Buffer<T> gather(const T* all, const Side<T>& side, int64_t selections, int64_t stride) {
  const int64_t n = side.rows.n;
  Buffer<T> out(selections * n);
  for (int64_t k = 0; k < selections; ++k)
    for (int64_t i = 0; i < n; ++i) out.get()[k * n + i] = all[k * stride + side.slot[i]];
  return out;
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Pairing<T>& pairs, const Tensor& query, const Tensor& lse_negative) {
  const int64_t S = static_cast<int64_t>(pairs.kinds.size()), stride = query.size(0) * query.size(2);
  const std::vector<int64_t> shape{S, query.size(0), query.size(2)};
  Tensor sum = per_row(query, shape), tail = per_row(query, shape);
  T* out = static_cast<T*>(sum.mutable_data_ptr());
  T* rest = static_cast<T*>(tail.mutable_data_ptr());
  std::fill_n(out, S * stride, T(0));
  std::fill_n(rest, S * stride, T(0));
  const T* negative_all = row_values<T>(lse_negative, S * stride);
  const auto& kernels = tile_kernels<T>();
  each_group(pairs.groups(), [&](int64_t group) {
    const Problem<T> p = pairs.problem(group);
    const int64_t n = p.query.rows.n;
    const Buffer<T> negative = gather(negative_all, p.query, S, stride);
    Buffer<double> sums(S * n), tails(S * n);
    std::fill_n(sums.get(), S * n, 0.0);
    std::fill_n(tails.get(), S * n, 0.0);
    // the self pair is no positive: its similarity is taken away again after the sweep has counted it
    sweep<T>(
        p.query, p.key, false, p.alpha, T(0), false, [](int64_t, int64_t) {},
        [&](T* s, int64_t ld, int64_t m, int64_t w, int64_t i0, int64_t j0, const Tile<T>&, const Tile<T>&) {
          const Selection sel = p.selection(p.query, i0, p.key, j0);
          kernels.positive_log(s, ld, m, w, sel, negative.get() + i0, sums.get() + i0, tails.get() + i0, n);
          if (!p.self) return;
          for (int64_t i = std::max<int64_t>(0, j0 - i0); i < m && i + i0 - j0 < w; ++i)
            for (int64_t k = 0; k < S; ++k) {
              Selection one = p.selection(p.query, i0 + i, p.key, i0 + i);
              one.count = 1;
              one.row_code += k * one.row_stride;
              one.col_code += k * one.col_stride;
              double value = 0, below = 0;
              kernels.positive_log(s + i * ld + i + i0 - j0, ld, 1, 1, one, negative.get() + k * n + i0 + i, &value,
                                   &below, n);
              sums.get()[k * n + i0 + i] -= value;
              tails.get()[k * n + i0 + i] -= below;
            }
        },
        [&](int64_t i0, int64_t m) {
          for (int64_t k = 0; k < S; ++k)
            for (int64_t i = i0; i < i0 + m; ++i) {
              out[k * stride + p.query.slot[i]] = static_cast<T>(sums.get()[k * n + i]);
              rest[k * stride + p.query.slot[i]] = static_cast<T>(tails.get()[k * n + i]);
            }
        });
  });
  return {sum, tail};
}

}  // namespace

std::tuple<Tensor, Tensor> pair_positive_log_cpu(const Tensor& query, const OptionalTensor& key,
                                                 const Tensor& query_labels, const OptionalTensor& key_labels,
                                                 const Tensor& lse_negative, int64_t ignore_index, double temperature,
                                                 bool normalize, bool across) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    return forward(Pairing<T>(query, key, query_labels, key_labels, same_kinds(query_labels.size(0)), ignore_index,
                              temperature, normalize, across),
                   query, lse_negative);
  });
}

std::tuple<Tensor, Tensor> pair_positive_log_backward_cpu(const Tensor& d_sum, const Tensor& query,
                                                          const OptionalTensor& key, const Tensor& query_labels,
                                                          const OptionalTensor& key_labels, const Tensor& lse_negative,
                                                          int64_t ignore_index, double temperature, bool normalize,
                                                          bool across, bool need_query, bool need_key) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const Pairing<T> pairs(query, key, query_labels, key_labels, same_kinds(query_labels.size(0)), ignore_index,
                           temperature, normalize, across);
    const int64_t S = query_labels.size(0), stride = query.size(0) * query.size(2);
    GradientPair<T> out(pairs, query, key, need_query, need_key);
    each_group(pairs.groups(), [&](int64_t group) {
      const Problem<T> p = pairs.problem(group);
      const Buffer<T> g = gather(row_values<T>(d_sum, S * stride), p.query, S, stride);
      const Buffer<T> negative = gather(row_values<T>(lse_negative, S * stride), p.query, S, stride);
      const RowsOut d_query = out.query(pairs, group), d_key = out.key(pairs, group);
      const auto weights = tile_kernels<T>().positive_log_weights;
      if (p.self && need_query)
        symmetric_gradient<T>(p, g.get(), negative.get(), weights, d_query);
      else if (!p.self)
        two_sided_gradient<T>(p, g.get(), negative.get(), weights, need_query ? &d_query : nullptr,
                              need_key ? &d_key : nullptr);
    });
    return out.tensors();
  });
}

}  // namespace medcl
