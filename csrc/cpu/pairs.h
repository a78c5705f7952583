// The CPU operations, and the gradient passes that several of them share.
#pragma once
#include <tuple>

#include "cpu/problem.h"

namespace medcl {

Tensor pair_logsumexp_cpu(const Tensor& query, const OptionalTensor& key, const OptionalTensor& query_labels,
                          const OptionalTensor& key_labels, std::string kinds, int64_t ignore_index, double temperature,
                          bool normalize, bool across);
std::tuple<Tensor, Tensor> pair_logsumexp_backward_cpu(const Tensor& d_lse, const Tensor& lse, const Tensor& query,
                                                       const OptionalTensor& key, const OptionalTensor& query_labels,
                                                       const OptionalTensor& key_labels, std::string kinds,
                                                       int64_t ignore_index, double temperature, bool normalize,
                                                       bool across, bool need_query, bool need_key);
std::tuple<Tensor, Tensor, Tensor> supervised_sum_cpu(const Tensor& query, const Tensor& labels, int64_t ignore_index,
                                                      double temperature, bool normalize, bool across, bool need_query);
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_sum_cpu(const Tensor& query, const Tensor& key,
                                                            const OptionalTensor& positives,
                                                            const OptionalTensor& weight, double temperature,
                                                            bool normalize, bool across, bool need_query,
                                                            bool need_key);
std::tuple<Tensor, Tensor> scale_gradients_cpu(const Tensor& g, const Tensor& d_query, const Tensor& d_key);
std::tuple<Tensor, Tensor> pair_positive_log_cpu(const Tensor& query, const OptionalTensor& key,
                                                 const Tensor& query_labels, const OptionalTensor& key_labels,
                                                 const Tensor& lse_negative, int64_t ignore_index, double temperature,
                                                 bool normalize, bool across);
std::tuple<Tensor, Tensor> pair_positive_log_backward_cpu(const Tensor& d_sum, const Tensor& query,
                                                          const OptionalTensor& key, const Tensor& query_labels,
                                                          const OptionalTensor& key_labels, const Tensor& lse_negative,
                                                          int64_t ignore_index, double temperature, bool normalize,
                                                          bool across, bool need_query, bool need_key);
std::tuple<Tensor, Tensor> pair_argmax_cpu(const Tensor& query, const Tensor& key, bool normalize);
std::tuple<Tensor, Tensor> positive_mean_cpu(const Tensor& query, const OptionalTensor& key, const Tensor& query_labels,
                                             const OptionalTensor& key_labels, int64_t ignore_index, double temperature,
                                             bool normalize, bool across);
std::tuple<Tensor, Tensor> positive_mean_backward_cpu(const Tensor& d_mean, const Tensor& query,
                                                      const OptionalTensor& key, const Tensor& query_labels,
                                                      const OptionalTensor& key_labels, int64_t ignore_index,
                                                      double temperature, bool normalize, bool across, bool need_query,
                                                      bool need_key);
Tensor positive_at_cpu(const Tensor& query, const Tensor& key, const Tensor& positives, double temperature,
                       bool normalize);
std::tuple<Tensor, Tensor> positive_at_backward_cpu(const Tensor& d_out, const Tensor& query, const Tensor& key,
                                                    const Tensor& positives, double temperature, bool normalize,
                                                    bool need_query, bool need_key);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_topk_cpu(
    const Tensor& query, const OptionalTensor& key, const OptionalTensor& query_labels,
    const OptionalTensor& key_labels, const OptionalTensor& positives, const Tensor& statistics, const Tensor& k,
    int64_t capacity, std::string form, std::string score, std::string scope, int64_t ignore_index, double temperature,
    bool normalize, bool across);
Tensor pair_filtered_grad_cpu(const Tensor& query, const OptionalTensor& key, const Tensor& value,
                              const OptionalTensor& query_labels, const OptionalTensor& key_labels,
                              const OptionalTensor& positives, const Tensor& statistics,
                              const OptionalTensor& threshold, const OptionalTensor& cut, const OptionalTensor& anchor,
                              const OptionalTensor& candidate, const OptionalTensor& gradient, std::string form,
                              std::string score, std::string scope, int64_t ignore_index, double temperature,
                              bool normalize, bool across);
std::tuple<Tensor, Tensor> pair_filtered_grad_backward_cpu(
    const Tensor& d_value, const Tensor& query, const OptionalTensor& key, const Tensor& value,
    const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& positives,
    const Tensor& statistics, const OptionalTensor& threshold, const OptionalTensor& cut, const OptionalTensor& anchor,
    const OptionalTensor& candidate, const OptionalTensor& gradient, std::string form, std::string score,
    std::string scope, int64_t ignore_index, double temperature, bool normalize, bool across, bool need_query,
    bool need_key);
Tensor pair_at_cpu(const Tensor& query, const OptionalTensor& key, const Tensor& anchor, const Tensor& candidate,
                   double temperature, bool normalize);
std::tuple<Tensor, Tensor> pair_at_backward_cpu(const Tensor& d_at, const Tensor& query, const OptionalTensor& key,
                                                const Tensor& anchor, const Tensor& candidate, double temperature,
                                                bool normalize, bool need_query, bool need_key);
Tensor mitigate_rows_cpu(const Tensor& gradients, const Tensor& order, std::string method, std::string unit,
                         std::string reduction, double strength, bool rows_first);

constexpr double kLn2 = 0.69314718055994530942;

// d_query and d_key in the layout and dtype of their inputs; an empty tensor where no gradient is asked for.
template <class T>
class GradientPair {
 public:
  GradientPair(const Pairing<T>& pairs, const Tensor& query, const OptionalTensor& key, bool need_query, bool need_key)
      : d_query_(need_query ? gradient_like(query, pairs.query.partial || one_sided(pairs)) : none(query)),
        d_key_(need_key && key.has_value() ? gradient_like(*key, pairs.key().partial || one_sided(pairs))
                                           : none(query)) {
    if (need_query) query_out_ = pairs.query.out(d_query_, query_offset_);
    if (need_key && key.has_value()) key_out_ = pairs.key().out(d_key_, key_offset_);
  }
  RowsOut query(const Pairing<T>& pairs, int64_t g) const { return shifted(query_out_, pairs.query.begin[g]); }
  RowsOut key(const Pairing<T>& pairs, int64_t g) const { return shifted(key_out_, pairs.key().begin[g]); }
  std::tuple<Tensor, Tensor> tensors() const { return {d_query_, d_key_}; }

 private:
  // some group has anchors without candidates or candidates without anchors: nobody writes their gradient
  static bool one_sided(const Pairing<T>& pairs) {
    for (int64_t g = 0; g < pairs.groups(); ++g)
      if (pairs.query.side(g).rows.n == 0 || pairs.key().side(g).rows.n == 0) return true;
    return false;
  }
  static Tensor none(const Tensor& like) { return torch::stable::new_empty(like, std::vector<int64_t>{0}); }
  Tensor d_query_, d_key_;
  RowsOut query_out_, key_out_;
  std::vector<int64_t> query_offset_, key_offset_;
};

template <class T>
using WeightKernel = void (*)(T*, int64_t, int64_t, int64_t, const Selection&, const T*, const T*, const T*, const T*);

// A tensor against itself with any selections: W_ij + W_ji in one row-owned sweep (label tests are symmetric).
template <class T, class Adjust = NoAdjustment>
void symmetric_gradient(const Problem<T>& p, const T* g, const T* stat, WeightKernel<T> weights, const RowsOut& out,
                        const Adjust& adjust = {}) {
  Problem<T> q = p;
  q.query.code_stride = q.key.code_stride = p.query.rows.n;
  const std::vector<int32_t> codes = compact_codes(p.query, p.selections);
  q.query.code = q.key.code = codes.empty() ? nullptr : codes.data();
  owned_gradient<T>(
      p.query, p.key, true, p.alpha, out,
      [&](T* s, int64_t ld, int64_t m, int64_t n, int64_t i0, int64_t j0) {
        weights(s, ld, m, n, q.selection(q.query, i0, q.key, j0), g + i0, stat + i0, g + j0, stat + j0);
      },
      adjust);
}

// Two tensors with any selections: each side owns its rows and recomputes S.
template <class T>
void two_sided_gradient(const Problem<T>& p, const T* g, const T* stat, WeightKernel<T> weights, const RowsOut* d_query,
                        const RowsOut* d_key) {
  Problem<T> q = p;
  const std::vector<int32_t> row_codes = compact_codes(p.query, p.selections);
  const std::vector<int32_t> col_codes = compact_codes(p.key, p.selections);
  q.query.code = row_codes.empty() ? nullptr : row_codes.data();
  q.key.code = col_codes.empty() ? nullptr : col_codes.data();
  q.query.code_stride = p.query.rows.n;
  q.key.code_stride = p.key.rows.n;
  const int64_t S = p.selections, keys = p.key.rows.n;
  if (d_query)
    owned_gradient<T>(p.query, p.key, false, p.alpha, *d_query,
                      [&](T* s, int64_t ld, int64_t m, int64_t n, int64_t i0, int64_t j0) {
                        weights(s, ld, m, n, q.selection(q.query, i0, q.key, j0), g + i0, stat + i0, nullptr, nullptr);
                      });
  if (!d_key) return;
  // the anchors are the columns now: no row terms
  Buffer<T> zero(S * keys);
  std::fill_n(zero.get(), S * keys, T(0));
  owned_gradient<T>(
      p.key, p.query, false, p.alpha, *d_key, [&](T* s, int64_t ld, int64_t m, int64_t n, int64_t i0, int64_t j0) {
        weights(s, ld, m, n, q.selection(q.key, i0, q.query, j0), zero.get() + i0, zero.get() + i0, g + j0, stat + j0);
      });
}

// The tile of exponentials between channel-major rows a and b, relative to 1 / temperature; its sums and outputs are
// still to be named.
template <class T>
ExpTile<T> exponentials(const Problem<T>& p, const Tile<T>& a, int64_t m, const Tile<T>& b, int64_t n) {
  ExpTile<T> e;
  e.m = m;
  e.n = n;
  e.dim = p.query.rows.dim;
  e.a = a;
  e.b = b;
  e.alpha = p.binary();
  e.normal = p.plain();
  e.work = scratch<T>(kWork, ExpTile<T>::work_size(m, e.dim));
  return e;
}

template <class T>
struct StripTask {
  const T* g = nullptr;               // upstream gradient of each row's lse (packed order)
  const T* lse = nullptr;             // null: computed here
  const int64_t* positive = nullptr;  // packed key row whose similarity is subtracted; null: none
  double* value = nullptr;            // sum_i g_i (lse_i - s_i,positive)
};

template <class T>
void load_row(const Side<T>& side, int64_t r, T* out) {
  side.pack(r, 1, out, Layout::row_major);
}

// Scattered rows of one side, row-major. A channel-major source is read channel by channel, each a short stretch of
// memory that stays in cache, and turned afterwards: row by row every element would be a cache miss.
template <class T>
struct Picked {
  std::vector<int64_t> offset, step;
  std::vector<double> inverse;
  Buffer<T> channels, rows;
};
template <class T>
const T* gather_rows(const Side<T>& side, const int64_t* index, int64_t n, Picked<T>& to) {
  const int64_t dim = side.rows.dim;
  to.offset.resize(n);
  to.inverse.resize(n);
  for (int64_t r = 0; r < n; ++r) {
    to.offset[r] = side.rows.offset[index[r]];
    to.inverse[r] = side.inverse ? side.inverse[index[r]] : 1.0;
  }
  Rows picked = side.rows;
  picked.offset = to.offset.data();
  picked.n = n;
  const auto& kernels = tile_kernels<T>();
  const Tile<T> tile = kernels.pack(picked, 0, n, to.inverse.data(), side.natural(), to.channels.reserve(n * dim));
  if (tile.col == 1) return tile.data;
  to.step.resize(n);
  for (int64_t r = 0; r < n; ++r) to.step[r] = r;
  Rows turned;
  turned.data = tile.data;
  turned.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  turned.stride_d = n;
  turned.n = n;
  turned.dim = dim;
  turned.offset = to.step.data();
  return kernels.pack(turned, 0, n, nullptr, Layout::row_major, to.rows.reserve(n * dim)).data;
}

// Both gradients of two tensors from one S: strips of R rows against all columns.
template <class T>
void strip_gradient(const Problem<T>& p, const StripTask<T>& task, const RowsOut* d_query, const RowsOut* d_key) {
  const auto& kernels = tile_kernels<T>();
  const int64_t n = p.query.rows.n, keys = p.key.rows.n, dim = p.query.rows.dim;
  if (n == 0 || keys == 0) return;
  // a strip is kept until both products are made: 144 rows measured best of 96 to 512 (D = 64), fewer where that many
  // would leave the last-level cache
  const int64_t fit = std::max<int64_t>(48, kStore / static_cast<int64_t>(sizeof(T)) / keys / 16 * 16);
  const int64_t R = block_size(n, std::min<int64_t>(144, fit), 144);
  const int64_t chunks = ceil_div(keys, kColumns);
  // columns are shared out in a fixed number of parts, each with its own partial sums, added in order
  const int64_t parts = std::min<int64_t>(chunks, 16);
  const bool plain = p.plain();

  const Tiles<T> tiles(p.key, kColumns, d_query != nullptr);
  const int64_t ld_most = ExpTile<T>::padded(std::min(keys, kColumns));
  Buffer<T> strip(R * chunks * ld_most), packed(R * dim), turned(R * dim), scaled(R * dim),
      partial(d_query ? parts * R * dim : 0);
  T* direct = d_key ? direct_rows<T>(*d_key, keys) : nullptr;
  Buffer<T> held(d_key && !direct ? keys * dim : 0), shift(R), maxima(parts * R), row_weight(R);
  T* acc = direct ? direct : held.get();
  Buffer<double> sums(parts * R);
  if (d_key)
    parallel(chunks, [&](int64_t c) {
      std::fill_n(acc + c * kColumns * dim, std::min(kColumns, keys - c * kColumns) * dim, T(0));
    });
  double value = 0;
  Picked<T> picked;

  for (int64_t i0 = 0; i0 < n; i0 += R) {
    const int64_t m = std::min(R, n - i0);
    const Tile<T> q = p.query.pack(i0, m, packed.get(), Layout::row_major);
    const Tile<T> own = p.query.pack(i0, m, turned.get(), Layout::channel_major);
    auto each_chunk = [&](auto&& f) {
      parallel(parts, [&](int64_t part) {
        for (int64_t c = part * chunks / parts; c < (part + 1) * chunks / parts; ++c) {
          const int64_t j0 = c * kColumns, w = std::min(kColumns, keys - j0);
          f(part, j0, w, strip.get() + c * m * ld_most, ExpTile<T>::padded(w));
        }
      });
    };
    // where exp is taken relative to: the row's lse if known, 1/temperature for unit rows, else the row's maximum
    for (int64_t i = 0; i < m; ++i) shift.get()[i] = task.lse ? static_cast<T>(task.lse[i0 + i] / kLn2) : p.binary();
    std::fill_n(sums.get(), parts * R, 0.0);
    const bool two_steps = !task.lse && !plain;
    // a strip leaves L2 while it is written: with many channels a product that stores S first is quicker there
    const bool fused = !two_steps && dim < 48;
    if (two_steps) std::fill_n(maxima.get(), parts * R, -std::numeric_limits<T>::infinity());
    each_chunk([&](int64_t part, int64_t j0, int64_t w, T* s, int64_t ld) {
      const Tile<T> k = tiles.channels(j0);
      if (fused) {
        ExpTile<T> e = exponentials(p, own, m, k, w);
        e.normal = e.normal && !task.lse;  // a given lse may lie above 1 / temperature
        e.shift = shift.get();
        e.shift_stride = 1;
        e.row_sum = sums.get() + part * R;
        e.out = s;
        e.ld = ld;
        kernels.exp_tile(e);
        return;
      }
      scores(q, m, k, w, dim, p.binary(), s, ld);
      if (two_steps)
        for (int64_t i = 0; i < m; ++i) {
          T& top = maxima.get()[part * R + i];
          top = std::max(top, kernels.row_maximum(s + i * ld, w));
        }
      else
        kernels.exp_rows(s, ld, m, w, shift.get(), sums.get() + part * R);
    });
    if (two_steps) {
      for (int64_t i = 0; i < m; ++i) {
        T top = maxima.get()[i];
        for (int64_t part = 1; part < parts; ++part) top = std::max(top, maxima.get()[part * R + i]);
        shift.get()[i] = top;
      }
      each_chunk([&](int64_t part, int64_t, int64_t w, T* s, int64_t ld) {
        kernels.exp_rows(s, ld, m, w, shift.get(), sums.get() + part * R);
      });
    }
    for (int64_t i = 0; i < m; ++i) {
      const T g = task.g[i0 + i];
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums.get()[part * R + i];
      // with a known lse the sum is 1 but for rounding, which low temperatures amplify: divide all the same
      row_weight.get()[i] = g == T(0) ? T(0) : static_cast<T>(g / total);
      value += g * (shift.get()[i] * kLn2 + std::log(total));
    }
    // W = diag(row_weight) E: the factor goes into the packed rows and into the finished sum, E stays as it is
    if (d_key) {
      std::copy_n(q.data, m * dim, scaled.get());
      for (int64_t i = 0; i < m; ++i) kernels.scale_row(scaled.get() + i * dim, dim, row_weight.get()[i]);
    }
    if (d_query) std::fill_n(partial.get(), parts * R * dim, T(0));
    if (d_query || d_key)
      each_chunk([&](int64_t part, int64_t j0, int64_t w, T* e, int64_t ld) {
        if (d_query) {
          const Tile<T> k = tiles.rows(j0);
          gemm<T>(m, dim, w, T(1), e, ld, 1, k.data, k.row, k.col, T(1), partial.get() + part * R * dim, dim);
        }
        if (d_key) gemm<T>(w, dim, m, T(1), e, 1, ld, scaled.get(), dim, 1, T(1), acc + j0 * dim, dim);
      });
    T* sum = partial.get();
    if (d_query) {
      for (int64_t part = 1; part < parts; ++part) kernels.add_row(sum, partial.get() + part * R * dim, m * dim, T(1));
      for (int64_t i = 0; i < m; ++i) kernels.scale_row(sum + i * dim, dim, row_weight.get()[i]);
    }
    if (task.positive) {
      const T* positives = gather_rows(p.key, task.positive + i0, m, picked);
      for (int64_t i = 0; i < m; ++i) {
        const T g = task.g[i0 + i];
        const T* k = positives + i * dim;
        value -= g * p.alpha * kernels.dot(q.data + i * dim, k, dim);
        if (d_query) kernels.add_row(sum + i * dim, k, dim, -g);
        if (d_key) kernels.add_row(acc + task.positive[i0 + i] * dim, q.data + i * dim, dim, -g);
      }
    }
    if (d_query) finish_gradient(sum, dim, p.query, i0, m, p.alpha, *d_query);
  }
  if (d_key)
    parallel(chunks, [&](int64_t c) {
      const int64_t j0 = c * kColumns;
      finish_gradient(acc + j0 * dim, dim, p.key, j0, std::min(kColumns, keys - j0), p.alpha, *d_key);
    });
  if (task.value) *task.value = value;
}

}  // namespace medcl
