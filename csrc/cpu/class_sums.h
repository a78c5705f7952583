// Sums of the unit rows of each class: the positives of supervised contrast without a pass over pairs.
#pragma once
#include "cpu/pairs.h"

namespace medcl {

constexpr int64_t kRows = 256;  // rows packed at a time

// Packed tiles of one side in row-major layout, each to one thread.
template <class T, class Visit>
void each_tile(const Side<T>& side, Visit&& visit) {
  const int64_t n = side.rows.n, dim = side.rows.dim;
  parallel(ceil_div(n, kRows), [&](int64_t block) {
    const int64_t i0 = block * kRows, m = std::min(kRows, n - i0);
    visit(i0, m, side.pack(i0, m, scratch<T>(kOwn, kRows * dim), Layout::row_major));
  });
}

// Per selection and class: the number of rows and, weighted, their sum.
template <class T>
struct ClassSums {
  std::vector<Buffer<T>> sum;               // (classes, D) per selection; accumulated in double
  std::vector<std::vector<int64_t>> count;  // (classes) per selection

  // weight: (selections, rows) or null for 1
  ClassSums(const Side<T>& side, const std::vector<LabelCodes>& codes, const T* weight) {
    const int64_t n = side.rows.n, dim = side.rows.dim, S = static_cast<int64_t>(codes.size());
    // few classes: a fixed number of partial sums, added in order, lets the threads share the rows
    const auto& kernels = tile_kernels<T>();
    int64_t cells = 0;
    for (const LabelCodes& c : codes) cells = std::max(cells, c.size() * dim);
    const int64_t parts = cells <= 32768 && n >= 4096 ? 8 : 1;
    for (int64_t k = 0; k < S; ++k) {
      const int64_t classes = codes[k].size();
      const int32_t* code = side.code + k * side.code_stride;
      Buffer<double> partial(parts * classes * dim);
      count.emplace_back(classes, 0);
      for (int64_t i = 0; i < n; ++i)
        if (code[i] >= 0) ++count[k][code[i]];
      parallel(parts, [&](int64_t part) {
        double* total = partial.get() + part * classes * dim;
        std::fill_n(total, classes * dim, 0.0);
        const int64_t last = (part + 1) * n / parts;
        for (int64_t i0 = part * n / parts; i0 < last; i0 += kRows) {
          const int64_t m = std::min(kRows, last - i0);
          const Tile<T> z = side.pack(i0, m, scratch<T>(kOwn, kRows * dim), Layout::row_major);
          for (int64_t i = 0; i < m; ++i) {
            if (code[i0 + i] < 0) continue;
            kernels.add_to_sum(total + code[i0 + i] * dim, z.data + i * dim, dim,
                               weight ? weight[k * n + i0 + i] : 1.0);
          }
        }
      });
      Buffer<T> rounded(classes * dim);
      for (int64_t i = 0; i < classes * dim; ++i) {
        double total = 0;
        for (int64_t part = 0; part < parts; ++part) total += partial.get()[part * classes * dim + i];
        rounded.get()[i] = static_cast<T>(total);
      }
      sum.push_back(std::move(rounded));
    }
  }
};

}  // namespace medcl
