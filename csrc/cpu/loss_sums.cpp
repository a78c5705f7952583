// Sums of a whole loss whose gradient is known up to a factor, so that it is made in the forward pass.
#include "cpu/class_sums.h"
#include "cpu/logsumexp.h"

namespace medcl {
namespace {

template <class T>
Tensor scalar(const Tensor& like, double value) {
  Tensor out = per_row(like, {});
  *static_cast<T*>(out.mutable_data_ptr()) = static_cast<T>(value);
  return out;
}

// What one group adds to the loss and to the number of anchors.
struct Part {
  double value = 0;
  int64_t anchors = 0;
};

template <class T>
std::tuple<Tensor, Tensor> totals(const Tensor& like, const std::vector<Part>& parts) {
  Part all;
  for (const Part& part : parts) {
    all.value += part.value;
    all.anchors += part.anchors;
  }
  return {scalar<T>(like, all.value), scalar<T>(like, static_cast<double>(std::max<int64_t>(all.anchors, 1)))};
}

// sum_i lse_i - mean_i over the anchors of one group that have a positive.
template <class T>
Part supervised_group(const Pairing<T>& pairs, int64_t group, T* lse_all, const RowsOut* d_query) {
  const Problem<T> p = pairs.problem(group);
  const Side<T> side = pairs.query.side(group);
  const int64_t n = side.rows.n, dim = side.rows.dim;
  const auto& kernels = tile_kernels<T>();
  // groups may run side by side; the share depends on shapes alone, for a tile made again may differ in its last bits
  const int64_t share = kStore / std::min<int64_t>(pairs.groups(), 4);
  const KeptTiles<T> kept(n, triangle_block(n), d_query && p.plain() ? share : 0);
  forward_group(p, lse_all, int64_t{0}, &kept);
  const ClassSums<T> sums(side, pairs.codes, nullptr);
  auto positives = [&](int64_t i) { return sums.count[0][side.code[i]] - 1; };
  Buffer<T> g(n), lse(n);
  Buffer<double> value(n);
  each_tile(side, [&](int64_t i0, int64_t m, const Tile<T>& z) {
    for (int64_t i = i0; i < i0 + m; ++i) {
      lse.get()[i] = lse_all[side.slot[i]];
      g.get()[i] = T(positives(i) > 0);
      value.get()[i] = 0;
      if (positives(i) == 0) {
        lse.get()[i] = T(0);  // it may be -inf, and 0 times its exp must stay 0
        continue;
      }
      const T* zi = z.data + (i - i0) * dim;
      const double pull = kernels.dot(zi, sums.sum[0].get() + side.code[i] * dim, dim) - kernels.dot(zi, zi, dim);
      value.get()[i] = lse.get()[i] - pairs.alpha * pull / positives(i);
    }
  });
  Part part;
  for (int64_t i = 0; i < n; ++i) {
    part.value += value.get()[i];
    part.anchors += positives(i) > 0;
  }
  if (!d_query) return part;
  // the class terms of both roles of z_i: every member of a class has the same number of positives
  auto adjust = [&](T* acc, int64_t i, const T* zi) {
    if (positives(i) == 0) return;
    const T w = T(2) / static_cast<T>(positives(i));
    kernels.add_row(acc, sums.sum[0].get() + side.code[i] * dim, dim, -w);
    kernels.add_row(acc, zi, dim, w);
  };
  if (p.plain())
    triangle_backward(p, g.get(), lse.get(), *d_query, adjust, &kept);
  else
    symmetric_gradient<T>(p, g.get(), lse.get(), kernels.softmax_weights, *d_query, adjust);
  return part;
}

}  // namespace

// sum over anchors of lse_i - mean over its positives, a tensor against itself, one label map
std::tuple<Tensor, Tensor, Tensor> supervised_sum_cpu(const Tensor& query, const Tensor& labels, int64_t ignore_index,
                                                      double temperature, bool normalize, bool across,
                                                      bool need_query) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const Pairing<T> pairs(query, std::nullopt, labels, std::nullopt, "all", ignore_index, temperature, normalize,
                           across, true);
    GradientPair<T> out(pairs, query, std::nullopt, need_query, false);
    Buffer<T> lse(query.size(0) * query.size(2));
    std::vector<Part> parts(pairs.groups());
    each_group(pairs.groups(), [&](int64_t group) {
      const RowsOut d_query = out.query(pairs, group);
      parts[group] = supervised_group(pairs, group, lse.get(), need_query ? &d_query : nullptr);
    });
    const auto [value, anchors] = totals<T>(query, parts);
    return std::make_tuple(value, anchors, std::get<0>(out.tensors()));
  });
}

// sum over anchors of weight_i (lse_i - s_{i, positive(i)}) with both gradients in the same pass: a row strip of S
// lives long enough for its log-sum-exp, its weights and both products, so S is never computed again
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_sum_cpu(const Tensor& query, const Tensor& key,
                                                            const OptionalTensor& positives,
                                                            const OptionalTensor& weight, double temperature,
                                                            bool normalize, bool across, bool need_query,
                                                            bool need_key) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const int64_t L = query.size(2), key_length = key.size(2);
    const OptionalTensor labels =
        positives.has_value() ? OptionalTensor(torch::stable::unsqueeze(*positives, 0)) : std::nullopt;
    // positives mark the anchors: -1 leaves a row out; as labels they are never compared (kind "all")
    const Pairing<T> pairs(query, key, labels, std::nullopt, "all", -1, temperature, normalize, across);
    const int64_t* chosen = positives.has_value() ? static_cast<const int64_t*>(positives->const_data_ptr()) : nullptr;
    const T* w = weight.has_value() ? row_values<T>(*weight, query.size(0) * L) : nullptr;
    GradientPair<T> out(pairs, query, key, need_query, need_key);
    std::vector<Part> parts(pairs.groups());
    each_group(pairs.groups(), [&](int64_t group) {
      const Problem<T> p = pairs.problem(group);
      const int64_t n = p.query.rows.n;
      Buffer<T> g(n);
      Buffer<int64_t> positive(n);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = p.query.slot[i], l = chosen ? chosen[at] : at % L;
        g.get()[i] = w ? w[at] : T(1);
        positive.get()[i] = across ? at / L * key_length + l : l;
      }
      StripTask<T> task;
      task.g = g.get();
      task.positive = positive.get();
      task.value = &parts[group].value;
      parts[group].anchors = n;
      const RowsOut d_query = out.query(pairs, group), d_key = out.key(pairs, group);
      strip_gradient(p, task, need_query ? &d_query : nullptr, need_key ? &d_key : nullptr);
    });
    const auto [value, anchors] = totals<T>(query, parts);
    const auto [d_query, d_key] = out.tensors();
    return std::make_tuple(value, anchors, d_query, d_key);
  });
}

// The way back of both: gradients that are known up to the factor g.
std::tuple<Tensor, Tensor> scale_gradients_cpu(const Tensor& g, const Tensor& d_query, const Tensor& d_key) {
  auto scaled = [&](const Tensor& x) {
    Tensor y = torch::stable::empty_like(x);
    const double factor = g.scalar_type() == ScalarType::Double ? *static_cast<const double*>(g.const_data_ptr())
                                                                : *static_cast<const float*>(g.const_data_ptr());
    constexpr int64_t grain = 16384;
    const int64_t n = x.numel();
    parallel(ceil_div(n, grain), [&](int64_t i) {
      const int64_t first = i * grain, m = std::min(grain, n - first);
      if (x.scalar_type() == ScalarType::Double)
        tile_kernels<double>().scale(x.const_data_ptr(), y.mutable_data_ptr(), dtype_of(x), first, m, factor);
      else
        tile_kernels<float>().scale(x.const_data_ptr(), y.mutable_data_ptr(), dtype_of(x), first, m,
                                    static_cast<float>(factor));
    });
    return y;
  };
  return {scaled(d_query), scaled(d_key)};
}

}  // namespace medcl
