// Pairs weighted by the affinity of their patches: log_z and linear of reference/pair_affinity.py, P patch sizes on one
// tile of similarities, and their gradient.
//   self, bounded exponents:  upper triangle only, since D and exp(Q t) are symmetric; 1u forward, 3u backward
//   two tensors:              row-owned sweep forward, strips of rows backward (S once for both gradients)
//   unbounded exponents:      running maxima forward, two exponentials a pair backward
#include "cpu/pairs.h"
#include "cpu/patch_kernels.h"
#include "cpu/patches.h"
#include "pairs/affinity.h"

namespace medcl {
namespace {

constexpr double kLog2e = 1.4426950408889634;

template <class T>
struct Affinity {
  Pairing<T> pairs;
  const T* row_shares;
  const T* col_shares;
  int64_t patches, classes, batch;
  bool swapped;
  T shift;       // times log2(e)
  bool bounded;  // no exponent leaves the range in which plain sums neither overflow nor vanish

  Affinity(const Tensor& query, const OptionalTensor& key, const Tensor& query_ratios, const OptionalTensor& key_ratios,
           const OptionalTensor& shift_, const std::string& form, double temperature, bool normalize)
      : pairs(query, key, std::nullopt, std::nullopt, "all", -1, temperature, normalize, false),
        patches(query_ratios.size(0)),
        classes(query_ratios.size(2)),
        batch(query.size(0)),
        swapped(form == "release2d") {
    STD_TORCH_CHECK(swapped || form == "affinity", "medcl: form must be affinity or release2d, got ", form);
    STD_TORCH_CHECK(key.has_value() == key_ratios.has_value(), "medcl: a key and its ratios come together");
    const auto shares = [&](const Tensor& r, int64_t rows) {
      STD_TORCH_CHECK(r.dim() == 4 && r.size(0) == patches && r.size(1) == batch && r.size(2) == classes &&
                          r.size(3) == rows && patches > 0 && classes > 0,
                      "medcl: ratios must be (P, B, K, N)");
      return row_values<T>(r, r.numel());
    };
    row_shares = shares(query_ratios, query.size(2));
    col_shares = key.has_value() ? shares(*key_ratios, key->size(2)) : row_shares;
    const double alpha = pairs.alpha;
    double m = alpha;
    shift = static_cast<T>(alpha * kLog2e);
    if (shift_.has_value()) {
      m = *row_values<T>(*shift_, 1);
      shift = static_cast<T>(m * kLog2e);
    }
    double divergence = 0;
    for (int64_t p = 0; p < patches; ++p)
      divergence = std::max(divergence, largest_divergence(query_ratios, key_ratios, p));
    bounded = normalize && plain_exponents(divergence, swapped, alpha + std::abs(m), sizeof(T) == 4 ? 80 : 700);
  }

  int64_t row_count() const { return pairs.query.length; }
  int64_t col_count() const { return pairs.key().length; }
  Shares<T> shares(int64_t image, int64_t i0, int64_t j0) const {
    Shares<T> f;
    f.row_class = row_count();
    f.col_class = col_count();
    f.row_patch = batch * classes * f.row_class;
    f.col_patch = batch * classes * f.col_class;
    f.row = row_shares + image * classes * f.row_class + i0;
    f.col = col_shares + image * classes * f.col_class + j0;
    f.patches = patches;
    f.classes = classes;
    f.swapped = swapped;
    return f;
  }

 private:
  // an upper bound over all pairs: per class the largest difference of two shares; NaN gives NaN
  double largest_divergence(const Tensor& query_ratios, const OptionalTensor& key_ratios, int64_t p) const {
    double total = 0;
    for (int64_t k = 0; k < classes; ++k) {
      double low = std::numeric_limits<double>::infinity(), high = -low;
      const auto scan = [&](const T* values, int64_t n) {
        for (int64_t b = 0; b < batch; ++b) {
          const T* v = values + ((p * batch + b) * classes + k) * n;
          for (int64_t i = 0; i < n; ++i) {
            low = v[i] < low ? v[i] : low;
            high = v[i] > high ? v[i] : high;
          }
        }
      };
      scan(row_shares, query_ratios.size(3));
      if (key_ratios.has_value()) scan(col_shares, key_ratios->size(3));
      total += high - low;
    }
    return total;
  }
};

AffinitySums shifted(const AffinitySums& s, int64_t first) { return {s.z + first, s.linear + first, s.stride}; }
template <class T>
AffinityTerms<T> shifted(const AffinityTerms<T>& t, int64_t first) {
  return {t.weight + first, t.log_z ? t.log_z + first : nullptr, t.linear + first, t.stride};
}

template <class T>
void forward_group(const Affinity<T>& a, int64_t image, T* log_z, T* linear) {
  const Problem<T> p = a.pairs.problem(image);
  const Side<T>& z = p.query;
  const int64_t n = z.rows.n, dim = z.rows.dim, P = a.patches, stride = a.batch * n;
  const auto& kernels = patch_kernels<T>();
  const T binary = p.binary();
  constexpr T none = -std::numeric_limits<T>::infinity();
  Buffer<double> held(2 * P * n);
  Buffer<T> maxima(a.bounded ? 0 : P * n);
  std::fill_n(held.get(), 2 * P * n, 0.0);
  if (!a.bounded) std::fill_n(maxima.get(), P * n, none);
  const AffinitySums sums{held.get(), held.get() + P * n, n};
  if (p.self && a.bounded) {
    const int64_t bs = triangle_block(n);
    triangle(
        n, bs, false,
        [&](int64_t i0, int64_t m, int64_t j0, int64_t w, int64_t) {
          const Tile<T> x = z.pack(i0, m, scratch<T>(kOwn, bs * dim), z.natural());
          const Tile<T> y = z.pack(j0, w, scratch<T>(kOther, bs * dim), bs < 192 ? Layout::channel_major : z.natural());
          T* s = scratch<T>(kScores, bs * bs);
          scores(x, m, y, w, dim, binary, s, w);
          kernels.affinity_sums(s, w, m, w, a.shift, a.shares(image, i0, j0), shifted(sums, i0),
                                i0 == j0 ? AffinitySums{} : shifted(sums, j0));
        },
        [](int64_t, int64_t) {});
  } else {
    sweep<T>(
        z, p.key, false, binary, T(0), false, [](int64_t, int64_t) {},
        [&](T* s, int64_t ld, int64_t m, int64_t w, int64_t i0, int64_t j0, const Tile<T>&, const Tile<T>&) {
          const Shares<T> f = a.shares(image, i0, j0);
          if (a.bounded)
            kernels.affinity_sums(s, ld, m, w, a.shift, f, shifted(sums, i0), AffinitySums{});
          else
            kernels.affinity_online(s, ld, m, w, a.shift, f, maxima.get() + i0, shifted(sums, i0));
        },
        [](int64_t, int64_t) {});
  }
  for (int64_t q = 0; q < P; ++q)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = q * n + i, to = q * stride + image * n + i;
      const double top = a.bounded ? 0.0 : maxima.get()[at] * kLn2;
      log_z[to] = static_cast<T>(top + std::log(sums.z[at]));
      linear[to] = static_cast<T>(sums.linear[at] * kLn2);
    }
}

template <class T>
double total_of(const T* w, int64_t m, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < m * n; ++i) total += w[i];
  return total;
}

// A tensor against itself. Every pair of rows meets both anchors' terms: returns twice the sum of dL/dt if it is asked
// for.
template <class T>
double self_gradient(const Affinity<T>& a, int64_t image, const AffinityTerms<T>& terms, const RowsOut* out,
                     bool need_sum) {
  const Problem<T> p = a.pairs.problem(image);
  const Side<T>& z = p.query;
  const int64_t n = z.rows.n, dim = z.rows.dim;
  const auto& kernels = patch_kernels<T>();
  const T binary = p.binary();
  const int64_t bs = a.bounded ? triangle_block(n) : row_block(n), blocks = ceil_div(n, bs);
  std::vector<double> sums(blocks, 0.0);
  if (!a.bounded) {
    sweep<T>(
        z, z, false, binary, T(0), true,
        [&](int64_t, int64_t m) { std::fill_n(scratch<T>(kSums, m * dim), m * dim, T(0)); },
        [&](T* s, int64_t ld, int64_t m, int64_t w, int64_t i0, int64_t j0, const Tile<T>&, const Tile<T>& b) {
          kernels.affinity_weights(s, ld, m, w, a.shift, a.shares(image, i0, j0), shifted(terms, i0),
                                   shifted(terms, j0));
          if (need_sum) sums[i0 / bs] += total_of(s, m, w);
          if (out) gemm<T>(m, dim, w, T(1), s, ld, 1, b.data, b.row, b.col, T(1), scratch<T>(kSums, m * dim), dim);
        },
        [&](int64_t i0, int64_t m) {
          if (out) finish_gradient(scratch<T>(kSums, m * dim), dim, z, i0, m, p.alpha, *out);
        });
  } else {
    T* direct = out ? direct_rows<T>(*out, n) : nullptr;
    Buffer<T> held(out && !direct ? n * dim : 0);
    T* acc = direct ? direct : held.get();
    if (out)
      parallel(blocks, [&](int64_t I) { std::fill_n(acc + I * bs * dim, std::min(bs, n - I * bs) * dim, T(0)); });
    triangle(
        n, bs, false,
        [&](int64_t i0, int64_t m, int64_t j0, int64_t w, int64_t) {
          const bool square = i0 == j0;
          const Tile<T> x = z.pack(i0, m, scratch<T>(kOwn, bs * dim), Layout::row_major);
          const Tile<T> y = square ? x : z.pack(j0, w, scratch<T>(kOther, bs * dim), Layout::row_major);
          const Tile<T> factor = bs < 192 ? z.pack(j0, w, scratch<T>(kFactor, bs * dim), Layout::channel_major) : y;
          T* s = scratch<T>(kScores, bs * bs);
          scores(x, m, factor, w, dim, binary, s, w);
          kernels.affinity_weights(s, w, m, w, a.shift, a.shares(image, i0, j0), shifted(terms, i0),
                                   shifted(terms, j0));
          if (need_sum) sums[i0 / bs] += (square ? 1 : 2) * total_of(s, m, w);
          if (!out) return;
          gemm<T>(m, dim, w, T(1), s, w, 1, y.data, y.row, y.col, T(1), acc + i0 * dim, dim);
          if (!square) gemm<T>(w, dim, m, T(1), s, 1, w, x.data, x.row, x.col, T(1), acc + j0 * dim, dim);
        },
        [&](int64_t i0, int64_t m) {
          if (out) finish_gradient(acc + i0 * dim, dim, z, i0, m, p.alpha, *out);
        });
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// Two tensors: strips of rows against all columns, both gradients from one S. Columns are shared out in a fixed number
// of parts, each with its own partial sums for the rows, added in order. Returns the sum of dL/dt if it is asked for.
template <class T>
double cross_gradient(const Affinity<T>& a, int64_t image, const AffinityTerms<T>& terms, const RowsOut* d_query,
                      const RowsOut* d_key, bool need_sum) {
  const Problem<T> p = a.pairs.problem(image);
  const int64_t n = p.query.rows.n, keys = p.key.rows.n, dim = p.query.rows.dim;
  const auto& kernels = patch_kernels<T>();
  const T binary = p.binary();
  const int64_t R = row_block(n), chunks = ceil_div(keys, kColumns), parts = std::min<int64_t>(chunks, 16);
  Buffer<T> packed(R * dim), partial(d_query ? parts * R * dim : 0);
  T* direct = d_key ? direct_rows<T>(*d_key, keys) : nullptr;
  Buffer<T> held(d_key && !direct ? keys * dim : 0);
  T* acc = direct ? direct : held.get();
  std::vector<double> sums(parts, 0.0);
  if (d_key) std::fill_n(acc, keys * dim, T(0));
  for (int64_t i0 = 0; i0 < n; i0 += R) {
    const int64_t m = std::min(R, n - i0);
    const Tile<T> q = p.query.pack(i0, m, packed.get(), Layout::row_major);
    parallel(parts, [&](int64_t part) {
      T* own = partial.get() + (d_query ? part * R * dim : 0);
      if (d_query) std::fill_n(own, m * dim, T(0));
      for (int64_t c = part * chunks / parts; c < (part + 1) * chunks / parts; ++c) {
        const int64_t j0 = c * kColumns, w = std::min(kColumns, keys - j0);
        const Tile<T> factor = p.key.pack(j0, w, scratch<T>(kFactor, kColumns * dim), Layout::channel_major);
        T* s = scratch<T>(kScores, R * kColumns);
        scores(q, m, factor, w, dim, binary, s, w);
        kernels.affinity_weights(s, w, m, w, a.shift, a.shares(image, i0, j0), shifted(terms, i0), AffinityTerms<T>{});
        if (need_sum) sums[part] += total_of(s, m, w);
        if (d_query) {
          const Tile<T> k = p.key.pack(j0, w, scratch<T>(kOther, kColumns * dim), Layout::row_major);
          gemm<T>(m, dim, w, T(1), s, w, 1, k.data, k.row, k.col, T(1), own, dim);
        }
        if (d_key) gemm<T>(w, dim, m, T(1), s, 1, w, q.data, dim, 1, T(1), acc + j0 * dim, dim);
      }
    });
    if (!d_query) continue;
    for (int64_t part = 1; part < parts; ++part)
      tile_kernels<T>().add_row(partial.get(), partial.get() + part * R * dim, m * dim, T(1));
    finish_gradient(partial.get(), dim, p.query, i0, m, p.alpha, *d_query);
  }
  if (d_key)
    parallel(chunks, [&](int64_t c) {
      const int64_t j0 = c * kColumns;
      finish_gradient(acc + j0 * dim, dim, p.key, j0, std::min(kColumns, keys - j0), p.alpha, *d_key);
    });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace

std::tuple<Tensor, Tensor> pair_affinity_cpu(const Tensor& query, const OptionalTensor& key, const Tensor& query_ratios,
                                             const OptionalTensor& key_ratios, const OptionalTensor& shift,
                                             std::string form, double temperature, bool normalize) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const Affinity<T> a(query, key, query_ratios, key_ratios, shift, form, temperature, normalize);
    const std::vector<int64_t> shape{a.patches, query.size(0), query.size(2)};
    Tensor log_z = per_row(query, shape), linear = per_row(query, shape);
    each_group(a.pairs.groups(), [&](int64_t image) {
      forward_group(a, image, static_cast<T*>(log_z.mutable_data_ptr()), static_cast<T*>(linear.mutable_data_ptr()));
    });
    return std::make_tuple(log_z, linear);
  });
}

std::tuple<Tensor, Tensor, Tensor> pair_affinity_backward_cpu(
    const Tensor& d_log_z, const Tensor& d_linear, const Tensor& log_z, const Tensor& query, const OptionalTensor& key,
    const Tensor& query_ratios, const OptionalTensor& key_ratios, const OptionalTensor& shift, std::string form,
    double temperature, bool normalize, bool need_query, bool need_key, bool need_shift) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const Affinity<T> a(query, key, query_ratios, key_ratios, shift, form, temperature, normalize);
    const int64_t n = query.size(2), P = a.patches, stride = a.batch * n;
    const T* g = row_values<T>(d_log_z, P * stride);
    const T* h = row_values<T>(d_linear, P * stride);
    const T* l = row_values<T>(log_z, P * stride);
    GradientPair<T> out(a.pairs, query, key, need_query, need_key);
    std::vector<double> sums(a.batch, 0.0);
    each_group(a.pairs.groups(), [&](int64_t image) {
      Buffer<T> held(3 * P * n);
      T *weight = held.get(), *linear = weight + P * n, *stat = linear + P * n;
      for (int64_t p = 0; p < P; ++p)
        for (int64_t i = 0; i < n; ++i) {
          const int64_t from = p * stride + image * n + i, to = p * n + i;
          weight[to] = a.bounded ? static_cast<T>(g[from] * std::exp(-static_cast<double>(l[from]))) : g[from];
          stat[to] = static_cast<T>(l[from] * kLog2e);
          linear[to] = h[from];
        }
      const AffinityTerms<T> terms{weight, a.bounded ? nullptr : stat, linear, n};
      const RowsOut d_query = out.query(a.pairs, image), d_key = out.key(a.pairs, image);
      if (a.pairs.self)
        sums[image] = self_gradient(a, image, terms, need_query ? &d_query : nullptr, need_shift) / 2;
      else
        sums[image] =
            cross_gradient(a, image, terms, need_query ? &d_query : nullptr, need_key ? &d_key : nullptr, need_shift);
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    Tensor d_shift = per_row(query, {});
    *static_cast<T*>(d_shift.mutable_data_ptr()) = static_cast<T>(-total);
    const auto [d_query, d_key] = out.tensors();
    return std::make_tuple(d_query, d_key, d_shift);
  });
}

}  // namespace medcl
