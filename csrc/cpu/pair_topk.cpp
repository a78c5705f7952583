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
#include "cpu/pair_sample.h"

namespace medcl {
namespace {

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
  TopK(const PairFilter<T>& filter, const int64_t* k) : f_(filter), sweep_(filter), k_(k), cells_(filter.cells()) {
    threshold.assign(cells_, T(0));
    cut.assign(cells_, -1);
    for (int64_t c = 0; c < cells_; ++c) total_ += k[c];
  }

  std::vector<T> threshold;
  std::vector<int64_t> cut;

  // The k best of every cell in the order of (i, j).
  std::vector<Entry<T>> list() {
    take(PairSample<T>(f_, k_, /*both=*/false));
    std::vector<T> bound(cells_);
    for (int64_t c = 0; c < cells_; ++c) bound[c] = k_[c] == 0 ? kInf : score_of(low_[c], T());
    std::vector<Entry<T>> found;
    found.reserve(total_ + total_ / 3);
    const auto all = [](int64_t, const Entry<T>&) { return true; };
    if (sweep_.run(bound, nullptr, nullptr, 4 * total_ + (int64_t{1} << 20), all, found) && enough(found, bound))
      return in_order(best(std::move(found)));
    low_.clear();  // the sample has misled
    exact();
    found.clear();
    sweep_.run(
        threshold, nullptr, nullptr, kNoLimit,
        [&](int64_t c, const Entry<T>& e) { return e.r > threshold[c] || f_.place(e.i, e.j) <= cut[c]; }, found);
    return in_order(std::move(found));
  }

  void thresholds() {
    take(PairSample<T>(f_, k_, /*both=*/true));
    exact();
  }

 private:
  static constexpr T kInf = std::numeric_limits<T>::infinity();
  static constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  const PairFilter<T>& f_;
  const PairSweep<T> sweep_;
  const int64_t* k_;
  const int64_t cells_;
  int64_t total_ = 0;
  std::vector<uint64_t> low_, high_;  // empty: nothing is known

  void take(PairSample<T> sample) {
    low_ = std::move(sample.low);
    high_ = std::move(sample.high);
  }

  // Whether every cell has its k, or all there are.
  bool enough(const std::vector<Entry<T>>& found, const std::vector<T>& bound) const {
    std::vector<int64_t> count(cells_, 0);
    for (const Entry<T>& e : found) ++count[sweep_.cell_of(e)];
    for (int64_t c = 0; c < cells_; ++c)
      if (count[c] < k_[c] && bits_of(bound[c]) > 1) return false;
    return true;
  }
  // ---- the answer from what was collected

  std::vector<std::vector<Entry<T>>> by_cell(std::vector<Entry<T>> found) const {
    std::vector<std::vector<Entry<T>>> cells(cells_);
    if (cells_ == 1) {
      cells[0] = std::move(found);
      return cells;
    }
    std::vector<int64_t> count(cells_, 0);
    for (const Entry<T>& e : found) ++count[sweep_.cell_of(e)];
    for (int64_t c = 0; c < cells_; ++c) cells[c].reserve(count[c]);
    for (const Entry<T>& e : found) cells[sweep_.cell_of(e)].push_back(e);
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
    sweep_.run(
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
    sweep_.run(
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
    sweep_.run(
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
