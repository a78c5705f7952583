// For every query row the most similar key row of its image, ties to the smallest index.
#include "cpu/pairs.h"

namespace medcl {
namespace {

// A GEMM may round equal dot products differently in different columns of a tile. Whatever comes within its error of
// the running best is therefore recomputed from the packed rows in double, in one order, and compared exactly.
template <class T>
void best_keys(const Problem<T>& p, int64_t* index, T* value) {
  const int64_t n = p.query.rows.n, dim = p.query.rows.dim;
  const auto& kernels = tile_kernels<T>();
  const double none = -std::numeric_limits<double>::infinity();
  Buffer<double> best(n);
  std::vector<int64_t> at(n, 0);
  auto dot = [dim](const Tile<T>& a, int64_t i, const Tile<T>& b, int64_t j) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d)
      sum += static_cast<double>(a.data[i * a.row + d * a.col]) * b.data[j * b.row + d * b.col];
    return sum;
  };
  // error bound of a length-D product in T, from the norms where rows are not of unit length
  auto row_norm = [&](const Tile<T>& a, int64_t i) { return std::sqrt(dot(a, i, a, i)); };
  const double rounding = 2.0 * dim * std::numeric_limits<T>::epsilon();
  sweep<T>(
      p.query, p.key, false, T(1), T(0), false, [&](int64_t i0, int64_t m) { std::fill_n(best.get() + i0, m, none); },
      [&](T* s, int64_t ld, int64_t m, int64_t w, int64_t i0, int64_t j0, const Tile<T>& a, const Tile<T>& b) {
        double longest = 1;
        if (!p.key.inverse) {
          longest = 0;
          for (int64_t j = 0; j < w; ++j) longest = std::max(longest, row_norm(b, j));
        }
        for (int64_t i = 0; i < m; ++i) {
          const T* row = s + i * ld;
          double& top = best.get()[i0 + i];
          const double slack = rounding * longest * (p.query.inverse ? 1.0 : row_norm(a, i));
          const double tile_top = kernels.row_maximum(row, w);
          if (tile_top < top - slack) continue;
          const double floor = std::max(tile_top, top) - 2 * slack;
          for (int64_t j = 0; j < w; ++j) {
            if (row[j] < floor) continue;
            const double exact = dot(a, i, b, j);
            if (exact > top) {
              top = exact;
              at[i0 + i] = j0 + j;
            }
          }
        }
      },
      [&](int64_t i0, int64_t m) {
        for (int64_t i = i0; i < i0 + m; ++i) {
          index[p.query.slot[i]] = at[i];
          value[p.query.slot[i]] = static_cast<T>(best.get()[i]);
        }
      });
}

}  // namespace

std::tuple<Tensor, Tensor> pair_argmax_cpu(const Tensor& query, const Tensor& key, bool normalize) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    const Pairing<T> pairs(query, key, std::nullopt, std::nullopt, "all", -1, 1.0, normalize, false);
    const std::vector<int64_t> shape{query.size(0), query.size(2)};
    Tensor index = torch::stable::new_empty(query, shape, ScalarType::Long), value = per_row(query, shape);
    each_group(pairs.groups(), [&](int64_t g) {
      best_keys(pairs.problem(g), static_cast<int64_t*>(index.mutable_data_ptr()),
                static_cast<T*>(value.mutable_data_ptr()));
    });
    return std::make_tuple(index, value);
  });
}

}  // namespace medcl
