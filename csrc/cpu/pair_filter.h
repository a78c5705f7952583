// Gradients of all pairs, tile by tile: the ground under pair_topk and pair_filtered_grad. A similarity and its
// gradient have the same bits in every sweep: the same tiles, the same product, the same kernels.
#pragma once
#include <mutex>

#include "cpu/filter.h"
#include "cpu/logsumexp.h"

namespace medcl {

inline Form parse_form(const std::string& form) {
  STD_TORCH_CHECK(form == "out" || form == "in" || form == "pixel", "medcl: form must be out, in or pixel, got '", form,
                  "'");
  return form == "out" ? Form::out : form == "in" ? Form::in : Form::pixel;
}

// Rows of two tensors, every block of the one with every block of the other, in rounds in which each stands once.
template <class Visit>
void rectangle(int64_t n, int64_t block_n, int64_t m, int64_t block_m, Visit&& tile) {
  const int64_t N = ceil_div(n, block_n), M = ceil_div(m, block_m), most = std::max(N, M);
  for (int64_t round = 0; round < most; ++round)
    parallel(std::min(N, M), [&](int64_t k) {
      const int64_t other = (k + round) % most, I = N <= M ? k : other, J = N <= M ? other : k;
      tile(I * block_n, std::min(block_n, n - I * block_n), J * block_m, std::min(block_m, m - J * block_m));
    });
}

// One direction of one row of a tile: pairs of the fixed row with rows first ... first + n of the other side (of the
// same side in self mode). Anchors are the fixed row, or, mirrored, the others.
template <class T>
struct PairRow {
  int64_t group, fixed, first, n;  // rows count from the beginning of the group
  bool mirrored;
  const T *s, *g, *r;
  const int32_t* positive;
};

template <class T>
struct PairFilter {
  Pairing<T> pairs;
  Form form;
  bool representation;
  T temperature;
  // per packed anchor, over all groups, kSpare to spare: the row constants, 1 / norm for (G4), the unit
  Buffer<T> a, b, c, scale;
  std::vector<int64_t> unit;
  std::vector<int32_t> query_code, key_code;          // labels; empty where positives come by index
  std::vector<int32_t> positive_first, positive_key;  // by index: packed key rows of an anchor's positives, ascending
  int64_t units = 1, classes = 1, candidates = 0;     // candidates: key rows of the whole batch
  bool by_anchor = false;                             // every anchor is a unit

  PairFilter(const Tensor& query, const OptionalTensor& key, const OptionalTensor& query_labels,
             const OptionalTensor& key_labels, const OptionalTensor& positives, const Tensor& statistics,
             const std::string& form_, const std::string& score, const std::string& scope, int64_t ignore,
             double temperature_, bool normalize, bool across)
      : pairs(query, key, query_labels, key_labels, "all", ignore, temperature_, normalize, across,
              /*classes=*/!positives.has_value()),
        form(parse_form(form_)),
        representation(score == "representation"),
        temperature(static_cast<T>(temperature_)) {
    const int64_t B = query.size(0), L = query.size(2), n = pairs.query.count();
    const T* constants = row_values<T>(statistics, 3 * B * L);
    STD_TORCH_CHECK(scope == "global" || scope == "image" || scope == "anchor",
                    "medcl: scope must be image, global or anchor, got '", scope, "'");
    by_anchor = scope == "anchor";
    units = scope == "global" ? 1 : scope == "image" ? B : B * L;
    candidates = key.has_value() ? key->size(0) * key->size(2) : B * L;
    unit.resize(n);
    Buffer<T>* rows[] = {&a, &b, &c};
    for (int k = 0; k < 3; ++k) {
      T* to = rows[k]->reserve(n + kSpare);
      for (int64_t i = 0; i < n; ++i) to[i] = constants[k * B * L + pairs.query.slot[i]];
      std::fill_n(to + n, kSpare, T(0));
    }
    for (int64_t i = 0; i < n; ++i)
      unit[i] = scope == "global" ? 0 : scope == "image" ? pairs.query.slot[i] / L : pairs.query.slot[i];
    if (representation) {
      std::fill_n(scale.reserve(n + kSpare) + n, kSpare, T(0));
      STD_TORCH_CHECK(normalize, "medcl: score representation needs normalize");
      for (int64_t i = 0; i < n; ++i) scale.get()[i] = static_cast<T>(pairs.query.inverse.get()[i]);
    }
    if (positives.has_value()) {
      index_positives(*positives);
    } else {
      STD_TORCH_CHECK(query_labels.has_value(), "medcl: positives need labels or an index");
      query_code = pairs.query.code;
      query_code.resize(n + kSpare, -1);
      key_code = pairs.key().code;
      key_code.resize(pairs.key().count() + kSpare, -1);
    }
  }

  int64_t cells() const { return classes * units; }
  int64_t cell(int64_t anchor, bool positive) const { return (classes == 2 && !positive ? units : 0) + unit[anchor]; }
  // i * N + j over the rows of the whole batch
  int64_t place(int64_t anchor, int64_t candidate) const {
    return pairs.query.slot[anchor] * candidates + pairs.key().slot[candidate];
  }
  int64_t block(int64_t n) const { return triangle_block(n); }

  // The similarities of a tile; always this product.
  static void similarities(const Problem<T>& p, int64_t i0, int64_t m, int64_t j0, int64_t w, T* s) {
    const int64_t dim = p.query.rows.dim;
    const Tile<T> x = p.query.pack(i0, m, scratch<T>(kOwn, m * dim), p.query.natural());
    const Tile<T> y = p.key.pack(j0, w, scratch<T>(kFactor, w * dim), Layout::channel_major);
    scores(x, m, y, w, dim, p.alpha, s, w);
  }

  // visit(problem, group, i0, m, j0, w, S) for every tile of a group; each row block once at a time
  template <class Visit>
  void tiles(int64_t group, Visit&& visit) const {
    const Problem<T> p = pairs.problem(group);
    const int64_t n = p.query.rows.n, keys = p.key.rows.n;
    auto tile = [&](int64_t i0, int64_t m, int64_t j0, int64_t w, auto...) {
      T* s = scratch<T>(kScores, m * w + kSpare);
      similarities(p, i0, m, j0, w, s);
      std::fill_n(s + m * w, kSpare, T(0));
      visit(p, i0, m, j0, w, s);
    };
    if (p.self)
      triangle(n, block(n), false, tile, [](int64_t, int64_t) {});
    else
      rectangle(n, block(n), keys, block(keys), tile);
  }

  // Room for the evaluation of one row.
  struct Arrays {
    Buffer<T> values;
    Buffer<int32_t> mask;
    int64_t width = 0;
    T* get(int which) { return values.get() + which * width; }
    void fit(int64_t n) {
      if (n + 2 * kSpare <= width) return;
      width = (n + 3 * kSpare) / kSpare * kSpare;
      values.reserve(7 * width);
      mask.reserve(width);
      std::fill_n(values.get(), 7 * width, T(0));
      std::fill_n(mask.get(), width, 0);
    }
  };
  static Arrays& arrays(int64_t n) {
    static thread_local Arrays room;
    room.fit(n);
    return room;
  }

  // Gradients and scores of row i of a tile, in one or both directions: visit(PairRow). `s` has kSpare readable behind.
  template <class Visit>
  void evaluate(const Problem<T>& p, int64_t group, int64_t i, int64_t j0, int64_t w, const T* s, bool mirrored,
                Arrays& room, Visit&& visit) const {
    const auto& kernels = filter_kernels<T>();
    const int64_t row = pairs.query.begin[group] + i, col = pairs.key().begin[group] + j0;
    mark(row, col, j0, w, room.mask.get());
    T *g = room.get(0), *r = room.get(1);
    const T* weight = nullptr;
    if (representation) {
      std::fill_n(room.get(5), w, scale.get()[row]);
      weight = room.get(5);
    }
    std::fill_n(room.get(2), w, a.get()[row]);
    std::fill_n(room.get(3), w, b.get()[row]);
    std::fill_n(room.get(4), w, c.get()[row]);
    kernels.gradients(form, s, w, room.get(2), room.get(3), room.get(4), room.mask.get(), g);
    kernels.scores(s, g, w, temperature, weight, r);
    if (p.self && i >= j0 && i < j0 + w) g[i - j0] = r[i - j0] = T(0);
    visit(PairRow<T>{group, i, j0, w, false, s, g, r, room.mask.get()});
    if (!mirrored) return;
    kernels.gradients(form, s, w, a.get() + col, b.get() + col, c.get() + col, room.mask.get(), g);
    kernels.scores(s, g, w, temperature, representation ? scale.get() + col : nullptr, r);
    visit(PairRow<T>{group, i, j0, w, true, s, g, r, room.mask.get()});
  }

  // visit(PairRow) for all directed pairs; begin() and end(state) around every tile
  template <class Begin, class Visit, class End>
  void sweep_all(Begin&& begin, Visit&& visit, End&& end) const {
    each_group(pairs.groups(), [&](int64_t group) {
      tiles(group, [&](const Problem<T>& p, int64_t i0, int64_t m, int64_t j0, int64_t w, const T* s) {
        auto state = begin();
        Arrays& room = arrays(w);
        for (int64_t i = 0; i < m; ++i)
          evaluate(p, group, i0 + i, j0, w, s + i * w, p.self && i0 != j0, room,
                   [&](const PairRow<T>& x) { visit(state, x); });
        end(state);
      });
    });
  }

  // positive[j] = -1 where key row j0 + j has the anchor's label, or is named by it
  void mark(int64_t row, int64_t col, int64_t j0, int64_t w, int32_t* positive) const {
    if (!query_code.empty()) {
      const int32_t code = query_code[row];
      const int32_t* codes = key_code.data() + col;
      for (int64_t j = 0; j < w; ++j) positive[j] = -static_cast<int32_t>(codes[j] == code);
      return;
    }
    std::fill_n(positive, w, 0);
    for (int32_t k = positive_first[row]; k < positive_first[row + 1]; ++k)
      if (positive_key[k] >= j0 && positive_key[k] < j0 + w) positive[positive_key[k] - j0] = -1;
  }
  bool is_positive(int64_t row, int64_t col, int64_t j) const {
    if (!query_code.empty()) return query_code[row] == key_code[col];
    return std::binary_search(positive_key.begin() + positive_first[row],
                              positive_key.begin() + positive_first[row + 1], static_cast<int32_t>(j));
  }

 private:
  void index_positives(const Tensor& positives) {
    STD_TORCH_CHECK(positives.dim() == 3 && positives.is_contiguous() && positives.scalar_type() == ScalarType::Long,
                    "medcl: positives must be contiguous int64 (B, L, R)");
    STD_TORCH_CHECK(!pairs.self && !pairs.key().partial, "medcl: positives by index need a key without labels");
    const int64_t* all = static_cast<const int64_t*>(positives.const_data_ptr());
    const int64_t L = positives.size(1), R = positives.size(2), Lk = pairs.key().length, n = pairs.query.count();
    positive_first.reserve(n + 1);
    for (int64_t i = 0; i < n; ++i) {
      positive_first.push_back(static_cast<int32_t>(positive_key.size()));
      const int64_t slot = pairs.query.slot[i], image = slot / L;
      for (int64_t k = 0; k < R; ++k) {
        const int64_t j = all[slot * R + k];
        STD_TORCH_CHECK(j < Lk, "medcl: a positive is not in the key: ", j, " of ", Lk, " pixels");
        if (j >= 0) positive_key.push_back(static_cast<int32_t>(pairs.across ? image * Lk + j : j));
      }
      std::sort(positive_key.begin() + positive_first.back(), positive_key.end());
    }
    positive_first.push_back(static_cast<int32_t>(positive_key.size()));
  }
};

}  // namespace medcl
