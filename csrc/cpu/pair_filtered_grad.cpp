// Gradients through selected pairs: where they are many, all tiles again with the others masked out; where they are
// few, a list of them. And the similarities of listed pairs.
#include "cpu/class_sums.h"
#include "cpu/pair_filter.h"

namespace medcl {
namespace {

// ---- the rule: R > threshold, or R = threshold and i * N + j <= cut

template <class T>
struct Rule {
  std::vector<T> limit, negative_limit;  // per packed anchor
  const int64_t* cut;                    // per cell
};

template <class T>
Rule<T> rule_of(const PairFilter<T>& f, const T* threshold, const int64_t* cut) {
  const int64_t n = f.pairs.query.count();
  Rule<T> rule{std::vector<T>(n + kSpare, T(0)), std::vector<T>(n + kSpare, T(0)), cut};
  for (int64_t i = 0; i < n; ++i) {
    rule.limit[i] = threshold[f.cell(i, true)];
    rule.negative_limit[i] = threshold[f.cell(i, false)];
  }
  return rule;
}

// The weights of one tile: w_ij = sum over the directions of up_anchor G where the pair is selected.
template <class T>
void tile_weights(const PairFilter<T>& f, const Rule<T>& rule, const Problem<T>& p, int64_t group, const T* up,
                  int64_t i0, int64_t m, int64_t j0, int64_t w, T* s, T* weight) {
  const auto& kernels = filter_kernels<T>();
  auto& room = PairFilter<T>::arrays(w);
  const int64_t row0 = f.pairs.query.begin[group], col0 = f.pairs.key().begin[group];
  std::fill_n(weight, m * w, T(0));
  for (int64_t i = 0; i < m; ++i) {
    T* to = weight + i * w;
    f.evaluate(p, group, i0 + i, j0, w, s + i * w, p.self && i0 != j0, room, [&](const PairRow<T>& x) {
      const int64_t first = row0 + (x.mirrored ? j0 : i0 + i);
      T own[3] = {up[first], rule.limit[first], rule.negative_limit[first]};
      const bool ties = x.mirrored ? kernels.select(x.g, x.r, w, up + first, rule.limit.data() + first,
                                                    rule.negative_limit.data() + first, 1, x.positive, to)
                                   : kernels.select(x.g, x.r, w, own, own + 1, own + 2, 0, x.positive, to);
      for (int64_t j = 0; ties && j < w; ++j) {
        const int64_t anchor = row0 + (x.mirrored ? j0 + j : i0 + i), other = col0 + (x.mirrored ? i0 + i : j0 + j);
        const T limit = x.positive[j] ? rule.limit[anchor] : rule.negative_limit[anchor];
        if (x.r[j] == limit && x.r[j] > T(0) && f.place(anchor, other) <= rule.cut[f.cell(anchor, x.positive[j] != 0)])
          to[j] += up[anchor] * x.g[j];
      }
    });
  }
}

template <class T>
std::tuple<Tensor, Tensor> masked_gradient(const PairFilter<T>& f, const Rule<T>& rule, const T* d_value,
                                           const Tensor& query, const OptionalTensor& key, bool need_query,
                                           bool need_key) {
  GradientPair<T> out(f.pairs, query, key, need_query, need_key);
  const int64_t n_all = f.pairs.query.count();
  Buffer<T> up(n_all + kSpare);
  for (int64_t i = 0; i < n_all; ++i) up.get()[i] = d_value[f.pairs.query.slot[i]];
  std::fill_n(up.get() + n_all, kSpare, T(0));
  const bool to_query = need_query, to_key = need_key && !f.pairs.self;
  each_group(f.pairs.groups(), [&](int64_t group) {
    const Problem<T> problem = f.pairs.problem(group);
    const int64_t n = problem.query.rows.n, keys = problem.key.rows.n, dim = problem.query.rows.dim;
    if (n == 0 || keys == 0) return;
    Buffer<T> query_sum(to_query ? n * dim : 0), key_sum(to_key ? keys * dim : 0);
    if (to_query) std::fill_n(query_sum.get(), n * dim, T(0));
    if (to_key) std::fill_n(key_sum.get(), keys * dim, T(0));
    T* column_sum = f.pairs.self ? query_sum.get() : key_sum.get();
    const bool columns = f.pairs.self ? to_query : to_key;
    f.tiles(group, [&](const Problem<T>& p, int64_t i0, int64_t m, int64_t j0, int64_t w, T* s) {
      T* weight = scratch<T>(kSums, m * w);
      tile_weights(f, rule, p, group, up.get(), i0, m, j0, w, s, weight);
      if (to_query) {
        const Tile<T> y = p.key.pack(j0, w, scratch<T>(kOther, w * dim), Layout::row_major);
        gemm<T>(m, dim, w, T(1), weight, w, 1, y.data, y.row, y.col, T(1), query_sum.get() + i0 * dim, dim);
      }
      if (columns) {
        const Tile<T> x = p.query.pack(i0, m, scratch<T>(kExtra, m * dim), Layout::row_major);
        gemm<T>(w, dim, m, T(1), weight, 1, w, x.data, x.row, x.col, T(1), column_sum + j0 * dim, dim);
      }
    });
    auto finish = [&](const Side<T>& side, T* sum, const RowsOut& to) {
      parallel(ceil_div(side.rows.n, kRows), [&](int64_t block) {
        const int64_t first = block * kRows, count = std::min(kRows, side.rows.n - first);
        finish_gradient(sum + first * dim, dim, side, first, count, problem.alpha, to);
      });
    };
    if (to_query) finish(problem.query, query_sum.get(), out.query(f.pairs, group));
    if (to_key) finish(problem.key, key_sum.get(), out.key(f.pairs, group));
  });
  return out.tensors();
}

// ---- lists

// All rows of both tensors, packed; rows are named by b * L + l.
template <class T>
struct Listed {
  Pairing<T> pairs;
  Buffer<T> query_rows, key_rows;

  Listed(const Tensor& query, const OptionalTensor& key, double temperature, bool normalize)
      : pairs(query, key, std::nullopt, std::nullopt, "all", -1, temperature, normalize, /*across=*/true) {
    pack(pairs.query.side(0), query_rows);
    if (!pairs.self) pack(pairs.key().side(0), key_rows);
  }
  const T* query(int64_t i) const { return query_rows.get() + i * dim(); }
  const T* key(int64_t j) const { return (pairs.self ? query_rows : key_rows).get() + j * dim(); }
  int64_t dim() const { return pairs.query.rows.dim; }
  int64_t rows() const { return pairs.query.count(); }
  int64_t keys() const { return pairs.key().count(); }

  void check(const int64_t* anchor, const int64_t* candidate, int64_t n) const {
    for (int64_t e = 0; e < n; ++e)
      if (anchor[e] >= 0)
        STD_TORCH_CHECK(anchor[e] < rows() && candidate[e] >= 0 && candidate[e] < keys(), "medcl: pair ", e, " is (",
                        anchor[e], ", ", candidate[e], "), outside of ", rows(), " anchors and ", keys(),
                        " candidates");
  }

 private:
  static void pack(const Side<T>& side, Buffer<T>& to) {
    const int64_t dim = side.rows.dim;
    to.reserve(side.rows.n * dim);
    parallel(ceil_div(side.rows.n, kRows), [&](int64_t block) {
      const int64_t first = block * kRows, n = std::min(kRows, side.rows.n - first);
      side.pack(first, n, to.get() + first * dim, Layout::row_major);
    });
  }
};

// The entries of a list by row: those of row i are at[first[i]] ... in the order of the list.
struct ByRow {
  std::vector<int64_t> first, at;
  ByRow(const int64_t* row, const int64_t* anchor, int64_t n, int64_t rows) : first(rows + 1, 0) {
    for (int64_t e = 0; e < n; ++e)
      if (anchor[e] >= 0) ++first[row[e] + 1];
    for (int64_t i = 0; i < rows; ++i) first[i + 1] += first[i];
    at.resize(first[rows]);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t e = 0; e < n; ++e)
      if (anchor[e] >= 0) at[next[row[e]]++] = e;
  }
};

// Gradients of v = sum_e weight_e s_e over a list.
template <class T>
std::tuple<Tensor, Tensor> listed_gradient(const Tensor& query, const OptionalTensor& key, const int64_t* anchor,
                                           const int64_t* candidate, const T* weight, int64_t n, double temperature,
                                           bool normalize, bool need_query, bool need_key) {
  const Listed<T> listed(query, key, temperature, normalize);
  listed.check(anchor, candidate, n);
  const Pairing<T>& pairs = listed.pairs;
  GradientPair<T> out(pairs, query, key, need_query, need_key);
  const int64_t dim = listed.dim();
  const auto& kernels = tile_kernels<T>();
  const bool by_candidate = pairs.self ? need_query : need_key;
  const ByRow own(anchor, anchor, need_query ? n : 0, listed.rows());
  const ByRow others(candidate, anchor, by_candidate ? n : 0, listed.keys());
  auto gradient = [&](const Side<T>& side, bool as_anchor, bool as_candidate, const RowsOut& to) {
    parallel(ceil_div(side.rows.n, kRows), [&](int64_t block) {
      const int64_t i0 = block * kRows, m = std::min(kRows, side.rows.n - i0);
      T* sum = scratch<T>(kSums, m * dim);
      std::fill_n(sum, m * dim, T(0));
      for (int64_t i = 0; i < m; ++i) {
        T* row = sum + i * dim;
        if (as_anchor)
          for (int64_t k = own.first[i0 + i]; k < own.first[i0 + i + 1]; ++k)
            kernels.add_row(row, listed.key(candidate[own.at[k]]), dim, weight[own.at[k]]);
        if (as_candidate)
          for (int64_t k = others.first[i0 + i]; k < others.first[i0 + i + 1]; ++k)
            kernels.add_row(row, listed.query(anchor[others.at[k]]), dim, weight[others.at[k]]);
      }
      finish_gradient(sum, dim, side, i0, m, pairs.alpha, to);
    });
  };
  if (need_query) gradient(pairs.query.side(0), true, pairs.self, out.query(pairs, 0));
  if (need_key && !pairs.self) gradient(pairs.key().side(0), false, true, out.key(pairs, 0));
  return out.tensors();
}

const int64_t* indices(const Tensor& x, int64_t n) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.numel() == n,
                  "medcl: lists of pairs must be contiguous int64 of one length");
  return static_cast<const int64_t*>(x.const_data_ptr());
}

}  // namespace

Tensor pair_filtered_grad_cpu(const Tensor&, const OptionalTensor&, const Tensor& value, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, std::string, std::string, std::string, int64_t, double, bool,
                              bool) {
  return torch::stable::clone(value);
}

std::tuple<Tensor, Tensor> pair_filtered_grad_backward_cpu(
    const Tensor& d_value, const Tensor& query, const OptionalTensor& key, const Tensor& value,
    const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& positives,
    const Tensor& statistics, const OptionalTensor& threshold, const OptionalTensor& cut, const OptionalTensor& anchor,
    const OptionalTensor& candidate, const OptionalTensor& gradient, std::string form, std::string score,
    std::string scope, int64_t ignore_index, double temperature, bool normalize, bool across, bool need_query,
    bool need_key) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const T* up = row_values<T>(d_value, value.numel());
    if (anchor.has_value()) {
      STD_TORCH_CHECK(candidate.has_value() && gradient.has_value(),
                      "medcl: a list of pairs is anchor, candidate and gradient");
      const int64_t n = anchor->numel();
      const int64_t *i = indices(*anchor, n), *j = indices(*candidate, n);
      const T* g = row_values<T>(*gradient, n);
      Buffer<T> weight(n);
      for (int64_t e = 0; e < n; ++e) {
        STD_TORCH_CHECK(i[e] < value.numel(), "medcl: pair ", e, " has anchor ", i[e], " of ", value.numel());
        weight.get()[e] = i[e] < 0 ? T(0) : up[i[e]] * g[e];
      }
      return listed_gradient<T>(query, key, i, j, weight.get(), n, temperature, normalize, need_query, need_key);
    }
    STD_TORCH_CHECK(threshold.has_value() && cut.has_value(), "medcl: a selection is a rule or a list");
    PairFilter<T> filter(query, key, query_labels, key_labels, positives, statistics, form, score, scope, ignore_index,
                         temperature, normalize, across);
    STD_TORCH_CHECK(threshold->dim() == 2 && threshold->size(0) <= 2 && threshold->size(1) == filter.units,
                    "medcl: threshold must be (1 or 2, ", filter.units, ")");
    filter.classes = threshold->size(0);
    const T* limit = row_values<T>(*threshold, filter.cells());
    const Rule<T> rule = rule_of(filter, limit, indices(*cut, filter.cells()));
    return masked_gradient<T>(filter, rule, up, query, key, need_query, need_key);
  });
}

Tensor pair_at_cpu(const Tensor& query, const OptionalTensor& key, const Tensor& anchor, const Tensor& candidate,
                   double temperature, bool normalize) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const Listed<T> listed(query, key, temperature, normalize);
    const int64_t n = anchor.numel(), dim = listed.dim();
    const int64_t *i = indices(anchor, n), *j = indices(candidate, n);
    listed.check(i, j, n);
    Tensor out = per_row(query, {n});
    T* to = static_cast<T*>(out.mutable_data_ptr());
    constexpr int64_t grain = 4096;
    parallel(ceil_div(n, grain), [&](int64_t block) {
      const auto& kernels = tile_kernels<T>();
      for (int64_t e = block * grain; e < std::min(n, (block + 1) * grain); ++e)
        to[e] = i[e] < 0 ? T(0)
                         : static_cast<T>(listed.pairs.alpha * kernels.dot(listed.query(i[e]), listed.key(j[e]), dim));
    });
    return out;
  });
}

std::tuple<Tensor, Tensor> pair_at_backward_cpu(const Tensor& d_at, const Tensor& query, const OptionalTensor& key,
                                                const Tensor& anchor, const Tensor& candidate, double temperature,
                                                bool normalize, bool need_query, bool need_key) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const int64_t n = anchor.numel();
    return listed_gradient<T>(query, key, indices(anchor, n), indices(candidate, n), row_values<T>(d_at, n), n,
                              temperature, normalize, need_query, need_key);
  });
}

}  // namespace medcl
