// The pairs with the largest score, exactly, in O(N + k) memory.
//
//   1. A sample of pairs (1/32 of them) says where the k-th score of each cell (unit and kind) lies, more or less.
//   2. For a list: one sweep collects whatever reaches a bound safely below that. Candidates are found by comparing the
//      similarity with a bound per anchor, without exp. If the collected pairs are at least k, the k best of them are
//      the answer, whatever the sample said.
//   3. Else, and for thresholds alone: sweeps that count scores in intervals of their bits, until the k-th is among few
//      or many are equal to it; one more sweep collects these, or counts equal ones per anchor.
//
// Counts decide, never the sample, and every sweep has the same bits (pair_filter.h).
#include <atomic>

#include "cpu/pair_filter.h"
#include "pairs/numbers.h"

namespace medcl {
namespace {

template <class T>
struct Entry {
  int32_t i, j;  // packed rows over all groups
  T g, r;
};

template <class T>
bool before(const Entry<T>& x, const Entry<T>& y) {  // (-R, i * N + j); packed order is slot order
  return x.r != y.r ? x.r > y.r : x.i != y.i ? x.i < y.i : x.j < y.j;
}

// Bits of a non-negative score: monotone.
inline uint64_t bits_of(float x) { return bit_copy<uint32_t>(x); }
inline uint64_t bits_of(double x) { return bit_copy<uint64_t>(x); }
inline float score_of(uint64_t bits, float) { return bit_copy<float>(static_cast<uint32_t>(bits)); }
inline double score_of(uint64_t bits, double) { return bit_copy<double>(bits); }

// What is known of the k-th score of a cell: its bits are in [low, high), `above` scores reach `high`.
struct Bracket {
  int64_t k = 0, above = 0, inside = -1;
  uint64_t low = 1, high = 0;
  bool done = false;
  int shift(int64_t bins) const {
    int s = 0;
    while (((high - low - 1) >> s) >= static_cast<uint64_t>(bins)) ++s;
    return s;
  }
};

template <class T>
class TopK {
 public:
  TopK(const PairFilter<T>& filter, const int64_t* k) : f_(filter), k_(k), cells_(filter.cells()) {
    threshold.assign(cells_, T(0));
    cut.assign(cells_, -1);
    for (int64_t c = 0; c < cells_; ++c) total_ += k[c];
  }

  std::vector<T> threshold;
  std::vector<int64_t> cut;

  // The k best of every cell in the order of (i, j).
  std::vector<Entry<T>> list() {
    estimate(/*both=*/false);
    std::vector<T> bound(cells_);
    for (int64_t c = 0; c < cells_; ++c) bound[c] = k_[c] == 0 ? kInf : score_of(low_[c], T());
    std::vector<Entry<T>> found;
    found.reserve(total_ + total_ / 3);
    const auto all = [](int64_t, const Entry<T>&) { return true; };
    if (sweep(bound, nullptr, nullptr, 4 * total_ + (int64_t{1} << 20), all, found) && enough(found, bound))
      return in_order(best(std::move(found)));
    low_.clear();  // the sample has misled
    exact();
    found.clear();
    sweep(
        threshold, nullptr, nullptr, kNoLimit,
        [&](int64_t c, const Entry<T>& e) { return e.r > threshold[c] || f_.place(e.i, e.j) <= cut[c]; }, found);
    return in_order(std::move(found));
  }

  void thresholds() {
    estimate(/*both=*/true);
    exact();
  }

 private:
  static constexpr T kInf = std::numeric_limits<T>::infinity();
  static constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  static constexpr double kSample = 262144;  // pairs of a unit: more cost more than they save in collected ones
  const PairFilter<T>& f_;
  const int64_t* k_;
  const int64_t cells_;
  int64_t total_ = 0;
  std::vector<uint64_t> low_, high_;

  // ---- 1. the sample

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

  void estimate(bool both) {
    low_.assign(cells_, 1);
    high_.assign(cells_, bits_of(kInf) + 1);
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
    if (all_pairs_.empty()) {
      all_pairs_.assign(cells_, 0.0);
      seen_pairs_.assign(cells_, 0.0);
    }
    for (int64_t i = first; i < (per_anchor ? last : first + 1); ++i)
      for (int64_t kind = 0; kind < f_.classes; ++kind) {
        const int64_t cell = f_.cell(begin + i, kind == 0);
        all_pairs_[cell] += per_anchor ? static_cast<double>(keys) : everything;
        seen_pairs_[cell] += per_anchor ? static_cast<double>(m) : static_cast<double>(n) * m;
      }
  }
  std::vector<double> all_pairs_, seen_pairs_;

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
    if (lower < size) low_[cell] = std::max<uint64_t>(1, at(lower));
    if (both && upper >= 1 && upper < size) high_[cell] = std::max(at(upper - 1), low_[cell]) + 1;
  }

  // ---- 2. collecting

  // Whether every cell has its k, or all there are.
  bool enough(const std::vector<Entry<T>>& found, const std::vector<T>& bound) const {
    std::vector<int64_t> count(cells_, 0);
    for (const Entry<T>& e : found) ++count[cell_of(e)];
    for (int64_t c = 0; c < cells_; ++c)
      if (count[c] < k_[c] && bits_of(bound[c]) > 1) return false;
    return true;
  }
  int64_t cell_of(const Entry<T>& e) const {
    if (f_.classes == 1) return f_.unit[e.i];
    const int64_t group_begin = key_begin_of(e.j);
    return f_.cell(e.i, f_.is_positive(e.i, e.j, e.j - group_begin));
  }
  int64_t key_begin_of(int64_t j) const {
    const auto& begin = f_.pairs.key().begin;
    return *(std::upper_bound(begin.begin(), begin.end() - 1, j) - 1);
  }

  // One sweep over all pairs. keep(cell, entry) says of those with low <= R (of their cell) whether they are listed in
  // `found`. Where `high` is given, pairs with R >= high are counted in `above` and not shown. False: there were more
  // than `most` to list.
  template <class Keep>
  bool sweep(const std::vector<T>& low, const std::vector<T>* high, int64_t* above, int64_t most, Keep&& keep,
             std::vector<Entry<T>>& found) const {
    std::mutex lock;
    std::atomic<int64_t> count{0};
    const Bounds bounds = bounds_of(low, high);
    const auto judge = [&](Tally& tally, int64_t i, int64_t j, bool positive, T g, T r) {
      const int64_t c = cells_ == 1 ? 0 : f_.cell(i, positive);
      if (!(r > T(0) && r >= low[c])) return;
      if (high && r >= (*high)[c]) {
        __atomic_fetch_add(&above[c], 1, __ATOMIC_RELAXED);
        return;
      }
      const Entry<T> e{static_cast<int32_t>(i), static_cast<int32_t>(j), g, r};
      if (keep(c, e)) tally.kept.push_back(e);
    };
    each_group(f_.pairs.groups(), [&](int64_t group) {
      f_.tiles(group, [&](const Problem<T>& p, int64_t i0, int64_t m, int64_t j0, int64_t w, const T* s) {
        if (count.load(std::memory_order_relaxed) > most) return;
        static thread_local Tally tally;
        tally.kept.clear();
        const Square x{group, f_.pairs.query.begin[group], f_.pairs.key().begin[group], i0, m, j0,
                       w,     p.self && i0 != j0};
        if (bounds.bends(x)) {
          every(p, x, s, bounds, tally, judge);
        } else {
          likely(p, x, s, bounds, above, tally, judge);
          if (!f_.positive_first.empty()) named(x, s, tally, judge);
        }
        if (tally.kept.empty()) return;
        count += static_cast<int64_t>(tally.kept.size());
        std::lock_guard<std::mutex> guard(lock);
        found.insert(found.end(), tally.kept.begin(), tally.kept.end());
      });
    });
    return count.load() <= most;
  }

  struct Tally {
    std::vector<Entry<T>> kept;
    std::vector<int32_t> at, anchor, other;
  };
  struct Square {  // a tile: rows count from the beginning of the group, row0 and col0 is where that is
    int64_t group, row0, col0, i0, m, j0, w;
    bool mirrored;
  };

  // What the bounds of cells mean for the similarities of an anchor.
  struct Bounds {
    std::vector<T> floor;       // no pair with a smaller similarity reaches `low` (1e-4 to spare for rounding)
    std::vector<T> sure;        // all pairs with at least this one reach `high`; inf where that cannot be said
    std::vector<T> least;       // the score that a pair must reach at least
    std::vector<uint8_t> bend;  // a low similarity may have a high score
    bool bends(const Square& x) const {
      const auto any = [&](int64_t first, int64_t n) {
        return std::any_of(bend.begin() + first, bend.begin() + first + n, [](uint8_t b) { return b != 0; });
      };
      return any(x.row0 + x.i0, x.m) || (x.mirrored && any(x.row0 + x.j0, x.w));
    }
  };

  Bounds bounds_of(const std::vector<T>& low, const std::vector<T>* high) const {
    const int64_t n = f_.pairs.query.count();
    const size_t room = static_cast<size_t>(n + kSpare);
    Bounds to{std::vector<T>(room, kInf), std::vector<T>(room, kInf), std::vector<T>(room, kInf),
              std::vector<uint8_t>(room, 0)};
    const bool by_index = !f_.positive_first.empty();
    const auto spare = [](double s) { return 1e-4 * (1 + std::abs(s) * 1e-2); };
    for (int64_t i = 0; i < n; ++i) {
      const double a = f_.a.get()[i], b = f_.b.get()[i];
      const T least = std::min(low[f_.cell(i, true)], low[f_.cell(i, false)]);
      to.least[i] = std::max(least, std::numeric_limits<T>::denorm_min());
      if (!(least < kInf) || !(a < kInf)) continue;
      double theta = least;
      if (f_.representation) theta = f_.scale.get()[i] > T(0) ? theta / f_.scale.get()[i] : kInf;
      if (!(theta < kInf)) continue;
      if (!(theta > 0)) {
        to.floor[i] = -kInf;
      } else {
        double reach = a + std::log(theta);
        if (f_.form == Form::in && !by_index)
          reach = std::min(reach, b - std::log1p(-std::min(1.0, std::exp(b - a))) + std::log(theta));
        to.floor[i] = static_cast<T>(reach - spare(reach));
      }
      // positives that are not similar enough; those by index are looked at one by one
      to.bend[i] = !by_index && f_.form != Form::in && b >= theta * (1 - 1e-4);
      if (!high || f_.representation || f_.classes == 2 || by_index || f_.form != Form::out) continue;
      const double reach = a + std::log((*high)[f_.unit[i]] + b);
      to.sure[i] = static_cast<T>(reach + spare(reach));
    }
    return to;
  }

  template <class Judge>
  void every(const Problem<T>& p, const Square& x, const T* s, const Bounds& bounds, Tally& tally,
             const Judge& judge) const {
    auto& room = PairFilter<T>::arrays(x.w);
    tally.at.resize(x.w + kSpare);
    const T none = kInf;
    int64_t beyond = 0;
    for (int64_t i = 0; i < x.m; ++i)
      f_.evaluate(p, x.group, x.i0 + i, x.j0, x.w, s + i * x.w, x.mirrored, room, [&](const PairRow<T>& r) {
        const T* least = bounds.least.data() + x.row0;
        std::vector<T>& ceiling = ceilings(x.w);
        const int64_t hits =
            filter_kernels<T>().pick(r.r, x.w, least + (r.mirrored ? x.j0 : x.i0 + i),
                                     r.mirrored ? ceiling.data() : &none, r.mirrored, tally.at.data(), &beyond);
        for (int64_t h = 0; h < hits; ++h) {
          const int64_t j = tally.at[h], row = x.row0 + x.i0 + i, col = x.col0 + x.j0 + j;
          judge(tally, r.mirrored ? col : row, r.mirrored ? row : col, r.positive[j] != 0, r.g[j], r.r[j]);
        }
      });
  }
  static std::vector<T>& ceilings(int64_t n) {
    static thread_local std::vector<T> all;
    if (static_cast<int64_t>(all.size()) < n + kSpare) all.assign(n + kSpare, kInf);
    return all;
  }

  // Only pairs whose similarity reaches the anchor's floor are evaluated, together.
  template <class Judge>
  void likely(const Problem<T>& p, const Square& x, const T* s, const Bounds& bounds, int64_t* above, Tally& tally,
              const Judge& judge) const {
    const auto& kernels = filter_kernels<T>();
    auto& room = PairFilter<T>::arrays(kBatch + x.w);
    tally.at.resize(x.w + kSpare);
    tally.anchor.resize(kBatch + x.w);
    tally.other.resize(kBatch + x.w);
    int32_t *anchor = tally.anchor.data(), *other = tally.other.data(), *mask = room.mask.get();
    T *a = room.get(2), *b = room.get(3), *c = room.get(4), *scale = room.get(5), *similar = room.get(6);
    const bool by_index = !f_.positive_first.empty();
    int64_t waiting = 0;
    auto flush = [&] {
      for (int64_t k = 0; k < waiting; ++k) {
        a[k] = f_.a.get()[anchor[k]];
        b[k] = f_.b.get()[anchor[k]];
      }
      if (f_.form == Form::pixel)
        for (int64_t k = 0; k < waiting; ++k) c[k] = f_.c.get()[anchor[k]];
      if (f_.representation)
        for (int64_t k = 0; k < waiting; ++k) scale[k] = f_.scale.get()[anchor[k]];
      if (by_index)
        for (int64_t k = 0; k < waiting; ++k)
          mask[k] = -static_cast<int32_t>(f_.is_positive(anchor[k], 0, other[k] - x.col0));
      else
        for (int64_t k = 0; k < waiting; ++k)
          mask[k] = -static_cast<int32_t>(f_.query_code[anchor[k]] == f_.key_code[other[k]]);
      kernels.gradients(f_.form, similar, waiting, a, b, c, mask, room.get(0));
      kernels.scores(similar, room.get(0), waiting, f_.temperature, f_.representation ? scale : nullptr, room.get(1));
      for (int64_t k = 0; k < waiting; ++k)
        if (!by_index || !mask[k])  // named() looks at positives by index
          judge(tally, anchor[k], other[k], mask[k] != 0, room.get(0)[k], room.get(1)[k]);
      waiting = 0;
    };
    for (int64_t i = 0; i < x.m; ++i) {
      const T* line = s + i * x.w;
      const int32_t row = static_cast<int32_t>(x.row0 + x.i0 + i);
      const int64_t itself = p.self && !x.mirrored ? x.i0 + i - x.j0 : -1;  // its place in the line
      int64_t sure = 0;
      int64_t hits = kernels.pick(line, x.w, &bounds.floor[row], &bounds.sure[row], 0, tally.at.data(), &sure);
      if (itself >= 0 && sure > 0 && line[itself] >= bounds.sure[row]) --sure;
      if (sure) __atomic_fetch_add(&above[f_.unit[row]], sure, __ATOMIC_RELAXED);
      for (int64_t h = 0; h < hits; ++h) {
        const int32_t j = tally.at[h];
        similar[waiting] = line[j];
        anchor[waiting] = row;
        other[waiting] = static_cast<int32_t>(x.col0 + x.j0) + j;
        waiting += j != itself;
      }
      if (waiting >= kBatch) flush();
      if (!x.mirrored) continue;
      const int64_t col = x.row0 + x.j0;
      int64_t several = 0;
      hits = kernels.pick(line, x.w, &bounds.floor[col], &bounds.sure[col], 1, tally.at.data(), &several);
      if (several)
        for (int64_t j = 0; j < x.w; ++j)
          if (line[j] >= bounds.sure[col + j]) __atomic_fetch_add(&above[f_.unit[col + j]], 1, __ATOMIC_RELAXED);
      for (int64_t h = 0; h < hits; ++h) {
        const int32_t j = tally.at[h];
        similar[waiting] = line[j];
        anchor[waiting] = static_cast<int32_t>(col) + j;
        other[waiting++] = row;
      }
      if (waiting >= kBatch) flush();
    }
    flush();
  }
  static constexpr int64_t kBatch = 1024;

  // Positives by index: any similarity may do, and there are few of them.
  template <class Judge>
  void named(const Square& x, const T* s, Tally& tally, const Judge& judge) const {
    const auto& kernels = filter_kernels<T>();
    auto& room = PairFilter<T>::arrays(kBatch);
    for (int64_t i = 0; i < x.m; ++i) {
      const int64_t row = x.row0 + x.i0 + i;
      int32_t previous = -1;
      for (int32_t k = f_.positive_first[row]; k < f_.positive_first[row + 1]; ++k) {
        const int64_t j = f_.positive_key[k] - x.j0;
        if (j < 0 || j >= x.w || f_.positive_key[k] == previous) continue;
        previous = f_.positive_key[k];
        room.get(6)[0] = s[i * x.w + j];
        room.get(2)[0] = f_.a.get()[row];
        room.get(3)[0] = f_.b.get()[row];
        room.get(4)[0] = f_.c.get()[row];
        if (f_.representation) room.get(5)[0] = f_.scale.get()[row];
        room.mask.get()[0] = -1;
        kernels.gradients(f_.form, room.get(6), 1, room.get(2), room.get(3), room.get(4), room.mask.get(), room.get(0));
        kernels.scores(room.get(6), room.get(0), 1, f_.temperature, f_.representation ? room.get(5) : nullptr,
                       room.get(1));
        judge(tally, row, x.col0 + x.j0 + j, true, room.get(0)[0], room.get(1)[0]);
      }
    }
  }

  // ---- the answer from what was collected

  std::vector<std::vector<Entry<T>>> by_cell(std::vector<Entry<T>> found) const {
    std::vector<std::vector<Entry<T>>> cells(cells_);
    if (cells_ == 1) {
      cells[0] = std::move(found);
      return cells;
    }
    std::vector<int64_t> count(cells_, 0);
    for (const Entry<T>& e : found) ++count[cell_of(e)];
    for (int64_t c = 0; c < cells_; ++c) cells[c].reserve(count[c]);
    for (const Entry<T>& e : found) cells[cell_of(e)].push_back(e);
    return cells;
  }

  // Moves the k first of `entries` to the front. Many are sorted out by a histogram of their bits.
  static void first_of(std::vector<Entry<T>>& entries, int64_t k) {
    if (k <= 0 || k >= static_cast<int64_t>(entries.size())) return;
    auto begin = entries.begin(), end = entries.end();
    if (entries.size() > 4096) {
      uint64_t low = bits_of(entries[0].r), high = low;
      for (const Entry<T>& e : entries) {
        low = std::min(low, bits_of(e.r));
        high = std::max(high, bits_of(e.r));
      }
      Bracket range;
      range.low = low;
      range.high = high + 1;
      constexpr int64_t bins = 65536;
      const int shift = range.shift(bins);
      std::vector<int32_t> histogram(bins, 0);
      for (const Entry<T>& e : entries) ++histogram[(bits_of(e.r) - low) >> shift];
      int64_t bin = bins, above = 0;
      while (above + histogram[bin - 1] < k) above += histogram[--bin];
      --bin;
      const auto bin_of = [&](const Entry<T>& e) { return static_cast<int64_t>((bits_of(e.r) - low) >> shift); };
      begin = std::partition(begin, end, [&](const Entry<T>& e) { return bin_of(e) > bin; });
      end = std::partition(begin, end, [&](const Entry<T>& e) { return bin_of(e) == bin; });
    }
    auto last = entries.begin() + (k - 1);
    std::nth_element(begin, last, end, before<T>);
  }

  std::vector<Entry<T>> best(std::vector<Entry<T>> found) {
    std::vector<std::vector<Entry<T>>> cells = by_cell(std::move(found));
    parallel(cells_, [&](int64_t c) {
      std::vector<Entry<T>>& entries = cells[c];
      if (k_[c] == 0) {
        threshold[c] = kInf;
        entries.clear();
        return;
      }
      if (static_cast<int64_t>(entries.size()) <= k_[c]) {
        // all there are, if no pair lies below the bound; one that may is the last of k
        if (static_cast<int64_t>(entries.size()) < k_[c] || low_[c] <= 1) return;
        first_of_all(c, entries);
        return;
      }
      first_of(entries, k_[c]);
      entries.resize(k_[c]);
      first_of_all(c, entries);
    });
    if (cells_ == 1) return std::move(cells[0]);
    std::vector<Entry<T>> all;
    for (auto& entries : cells) all.insert(all.end(), entries.begin(), entries.end());
    return all;
  }
  // threshold and cut from the last of the chosen
  void first_of_all(int64_t c, const std::vector<Entry<T>>& chosen) {
    const Entry<T>& last = *std::max_element(chosen.begin(), chosen.end(), before<T>);
    threshold[c] = last.r;
    cut[c] = f_.place(last.i, last.j);
  }

  // By anchor, then by candidate: two counting sorts.
  std::vector<Entry<T>> in_order(std::vector<Entry<T>> entries) const {
    std::vector<Entry<T>> by_candidate(entries.size());
    counting_sort(entries, by_candidate, f_.pairs.key().count(), [](const Entry<T>& e) { return e.j; });
    counting_sort(by_candidate, entries, f_.pairs.query.count(), [](const Entry<T>& e) { return e.i; });
    return entries;
  }
  template <class Key>
  static void counting_sort(const std::vector<Entry<T>>& from, std::vector<Entry<T>>& to, int64_t n, Key&& key) {
    std::vector<int64_t> next(n + 1, 0);
    for (const Entry<T>& e : from) ++next[key(e) + 1];
    for (int64_t i = 0; i < n; ++i) next[i + 1] += next[i];
    for (const Entry<T>& e : from) to[next[key(e)]++] = e;
  }

  // ---- 3. thresholds by counting

  void exact() {
    std::vector<Bracket> cell(cells_);
    const uint64_t top = bits_of(kInf);
    for (int64_t c = 0; c < cells_; ++c) {
      cell[c].k = k_[c];
      cell[c].low = low_.empty() ? 1 : low_[c];
      cell[c].high = low_.empty() ? top : std::min(high_[c], top);
      if (cell[c].high <= cell[c].low) cell[c].high = cell[c].low + 1;
      threshold[c] = k_[c] == 0 ? kInf : T(0);
      cut[c] = -1;
      cell[c].done = k_[c] == 0;
    }
    const int64_t few = std::max<int64_t>(64, (int64_t{1} << 21) / cells_);
    auto narrow = [&] {
      for (const Bracket& b : cell)
        if (!b.done && (b.inside < 0 || (b.inside > few && b.high - b.low > 1))) return true;
      return false;
    };
    while (narrow()) count(cell, few);
    finish(cell, few);
  }

  // One sweep: how many scores of each cell lie in the bins of its interval and above it; then the interval shrinks.
  void count(std::vector<Bracket>& cell, int64_t few) const {
    const int64_t bins = std::max<int64_t>(64, std::min<int64_t>(65536, (int64_t{1} << 22) / cells_));
    std::vector<int64_t> histogram(cells_ * bins, 0), above(cells_, 0);
    std::vector<int> shift(cells_);
    std::vector<T> low(cells_), high(cells_);
    for (int64_t c = 0; c < cells_; ++c) {
      if (!cell[c].done) shift[c] = cell[c].shift(bins);
      low[c] = cell[c].done ? kInf : score_of(cell[c].low, T());
      high[c] = cell[c].done ? kInf : score_of(cell[c].high, T());
    }
    std::vector<Entry<T>> none;
    sweep(
        low, &high, above.data(), kNoLimit,
        [&](int64_t c, const Entry<T>& e) {
          __atomic_fetch_add(&histogram[c * bins + ((bits_of(e.r) - cell[c].low) >> shift[c])], 1, __ATOMIC_RELAXED);
          return false;
        },
        none);
    for (int64_t c = 0; c < cells_; ++c) {
      Bracket& b = cell[c];
      if (b.done) continue;
      int64_t inside = 0;
      for (int64_t k = 0; k < bins; ++k) inside += histogram[c * bins + k];
      const uint64_t top = bits_of(kInf);
      if (above[c] >= b.k) {  // the sample was too low
        b.low = b.high;
        b.high = top;
        b.inside = above[c];
        b.above = 0;
        if (b.inside <= few) continue;
        b.inside = -1;
      } else if (b.low <= 1 && above[c] + inside <= b.k) {
        b.done = true;  // all pairs with a score are wanted
      } else if (above[c] + inside < b.k) {
        b.high = b.low;
        b.low = 1;
        b.inside = -1;
      } else {
        int64_t bin = bins, reached = above[c];
        while (reached + histogram[c * bins + bin - 1] < b.k) reached += histogram[c * bins + --bin];
        --bin;
        const uint64_t base = b.low, end = b.high;
        b.above = reached;
        b.inside = histogram[c * bins + bin];
        b.low = base + (static_cast<uint64_t>(bin) << shift[c]);
        b.high = std::min(end, base + (static_cast<uint64_t>(bin + 1) << shift[c]));
      }
    }
  }

  // The k-th pair of every cell is among the few of its interval, or among many equal ones.
  void finish(std::vector<Bracket>& cell, int64_t few) {
    std::vector<T> low(cells_), high(cells_);
    std::vector<int64_t> above(cells_, 0);
    bool many = false, open = false;
    for (int64_t c = 0; c < cells_; ++c) {
      low[c] = cell[c].done ? kInf : score_of(cell[c].low, T());
      high[c] = cell[c].done ? kInf : score_of(cell[c].high, T());
      open = open || !cell[c].done;
      many = many || (!cell[c].done && cell[c].inside > few);
    }
    if (!open) return;
    const int64_t n = f_.pairs.query.count();
    std::vector<int64_t> ties(many ? f_.classes * n : 0, 0);  // equal scores per anchor
    std::vector<Entry<T>> found;
    sweep(
        low, &high, above.data(), kNoLimit,
        [&](int64_t c, const Entry<T>& e) {
          if (cell[c].inside <= few) return true;
          __atomic_fetch_add(&ties[c / f_.units * n + e.i], 1, __ATOMIC_RELAXED);
          return false;
        },
        found);
    std::vector<int64_t> row(cells_, -1), rest(cells_, 0);
    std::vector<std::vector<Entry<T>>> entries = by_cell(std::move(found));
    for (int64_t c = 0; c < cells_; ++c) {
      if (cell[c].done) continue;
      rest[c] = cell[c].k - cell[c].above;
      if (cell[c].inside > few) continue;
      settle(c, entries[c], rest[c]);
      cell[c].done = true;
    }
    if (!many) return;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t kind = 0; kind < f_.classes; ++kind) {
        const int64_t c = f_.cell(i, kind == 0);
        if (cell[c].done || row[c] >= 0) continue;
        if (rest[c] <= ties[kind * n + i])
          row[c] = i;
        else
          rest[c] -= ties[kind * n + i];
      }
    std::vector<Entry<T>> equal;
    sweep(
        low, &high, above.data(), kNoLimit,
        [&](int64_t c, const Entry<T>& e) { return !cell[c].done && e.i == row[c]; }, equal);
    entries = by_cell(std::move(equal));
    for (int64_t c = 0; c < cells_; ++c)
      if (!cell[c].done) settle(c, entries[c], rest[c]);
  }
  void settle(int64_t c, std::vector<Entry<T>>& entries, int64_t k) {
    std::nth_element(entries.begin(), entries.begin() + (k - 1), entries.end(), before<T>);
    threshold[c] = entries[k - 1].r;
    cut[c] = f_.place(entries[k - 1].i, entries[k - 1].j);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_topk_cpu(
    const Tensor& query, const OptionalTensor& key, const OptionalTensor& query_labels,
    const OptionalTensor& key_labels, const OptionalTensor& positives, const Tensor& statistics, const Tensor& k,
    int64_t capacity, std::string form, std::string score, std::string scope, int64_t ignore_index, double temperature,
    bool normalize, bool across) {
  return in_compute_type(query, [&](auto tag) {
    using T = decltype(tag);
    PairFilter<T> filter(query, key, query_labels, key_labels, positives, statistics, form, score, scope, ignore_index,
                         temperature, normalize, across);
    STD_TORCH_CHECK(k.dim() == 2 && k.size(0) <= 2 && k.size(1) == filter.units && k.is_contiguous() &&
                        k.scalar_type() == ScalarType::Long,
                    "medcl: k must be contiguous int64 (1 or 2, ", filter.units, ")");
    filter.classes = k.size(0);
    TopK<T> top(filter, static_cast<const int64_t*>(k.const_data_ptr()));
    std::vector<Entry<T>> chosen;
    if (capacity > 0)
      chosen = top.list();
    else
      top.thresholds();
    const int64_t found = static_cast<int64_t>(chosen.size());
    STD_TORCH_CHECK(capacity == 0 || found <= capacity, "medcl: the list holds ", capacity, " pairs, k asks for ",
                    found);
    Tensor anchor = torch::stable::new_empty(query, std::vector<int64_t>{capacity}, ScalarType::Long);
    Tensor candidate = torch::stable::new_empty(query, std::vector<int64_t>{capacity}, ScalarType::Long);
    Tensor gradient = per_row(query, {capacity});
    Tensor threshold = per_row(query, {k.size(0), k.size(1)});
    Tensor cut = torch::stable::new_empty(query, std::vector<int64_t>{k.size(0), k.size(1)}, ScalarType::Long);
    int64_t* i = static_cast<int64_t*>(anchor.mutable_data_ptr());
    int64_t* j = static_cast<int64_t*>(candidate.mutable_data_ptr());
    T* g = static_cast<T*>(gradient.mutable_data_ptr());
    for (int64_t e = 0; e < capacity; ++e) {
      const bool used = e < found;
      i[e] = used ? filter.pairs.query.slot[chosen[e].i] : -1;
      j[e] = used ? filter.pairs.key().slot[chosen[e].j] : -1;
      g[e] = used ? chosen[e].g : T(0);
    }
    std::copy(top.threshold.begin(), top.threshold.end(), static_cast<T*>(threshold.mutable_data_ptr()));
    std::copy(top.cut.begin(), top.cut.end(), static_cast<int64_t*>(cut.mutable_data_ptr()));
    return std::make_tuple(anchor, candidate, gradient, threshold, cut);
  });
}

}  // namespace medcl
