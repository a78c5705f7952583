// The gradient of pair_filtered_grad on the GPU (medcl_kernels/reference/pair_filtered_grad.py): by the rule, all pairs
// again with the others masked out; or by a list.
#include "cuda/listed.cuh"
#include "cuda/pair_filter.cuh"

namespace medcl::cuda {

struct FilteredArguments : GradientArguments {
  PairScores scores;
};

// w_ij = g_i G_ij + g_j G_ji as far as the sides are anchors and the pair is kept.
template <class T>
struct FilteredGradient : RowGradient<T> {
  static constexpr int kMinBlocks = 1;
  using Arguments = FilteredArguments;
  using Base = RowGradient<T>;
  static constexpr bool kFixedOrder = true;
  const PairScores& scores;

  __device__ FilteredGradient(const Arguments& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : Base(a, p, block, l, state), scores(a.scores) {
#pragma unroll
    for (int k = 0; k < kAnchorTerms; ++k)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) this->keep(k, m, h, this->owned_term(a.owned_terms, k, m, h));
  }

  // g G of a pair for one of its rows as the anchor, 0 where it is not kept. ties(): the anchor's third Term
  template <class F>
  MEDCL_DEVICE float share(const Anchor& anchor, float s, bool positive, int candidate, F&& ties) const {
    const float g = scores.gradient(s, anchor.constants, positive), rank = scores.rank(g, s, anchor.inverse_norm);
    const float limit = positive ? anchor.limit : anchor.negative_limit;
    bool kept = rank > limit;
    if (rank == limit && rank > 0.f) {
      const Term last = ties();
      kept = candidate <= bit_copy<int32_t>(positive ? last.bias : last.weight);
    }
    return kept ? anchor.upstream * g : 0.f;
  }

  MEDCL_DEVICE Term ties_of(const View& v, int column) const {
    float x[4];
    ptx::load_shared_alone(x, v.terms + (2 * T::kColumns + column) * sizeof(Term));
    return Term{x[0], x[1], x[2], bit_copy<int32_t>(x[3])};
  }

  MEDCL_DEVICE void tile(typename T::Scores& s, const View& v) {
    Anchor own[T::kRowTiles][2];
    int32_t code[T::kRowTiles][2];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        own[m][h] = Anchor(this->kept_term(0, m, h), this->kept_term(1, m, h));
        code[m][h] = own[m][h].constants.code;
      }
    const bool by_owned = this->a.owned_anchors, by_streamed = this->a.streamed_anchors;
    const PositivePairs<T> positive = positive_pairs<T>(*this, scores.named, v, code, by_owned);
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + this->l.t * 2 + e;
        const Anchor other(this->column_term(v, 0, column), this->column_term(v, 1, column));
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x = s[m][n][h * 2 + e];
            const bool is_positive = positive.has(m, h, n, e);
            float w = 0.f;
            if (x != -INFINITY && code[m][h] >= 0 && other.constants.code >= 0) {
              if (by_owned)
                w = share(own[m][h], x, is_positive, v.column0 + column, [&] { return this->kept_term(2, m, h); });
              if (by_streamed) w += share(other, x, is_positive, this->row(m, h), [&] { return ties_of(v, column); });
            }
            s[m][n][h * 2 + e] = w;
          }
      }
    add_weighted_rows<T>(s, v.rows, this->l, this->sums);
  }
};

void pair_filtered_grad_backward(Workspace& w, const Sides& sides, const Options& o, const Filter& f,
                                 const float* d_value, const float* threshold, const int64_t* cut, const Rows& d_query,
                                 const Rows& d_key) {
  const PackedSides s(w, sides, o, !f.positives);
  TermSource upstream;
  upstream.upstream = d_value;
  const AnchorSource source{d_value, threshold, cut, Units(f.scope, s.query, f.classes), s.scale({upstream})};
  const Term* query_terms = anchor_terms(s, f, source);
  const Term* key_terms = s.self() ? query_terms : candidate_terms(s);
  const auto into = [&](bool to_key, const Rows& d_x) {
    if (!d_x.data) return;
    const Packed& owned = to_key ? s.key() : s.query;
    FilteredArguments a{};
    a.scores = pair_scores(s, f);
    a.owned_terms = to_key ? key_terms : query_terms;
    a.owned_anchors = !to_key;
    a.streamed_anchors = to_key || s.self();
    a.factor = 1.f / o.temperature;
    a.gradient = source.gradient;
    a.out = gradient_rows(w, owned);
    const Pairs pairs = s.pairs(to_key, !to_key, to_key ? query_terms : key_terms, 0, kAnchorTerms);
    run_product<FilterTiles, FilteredGradient>(owned, pairs, a, true, w.stream);
    unpack(w, owned, to_key ? sides.key : sides.query, d_x, a.out, o);
  };
  into(false, d_query);
  if (!s.self()) into(true, d_key);
}

void listed_grad_backward(Workspace& w, const Sides& sides, const Options& o, const PairList& pairs,
                          const float* gradient, const float* d_value, const Rows& d_query, const Rows& d_key) {
  pair_list_backward(w, sides, o, pairs, gradient, d_value, d_query, d_key);
}

}  // namespace medcl::cuda
