// The gradient of a loss with respect to every similarity, its score, and who is kept: the ground under pair_topk and
// pair_filtered_grad. A pair has the same bits in every kernel: scores are summed up in one order, and what is made of
// them is rounded operation by operation.
#pragma once
#include "cuda/sides.cuh"

namespace medcl::cuda {

// An anchor is three Terms, streamed like any others:
//   0  a, b, c in units of log 2 (b as it is where it is no log-sum-exp), code
//   1  1 / norm, upstream gradient, limit of positives, limit of negatives
//   2  the last candidate that is kept where a score is on the limit, of positives and of negatives (integers)
// A row that is no anchor has the code.
constexpr int kAnchorTerms = 3;

struct Anchor {
  Term constants;
  float inverse_norm, upstream, limit, negative_limit;
  MEDCL_DEVICE Anchor() {}
  MEDCL_DEVICE Anchor(const Term& constants, const Term& rule)
      : constants(constants),
        inverse_norm(rule.bias),
        upstream(rule.weight),
        limit(rule.level),
        negative_limit(bit_copy<float>(rule.code)) {}
};

// Positives by index: (rows of the query, several) columns, of the image's own where all images are one set.
struct Named {
  const int64_t* column = nullptr;  // null: positives have the anchor's label
  int several = 0;
  int64_t length = 1, image_columns = 0;  // rows of an image; columns of one, or 0 where a set is an image

  MEDCL_DEVICE int64_t at(int64_t anchor, int k, int64_t row) const {
    const int64_t j = column[anchor * several + k];
    return j < 0 ? -1 : j + row / length * image_columns;
  }
};

struct PairScores {
  Form form;
  bool representation;
  float scale;  // similarity of unit rows to units of log 2
  Named named;

  MEDCL_DEVICE float gradient(float s, const Term& of, bool positive) const {
    const float p = ptx::exp2(fmaf(s, scale, -of.bias));
    if (!positive) return p;
    if (form == Form::out) return ptx::add(p, -of.weight);
    if (form == Form::in) return ptx::add(p, -ptx::exp2(fmaf(s, scale, -of.weight)));
    return -ptx::multiply(of.weight, ptx::reciprocal(ptx::add(1.f, ptx::exp2(fmaf(s, scale, -of.level)))));
  }
  MEDCL_DEVICE float rank(float gradient, float s, float inverse_norm) const {
    const float size = fabsf(gradient);
    if (!representation) return size;
    return ptx::multiply(ptx::multiply(size, sqrtf(fmaxf(fmaf(-s, s, 1.f), 0.f))), inverse_norm);
  }
};

// The positives of a lane's part of a tile, one bit per pair.
template <class T>
struct PositivePairs {
  static_assert(T::kRowTiles * T::kColumnTiles * 4 <= 64, "a bit per pair");
  uint64_t bits = 0;

  static MEDCL_DEVICE int bit(int m, int h, int n, int e) { return ((m * T::kColumnTiles + n) * 2 + h) * 2 + e; }
  MEDCL_DEVICE bool has(int m, int h, int n, int e) const { return bits >> bit(m, h, n, e) & 1; }
  MEDCL_DEVICE void add(int m, int h, int n, int e, bool yes) { bits |= static_cast<uint64_t>(yes) << bit(m, h, n, e); }
};

MEDCL_DEVICE int32_t column_code(uint32_t terms, int column) {
  return static_cast<int32_t>(ptx::load_shared(terms + column * sizeof(Term) + offsetof(Term, code)));
}

// Anchors are the owned rows or, where owned_anchors is false, the streamed ones. code: of the owned rows.
template <class T>
MEDCL_DEVICE PositivePairs<T> positive_pairs(const RowEpilogue<T>& of, const Named& named, const View& v,
                                             const int32_t (&code)[T::kRowTiles][2], bool owned_anchors) {
  PositivePairs<T> found;
  if (!named.column) {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t other = column_code(v.terms, n * 8 + of.l.t * 2 + e);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) found.add(m, h, n, e, code[m][h] == other);
      }
    return found;
  }
  if (owned_anchors) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (code[m][h] < 0) continue;
        const int64_t row = of.row(m, h);
        for (int k = 0; k < named.several; ++k) {
          const int64_t at = named.at(of.block.group * of.p.owned_count + row, k, row) - v.column0;
          const int column = at < 0 || at >= T::kColumns ? -1 : static_cast<int>(at);
          if (column >= 0 && column % 8 / 2 == of.l.t) found.add(m, h, column / 8, column % 2, true);
        }
      }
    return found;
  }
  for (int column = 0; column < T::kColumns; ++column) {
    const int64_t row = v.column0 + column;
    if (column % 8 / 2 != of.l.t || row >= of.p.streamed_count) continue;
    for (int k = 0; k < named.several; ++k) {
      const int64_t at = named.at(of.block.group * of.p.streamed_count + row, k, row);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) found.add(m, h, column / 8, column % 2, at == of.row(m, h));
    }
  }
  return found;
}

// Which selection a row belongs to.
struct Units {
  int64_t rows_each = 1, count = 1;
  int classes = 1;  // 2: positives and negatives apart
  Units() = default;
  Units(Scope scope, const Packed& query, int classes);
  MEDCL_DEVICE int64_t of(int64_t row) const { return row / rows_each; }
  __host__ __device__ int64_t cells() const { return classes * count; }
  // positives come first
  MEDCL_DEVICE int64_t cell(int64_t row, bool positive) const {
    return (classes == 2 && !positive ? count : 0) + of(row);
  }
};

PairScores pair_scores(const PackedSides&, const Filter&);

// Terms of the anchors, or of the key's rows, which have the code alone.
struct AnchorSource {
  const float *upstream = nullptr, *threshold = nullptr;  // (rows), (cells); or null
  const int64_t* cut = nullptr;                           // (cells)
  Units units;
  GradientScale gradient{};
};
Term* anchor_terms(const PackedSides&, const Filter&, const AnchorSource&);
Term* candidate_terms(const PackedSides&);

// Both operations have the same tiles. A warp owns 16 rows: what becomes of a score outweighs its product. Rows of up
// to 128 channels are whole, wider ones streamed.
template <class P>
struct FilterTiles : GradientTiles<P> {
  using Narrow = Tile<P, 64, 8, 1, 64, P::kHalf ? 3 : 2, true>;
  using Widest = typename GradientTiles<P>::Streamed;
};

}  // namespace medcl::cuda
