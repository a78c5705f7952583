// lse_i = log sum_j exp(s_ij) over the allowed candidates of each selection, and its gradient.
//   self, one selection, unit rows:  upper triangle only, forward 1u, backward 3u GEMM passes
//   two tensors, one selection:      strips of rows, S once for both gradients, 3u
//   everything else:                 row-owned sweeps with running maxima, 1u forward, 2u per gradient
#include "cpu/pairs.h"

namespace medcl {
namespace {

template <class T>
constexpr T kNegInf = -std::numeric_limits<T>::infinity();

// Sums of exp(s - alpha) of every row, each pair visited once.
template <class T>
void triangle_forward(const Problem<T>& p, T* lse) {
  const Side<T>& z = p.query;
  const int64_t n = z.rows.n, dim = z.rows.dim, bs = triangle_block(n), blocks = ceil_div(n, bs);
  const auto& kernels = tile_kernels<T>();
  Buffer<double> sums(n);
  std::fill_n(sums.get(), n, 0.0);
  auto tile = [&](int64_t I, int64_t J) {
    const int64_t i0 = I * bs, m = std::min(bs, n - i0), j0 = J * bs, w = std::min(bs, n - j0);
    const Tile<T> a = z.pack(i0, m, scratch<T>(kOwn, bs * dim));
    const Tile<T> b = I == J ? a : z.pack(j0, w, scratch<T>(kOther, bs * dim));
    T* s = scratch<T>(kScores, bs * bs);
    scores(a, m, b, w, dim, p.alpha, s, w);
    if (I == J) set_diagonal(s, w, m, w, i0, j0, kNegInf<T>);
    kernels.exp_sums(s, w, m, w, &p.alpha, 0, sums.get() + i0, I == J ? nullptr : sums.get() + j0);
  };
  tournament(blocks, tile, [&](int64_t I) { tile(I, I); });
  for (int64_t i = 0; i < n; ++i) lse[z.slot[i]] = static_cast<T>(p.alpha + std::log(sums.get()[i]));
}

// dZ = alpha [(E o (a_i + a_j)) Z] with a_i = g_i exp(alpha - lse_i): one exp per pair serves both rows.
template <class T>
void triangle_backward(const Problem<T>& p, const T* g, const T* lse, const RowsOut& out) {
  const Side<T>& z = p.query;
  const int64_t n = z.rows.n, dim = z.rows.dim, bs = triangle_block(n), blocks = ceil_div(n, bs);
  const auto& kernels = tile_kernels<T>();
  Buffer<T> weight(n), acc(n * dim);
  for (int64_t i = 0; i < n; ++i)
    weight.get()[i] = g[i] == T(0) || lse[i] == kNegInf<T> ? T(0) : g[i] * std::exp(p.alpha - lse[i]);
  auto tile = [&](int64_t I, int64_t J) {
    const int64_t i0 = I * bs, m = std::min(bs, n - i0), j0 = J * bs, w = std::min(bs, n - j0);
    const Tile<T> a = z.pack(i0, m, scratch<T>(kOwn, bs * dim));
    const Tile<T> b = I == J ? a : z.pack(j0, w, scratch<T>(kOther, bs * dim));
    T* s = scratch<T>(kScores, bs * bs);
    scores(a, m, b, w, dim, p.alpha, s, w);
    kernels.exp_weights(s, w, m, w, p.alpha, weight.get() + i0, weight.get() + j0);
    if (I == J) set_diagonal(s, w, m, w, i0, j0, T(0));
    gemm<T>(m, dim, w, T(1), s, w, 1, b.data, b.row, b.col, T(1), acc.get() + i0 * dim, dim);
    if (I != J) gemm<T>(w, dim, m, T(1), s, 1, w, a.data, a.row, a.col, T(1), acc.get() + j0 * dim, dim);
  };
  parallel(blocks, [&](int64_t I) {
    std::fill_n(acc.get() + I * bs * dim, std::min(bs, n - I * bs) * dim, T(0));
  });
  tournament(blocks, tile, [&](int64_t I) {
    tile(I, I);
    finish_gradient(acc.get() + I * bs * dim, dim, z, I * bs, std::min(bs, n - I * bs), p.alpha, out);
  });
}

template <class T>
void sweep_forward(const Problem<T>& p, T* lse, int64_t stride) {
  const auto& kernels = tile_kernels<T>();
  const int64_t S = p.selections, n = p.query.rows.n;
  const bool plain = p.plain();
  Buffer<double> sums(S * n);
  Buffer<T> maxima(plain ? 0 : S * n);
  sweep<T>(
      p.query, p.key, p.self, p.alpha, kNegInf<T>,
      [&](int64_t i0, int64_t m) {
        for (int64_t k = 0; k < S; ++k) {
          std::fill_n(sums.get() + k * n + i0, m, 0.0);
          if (!plain) std::fill_n(maxima.get() + k * n + i0, m, kNegInf<T>);
        }
      },
      [&](T* s, int64_t ld, int64_t m, int64_t w, int64_t i0, int64_t j0, const Tile<T>&, const Tile<T>&) {
        if (plain)
          kernels.exp_sums(s, ld, m, w, &p.alpha, 0, sums.get() + i0, nullptr);
        else
          kernels.online_sums(s, ld, m, w, p.selection(p.query, i0, p.key, j0), maxima.get() + i0, sums.get() + i0, n);
      },
      [&](int64_t i0, int64_t m) {
        for (int64_t k = 0; k < S; ++k)
          for (int64_t i = i0; i < i0 + m; ++i) {
            const double total = sums.get()[k * n + i];
            const T shift = plain ? p.alpha : maxima.get()[k * n + i];
            lse[k * stride + p.query.slot[i]] = total > 0 ? static_cast<T>(shift + std::log(total)) : kNegInf<T>;
          }
      });
}

template <class T>
Tensor forward(const Pairing<T>& pairs, const Tensor& query) {
  const int64_t S = static_cast<int64_t>(pairs.kinds.size()), stride = query.size(0) * query.size(2);
  Tensor lse = per_row(query, {S, query.size(0), query.size(2)});
  T* out = static_cast<T*>(lse.mutable_data_ptr());
  if (pairs.query.partial) std::fill_n(out, S * stride, kNegInf<T>);
  each_group(pairs.groups(), [&](int64_t g) {
    const Problem<T> p = pairs.problem(g);
    if (p.self && p.plain())
      triangle_forward(p, out);
    else
      sweep_forward(p, out, stride);
  });
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
    return forward(Pairing<T>(query, key, query_labels, key_labels, kinds, ignore_index, temperature, normalize, across),
                   query);
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

// value = sum_i weight_i (lse_i - s_{i, positive(i)}) with both gradients in the same pass: a row strip of S lives long
// enough for its log-sum-exp, its weights and both products, so S is never computed again.
std::tuple<Tensor, Tensor, Tensor> info_nce_sum_cpu(const Tensor& query, const Tensor& key,
                                                    const OptionalTensor& positives, const Tensor& weight,
                                                    double temperature, bool normalize, bool across, bool need_query,
                                                    bool need_key) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const int64_t L = query.size(2), key_length = key.size(2);
    const OptionalTensor labels =
        positives.has_value() ? OptionalTensor(torch::stable::unsqueeze(*positives, 0)) : std::nullopt;
    // positives mark the anchors: -1 leaves a row out; as labels they are never compared (kind "all")
    const Pairing<T> pairs(query, key, labels, std::nullopt, "all", -1, temperature, normalize, across);
    const int64_t* chosen = positives.has_value() ? static_cast<const int64_t*>(positives->const_data_ptr()) : nullptr;
    const T* w_all = row_values<T>(weight, query.size(0) * L);
    GradientPair<T> out(pairs, query, key, need_query, need_key);
    std::vector<double> value(pairs.groups(), 0.0);
    each_group(pairs.groups(), [&](int64_t group) {
      const Problem<T> p = pairs.problem(group);
      const int64_t n = p.query.rows.n;
      Buffer<T> g(n);
      Buffer<int64_t> positive(n);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = p.query.slot[i], l = chosen ? chosen[at] : at % L;
        g.get()[i] = w_all[at];
        positive.get()[i] = across ? at / L * key_length + l : l;
      }
      StripTask<T> task;
      task.g = g.get();
      task.positive = positive.get();
      task.value = &value[group];
      const RowsOut d_query = out.query(pairs, group), d_key = out.key(pairs, group);
      strip_gradient(p, task, need_query ? &d_query : nullptr, need_key ? &d_key : nullptr);
    });
    double total = 0;
    for (double v : value) total += v;
    Tensor result = per_row(query, {});
    *static_cast<T*>(result.mutable_data_ptr()) = static_cast<T>(total);
    auto gradients = out.tensors();
    return std::make_tuple(result, std::get<0>(gradients), std::get<1>(gradients));
  });
}

}  // namespace medcl
