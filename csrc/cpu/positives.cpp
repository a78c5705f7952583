// Similarity to the positives without a pass over pairs: class sums (supervised contrast) or one gather (InfoNCE).
#include "cpu/class_sums.h"

namespace medcl {
namespace {

template <class T>
std::tuple<Tensor, Tensor> mean_forward(const Pairing<T>& pairs, const Tensor& query) {
  const int64_t S = static_cast<int64_t>(pairs.kinds.size()), stride = query.size(0) * query.size(2);
  Tensor mean = per_row(query, {S, query.size(0), query.size(2)});
  Tensor count =
      torch::stable::new_empty(query, std::vector<int64_t>{S, query.size(0), query.size(2)}, ScalarType::Long);
  T* out = static_cast<T*>(mean.mutable_data_ptr());
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  std::fill_n(out, S * stride, T(0));
  std::fill_n(counts, S * stride, int64_t{0});
  each_group(pairs.groups(), [&](int64_t g) {
    const Side<T> q = pairs.query.side(g), candidates = pairs.key().side(g);
    const ClassSums<T> sums(candidates, pairs.codes, nullptr);
    const int64_t dim = q.rows.dim;
    const auto& kernels = tile_kernels<T>();
    each_tile(q, [&](int64_t i0, int64_t m, const Tile<T>& z) {
      for (int64_t k = 0; k < S; ++k)
        for (int64_t i = 0; i < m; ++i) {
          const int32_t c = q.code[k * q.code_stride + i0 + i];
          if (c < 0) continue;
          const int64_t positives = sums.count[k][c] - (pairs.self ? 1 : 0);
          const int64_t at = k * stride + q.slot[i0 + i];
          counts[at] = positives;
          if (positives == 0) continue;
          const T* cell = sums.sum[k].get() + c * dim;
          const T* zi = z.data + i * z.row;
          const double own = pairs.self ? kernels.dot(zi, zi, dim) : 0.0;
          out[at] = static_cast<T>(pairs.alpha * (kernels.dot(zi, cell, dim) - own) / positives);
        }
    });
  });
  return {mean, count};
}

template <class T>
std::tuple<Tensor, Tensor> mean_backward(const Pairing<T>& pairs, const Tensor& d_mean, const Tensor& query,
                                         const OptionalTensor& key, bool need_query, bool need_key) {
  const int64_t S = static_cast<int64_t>(pairs.kinds.size()), stride = query.size(0) * query.size(2);
  const T* upstream = row_values<T>(d_mean, S * stride);
  GradientPair<T> out(pairs, query, key, need_query, need_key);
  each_group(pairs.groups(), [&](int64_t g) {
    const Side<T> q = pairs.query.side(g), candidates = pairs.key().side(g);
    const int64_t n = q.rows.n, dim = q.rows.dim;
    const ClassSums<T> sums(candidates, pairs.codes, nullptr);
    Buffer<T> u(S * n);  // upstream / number of positives
    for (int64_t k = 0; k < S; ++k)
      for (int64_t i = 0; i < n; ++i) {
        const int32_t c = q.code[k * q.code_stride + i];
        const int64_t positives = c < 0 ? 0 : sums.count[k][c] - (pairs.self ? 1 : 0);
        u.get()[k * n + i] = positives > 0 ? upstream[k * stride + q.slot[i]] / static_cast<T>(positives) : T(0);
      }
    const ClassSums<T> pulled(q, pairs.codes, u.get());  // what the anchors of a class send to its candidates
    const auto& kernels = tile_kernels<T>();
    auto gradient = [&](const Side<T>& side, bool as_anchor, bool as_candidate, const RowsOut& to) {
      each_tile(side, [&](int64_t i0, int64_t m, const Tile<T>& z) {
        T* acc = scratch<T>(kSums, kRows * dim);
        std::fill_n(acc, m * dim, T(0));
        for (int64_t k = 0; k < S; ++k)
          for (int64_t i = 0; i < m; ++i) {
            const int32_t c = side.code[k * side.code_stride + i0 + i];
            if (c < 0) continue;
            const T w = as_anchor ? u.get()[k * n + i0 + i] : T(0);
            if (as_anchor) kernels.add_row(acc + i * dim, sums.sum[k].get() + c * dim, dim, w);
            if (as_candidate) kernels.add_row(acc + i * dim, pulled.sum[k].get() + c * dim, dim, T(1));
            if (pairs.self) kernels.add_row(acc + i * dim, z.data + i * dim, dim, -2 * w);  // (i, i), in both roles
          }
        finish_gradient(acc, dim, side, i0, m, pairs.alpha, to);
      });
    };
    if (need_query) gradient(q, true, pairs.self, out.query(pairs, g));
    if (need_key && !pairs.self) gradient(candidates, false, true, out.key(pairs, g));
  });
  return out.tensors();
}

// One positive index per (b, l, r); anchors are grouped by image.
template <class T, class Visit>
void each_positive(const Tensor& positives, int64_t b, Visit&& visit) {
  const int64_t L = positives.size(1), R = positives.dim() == 3 ? positives.size(2) : 1;
  const int64_t* p = static_cast<const int64_t*>(positives.const_data_ptr()) + b * L * R;
  for (int64_t l = 0; l < L; ++l)
    for (int64_t r = 0; r < R; ++r)
      if (p[l * R + r] >= 0) visit(l, p[l * R + r], (b * L + l) * R + r);
}

}  // namespace

std::tuple<Tensor, Tensor> positive_mean_cpu(const Tensor& query, const OptionalTensor& key, const Tensor& query_labels,
                                             const OptionalTensor& key_labels, int64_t ignore_index, double temperature,
                                             bool normalize, bool across) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    return mean_forward(Pairing<T>(query, key, query_labels, key_labels, same_kinds(query_labels.size(0)), ignore_index,
                                   temperature, normalize, across),
                        query);
  });
}

std::tuple<Tensor, Tensor> positive_mean_backward_cpu(const Tensor& d_mean, const Tensor& query,
                                                      const OptionalTensor& key, const Tensor& query_labels,
                                                      const OptionalTensor& key_labels, int64_t ignore_index,
                                                      double temperature, bool normalize, bool across, bool need_query,
                                                      bool need_key) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    return mean_backward(Pairing<T>(query, key, query_labels, key_labels, same_kinds(query_labels.size(0)),
                                    ignore_index, temperature, normalize, across),
                         d_mean, query, key, need_query, need_key);
  });
}

Tensor positive_at_cpu(const Tensor& query, const Tensor& key, const Tensor& positives, double temperature,
                       bool normalize) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const Pairing<T> pairs(query, key, std::nullopt, std::nullopt, "all", -1, temperature, normalize, false);
    std::vector<int64_t> shape{positives.size(0), positives.size(1)};
    if (positives.dim() == 3) shape.push_back(positives.size(2));
    Tensor out = per_row(query, shape);
    T* o = static_cast<T*>(out.mutable_data_ptr());
    std::fill_n(o, positives.numel(), T(0));
    const int64_t dim = query.size(1);
    parallel(query.size(0), [&](int64_t b) {
      const Side<T> q = pairs.query.side(b), k = pairs.key().side(b);
      T *a = scratch<T>(kOwn, dim), *c = scratch<T>(kOther, dim);
      each_positive<T>(positives, b, [&](int64_t l, int64_t j, int64_t at) {
        load_row(q, l, a);
        load_row(k, j, c);
        o[at] = static_cast<T>(pairs.alpha * tile_kernels<T>().dot(a, c, dim));
      });
    });
    return out;
  });
}

std::tuple<Tensor, Tensor> positive_at_backward_cpu(const Tensor& d_out, const Tensor& query, const Tensor& key,
                                                    const Tensor& positives, double temperature, bool normalize,
                                                    bool need_query, bool need_key) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const Pairing<T> pairs(query, key, std::nullopt, std::nullopt, "all", -1, temperature, normalize, false);
    const T* g = row_values<T>(d_out, positives.numel());
    GradientPair<T> out(pairs, query, key, need_query, need_key);
    const int64_t dim = query.size(1);
    const auto& kernels = tile_kernels<T>();
    parallel(query.size(0), [&](int64_t b) {
      const Side<T> q = pairs.query.side(b), k = pairs.key().side(b);
      T *a = scratch<T>(kOwn, dim), *c = scratch<T>(kOther, dim);
      Buffer<T> acc_q(need_query ? q.rows.n * dim : 0), acc_k(need_key ? k.rows.n * dim : 0);
      if (need_query) std::fill_n(acc_q.get(), q.rows.n * dim, T(0));
      if (need_key) std::fill_n(acc_k.get(), k.rows.n * dim, T(0));
      each_positive<T>(positives, b, [&](int64_t l, int64_t j, int64_t at) {
        load_row(q, l, a);
        load_row(k, j, c);
        if (need_query) kernels.add_row(acc_q.get() + l * dim, c, dim, g[at]);
        if (need_key) kernels.add_row(acc_k.get() + j * dim, a, dim, g[at]);
      });
      for (int64_t i0 = 0; need_query && i0 < q.rows.n; i0 += kRows)
        finish_gradient(acc_q.get() + i0 * dim, dim, q, i0, std::min(kRows, q.rows.n - i0), pairs.alpha,
                        out.query(pairs, b));
      for (int64_t i0 = 0; need_key && i0 < k.rows.n; i0 += kRows)
        finish_gradient(acc_k.get() + i0 * dim, dim, k, i0, std::min(kRows, k.rows.n - i0), pairs.alpha,
                        out.key(pairs, b));
    });
    return out.tensors();
  });
}

}  // namespace medcl
