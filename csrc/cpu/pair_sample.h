// Where the k-th score of each cell lies, more or less, from a sample of the pairs. Nothing depends on it but time.
#pragma once
#include "cpu/pair_sweep.h"

namespace medcl {

template <class T>
class PairSample {
 public:
  // The bits of the k-th score lie in [low, high) with a good chance, for every cell; high only where both are asked
  // for.
  std::vector<uint64_t> low, high;

  PairSample(const PairFilter<T>& filter, const int64_t* k, bool both)
      : low(filter.cells(), 1),
        high(filter.cells(), bits_of(kInf) + 1),
        f_(filter),
        k_(k),
        cells_(filter.cells()),
        all_pairs_(cells_, 0.0),
        seen_pairs_(cells_, 0.0) {
    const bool per_anchor = f_.by_anchor;
    std::vector<std::vector<T>> pool(cells_);
    std::vector<int64_t> rows(cells_, 0), columns(cells_, 0);
    for (int64_t group = 0; group < f_.pairs.groups(); ++group) {
      const int64_t begin = f_.pairs.query.begin[group], n = f_.pairs.query.begin[group + 1] - begin;
      const int64_t keys = f_.pairs.key().begin[group + 1] - f_.pairs.key().begin[group];
      if (n == 0 || keys == 0) continue;
      // anchors of one unit stand together; every anchor is sampled where it is a unit of its own
      for (int64_t first = 0; first < n;) {
        int64_t last = per_anchor ? n : first + 1;
        while (last < n && f_.unit[begin + last] == f_.unit[begin + first]) ++last;
        sample(group, first, last, keys, per_anchor, pool, rows, columns);
        first = last;
      }
    }
    parallel(cells_, [&](int64_t cell) { bracket(cell, pool[cell], rows[cell], columns[cell], both); });
  }

 private:
  static constexpr T kInf = std::numeric_limits<T>::infinity();
  static constexpr double kSample = 262144;  // pairs of a unit: more cost more than they save in collected ones
  const PairFilter<T>& f_;
  const int64_t* k_;
  const int64_t cells_;
  std::vector<double> all_pairs_, seen_pairs_;

  // `want` of n places, one in each of `want` equal stretches
  static std::vector<int64_t> spread(int64_t first, int64_t n, int64_t want) {
    std::vector<int64_t> places;
    uint64_t state = 0x9e3779b97f4a7c15u + static_cast<uint64_t>(n);
    want = std::min(want, n);
    for (int64_t x = 0; x < want; ++x) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const int64_t begin = x * n / want, end = (x + 1) * n / want;
      places.push_back(first + begin + static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(end - begin)));
    }
    return places;
  }

  void sample(int64_t group, int64_t first, int64_t last, int64_t keys, bool per_anchor,
              std::vector<std::vector<T>>& pool, std::vector<int64_t>& rows, std::vector<int64_t>& columns) {
    const int64_t begin = f_.pairs.query.begin[group], key_begin = f_.pairs.key().begin[group];
    const double everything = static_cast<double>(last - first) * keys;
    const double budget = std::min(std::max(everything / 32, 16384.0), kSample);
    const double part = std::min(1.0, budget / everything);
    std::vector<int64_t> own, other;
    if (per_anchor) {
      own = spread(first, last - first, last - first);
      other = spread(0, keys, std::max<int64_t>(256, static_cast<int64_t>(keys * part)));
    } else {
      own = spread(first, last - first, std::max<int64_t>(64, static_cast<int64_t>((last - first) * std::sqrt(part))));
      other = spread(0, keys, std::max<int64_t>(64, static_cast<int64_t>(keys * std::sqrt(part))));
    }
    const Problem<T> p = f_.pairs.problem(group);
    const int64_t n = static_cast<int64_t>(own.size()), m = static_cast<int64_t>(other.size()), dim = p.query.rows.dim;
    Picked<T> picked_keys;
    const T* y = gather_rows(p.key, other.data(), m, picked_keys);
    std::vector<int32_t> code(f_.key_code.empty() ? 0 : m);
    for (size_t j = 0; j < code.size(); ++j) code[j] = f_.key_code[key_begin + other[j]];
    constexpr int64_t rows_at_once = 64;
    std::vector<T> seen(n * m);  // scores; -1 for no pair, and in two classes negatives as -2 - R
    parallel(ceil_div(n, rows_at_once), [&](int64_t block) {
      const auto& kernels = filter_kernels<T>();
      const int64_t i0 = block * rows_at_once, h = std::min(rows_at_once, n - i0);
      Picked<T> picked;
      const T* x = gather_rows(p.query, own.data() + i0, h, picked);
      T* s = scratch<T>(kScores, h * m + kSpare);
      gemm<T>(h, m, dim, p.alpha, x, dim, 1, y, 1, dim, T(0), s, m);
      std::fill_n(s + h * m, kSpare, T(0));
      auto& room = PairFilter<T>::arrays(m);
      for (int64_t i = 0; i < h; ++i) {
        const int64_t local = own[i0 + i], row = begin + local;
        T* to = seen.data() + (i0 + i) * m;
        if (!(f_.a.get()[row] < kInf)) {  // no anchor
          std::fill_n(to, m, T(-1));
          continue;
        }
        std::fill_n(room.get(2), m, f_.a.get()[row]);
        std::fill_n(room.get(3), m, f_.b.get()[row]);
        std::fill_n(room.get(4), m, f_.c.get()[row]);
        if (f_.representation) std::fill_n(room.get(5), m, f_.scale.get()[row]);
        int32_t* mask = room.mask.get();
        if (code.empty())
          for (int64_t j = 0; j < m; ++j) mask[j] = -static_cast<int32_t>(f_.is_positive(row, 0, other[j]));
        else
          for (int64_t j = 0; j < m; ++j) mask[j] = -static_cast<int32_t>(code[j] == f_.query_code[row]);
        kernels.gradients(f_.form, s + i * m, m, room.get(2), room.get(3), room.get(4), mask, room.get(0));
        kernels.scores(s + i * m, room.get(0), m, f_.temperature, f_.representation ? room.get(5) : nullptr,
                       room.get(1));
        std::copy_n(room.get(1), m, to);
        for (int64_t j = 0; f_.classes == 2 && j < m; ++j)
          if (!mask[j]) to[j] = T(-2) - to[j];
        if (p.self) {
          const auto itself = std::lower_bound(other.begin(), other.end(), local);
          if (itself != other.end() && *itself == local) to[itself - other.begin()] = T(-1);
        }
      }
    });
    for (int64_t i = 0; i < n; ++i) {
      const T* r = seen.data() + i * m;
      std::vector<T>& positive = pool[f_.cell(begin + own[i], true)];
      std::vector<T>& negative = pool[f_.cell(begin + own[i], false)];
      for (int64_t j = 0; j < m; ++j) {
        if (r[j] >= T(0)) positive.push_back(r[j]);
        if (r[j] <= T(-2)) negative.push_back(T(-2) - r[j]);
      }
      for (int64_t kind = 0; kind < f_.classes; ++kind) {
        const int64_t cell = f_.cell(begin + own[i], kind == 0);
        ++rows[cell];
        columns[cell] = std::max(columns[cell], m);
      }
    }
    // what part of its pairs a cell shows
    for (int64_t i = first; i < (per_anchor ? last : first + 1); ++i)
      for (int64_t kind = 0; kind < f_.classes; ++kind) {
        const int64_t cell = f_.cell(begin + i, kind == 0);
        all_pairs_[cell] += per_anchor ? static_cast<double>(keys) : everything;
        seen_pairs_[cell] += per_anchor ? static_cast<double>(m) : static_cast<double>(n) * m;
      }
  }
  // The ranks between which the k-th score of a cell lies in its sample, with three standard deviations to spare.
  void bracket(int64_t cell, std::vector<T>& pool, int64_t rows, int64_t columns, bool both) {
    if (pool.empty() || k_[cell] == 0) return;
    const double part = seen_pairs_[cell] / all_pairs_[cell], rank = k_[cell] * part;
    // pairs of one row or column resemble each other; where the unit is a row, that does not matter
    const double alike = f_.by_anchor ? 0.0 : 1.0 / std::max<int64_t>(1, rows) + 1.0 / std::max<int64_t>(1, columns);
    const double spread = std::sqrt(alike + 1.0 / std::max(rank, 1.0));
    const bool all = part >= 1.0;
    const double slack = all ? 0.0 : 3 * spread * rank + 3;
    const double lower = rank + slack, upper = rank - slack;
    auto at = [&](double place) {
      auto nth = pool.begin() + static_cast<int64_t>(place);
      std::nth_element(pool.begin(), nth, pool.end(), std::greater<T>());
      return bits_of(*nth);
    };
    const double size = static_cast<double>(pool.size());
    if (lower < size) low[cell] = std::max<uint64_t>(1, at(lower));
    if (both && upper >= 1 && upper < size) high[cell] = std::max(at(upper - 1), low[cell]) + 1;
  }
};

}  // namespace medcl
