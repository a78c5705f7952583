// One sweep over all pairs that shows those whose score reaches a bound. Most are passed over by comparing their
// similarity, without exp.
#pragma once
#include <atomic>

#include "cpu/pair_filter.h"

namespace medcl {

template <class T>
struct Entry {
  int32_t i, j;  // packed rows over all groups
  T g, r;
};

template <class T>
bool before(const Entry<T>& x, const Entry<T>& y) {  // (-R, i * N + j); packed order is slot order
  return x.r != y.r ? x.r > y.r : x.i != y.i ? x.i < y.i : x.j < y.j;
}

template <class T>
class PairSweep {
 public:
  explicit PairSweep(const PairFilter<T>& filter) : f_(filter), cells_(filter.cells()) {}

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
  bool run(const std::vector<T>& low, const std::vector<T>* high, int64_t* above, int64_t most, Keep&& keep,
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

 private:
  static constexpr T kInf = std::numeric_limits<T>::infinity();
  const PairFilter<T>& f_;
  const int64_t cells_;

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
};

}  // namespace medcl
