// What becomes of a tile of scores: row statistics, the best column, or the gradient of the rows.
#pragma once
#include "cuda/engine.cuh"
#include "cuda/terms.cuh"

namespace medcl::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kLeftOut = -2;  // code of an owned row that is left out: no streamed row has it, left out ones have -1

struct Kinds {
  int8_t of[kMaxSelections];
};

// Adds up over the four lanes that share a row.
MEDCL_DEVICE float sum_over_quad(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What the row epilogues have in common: which rows are this lane's, their terms, and the terms of a column.
template <class T>
struct RowEpilogue {
  static constexpr bool kFixedOrder = false;
  const Pairs& p;
  const Block block;
  const Lane l;
  float* const state;
  static constexpr bool kMasked = true;
  static constexpr int kMinBlocks = 0;

  __device__ RowEpilogue(const Pairs& p, const Block& block, const Lane& l, float* state)
      : p(p), block(block), l(l), state(state) {}

  MEDCL_DEVICE int row(int m, int h) const { return block.row0 + (l.warp * T::kRowTiles + m) * 16 + l.g + h * 8; }
  MEDCL_DEVICE bool inside(int m, int h) const { return row(m, h) < p.owned_count; }
  // of an array (selections, groups, owned_count)
  MEDCL_DEVICE int64_t result(int selection, int m, int h) const {
    return (selection * p.groups + block.group) * p.owned_count + row(m, h);
  }
  // of an array (selections, groups, owned_padded); rows past the end read nothing
  MEDCL_DEVICE Term owned_term(const Term* terms, int selection, int m, int h) const {
    if (!inside(m, h)) return Term{-INFINITY, 0.f, 0.f, kLeftOut};
    Term term = terms[(selection * p.groups + block.group) * p.owned_padded + row(m, h)];
    if (term.code < 0) term.code = kLeftOut;
    return term;
  }
  MEDCL_DEVICE Term column_term(const View& v, int selection, int column) const {
    float x[4];
    ptx::load_shared(x, v.terms + (selection * T::kColumns + column) * sizeof(Term));
    return Term{x[0], x[1], x[2], bit_copy<int32_t>(x[3])};
  }
  // A float of this thread's own that lasts from tile to tile.
  template <int Values>
  MEDCL_DEVICE float& kept(int selection, int value, int m, int h) const {
    return state[(((selection * Values + value) * T::kRowTiles + m) * 2 + h) * T::kThreads + threadIdx.x];
  }

  // A sum of exponentials and the maximum that each lane keeps of its own columns, kept as values 0 and 1. The new
  // maxima are `top`: the sums so far are taken along; `top` is 0 where nothing is allowed so far.
  template <int Values>
  MEDCL_DEVICE void raise(int k, float (&top)[T::kRowTiles][2]) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& before = kept<Values>(k, 1, m, h);
        if (top[m][h] == -INFINITY) {
          top[m][h] = 0.f;
          continue;
        }
        kept<Values>(k, 0, m, h) *= ptx::exp2(before - top[m][h]);
        before = top[m][h];
      }
  }
  // The row's sum over all lanes, relative to 2^shift: `shift` is the lanes' common maximum unless the sum has none.
  template <int Values>
  MEDCL_DEVICE float total(int k, int m, int h, bool bounded, float& shift) const {
    float sum = kept<Values>(k, 0, m, h);
    if (!bounded) {
      const float own = kept<Values>(k, 1, m, h);
      float top = fmaxf(own, __shfl_xor_sync(0xffffffffu, own, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      shift = top == -INFINITY ? 0.f : top;
      sum *= ptx::exp2(own - shift);
    }
    return sum_over_quad(sum);
  }

  // factor times the sums of weighted rows, added to `out` (groups, owned_padded, row length) or stored there
  MEDCL_DEVICE void store(const typename T::Sums& sums, float factor, bool add, float* out) const {
    const int64_t length = p.row_bytes / T::kElement;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!inside(m, h)) continue;
        float* to = out + (block.group * p.owned_padded + row(m, h)) * length + block.output * T::kSlab + l.t * 2;
#pragma unroll
        for (int d = 0; d < T::kChannelTiles; ++d)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float x = factor * sums[m][d][h * 2 + e];
            to[d * 8 + e] = add ? to[d * 8 + e] + x : x;
          }
      }
  }
};

MEDCL_DEVICE bool allowed(int kind, int32_t own, int32_t other) {
  return kind == kAll || (own == other) == (kind == kSame);
}

struct LogSumExpArguments {
  const Term* owned_terms;
  Kinds kinds;
  float scale, shift;  // score to units of log 2
  bool bounded;
  float* lse;
};

// lse_i = log sum_j exp(s_ij) over the allowed columns, per selection. Shifted by a bound of the scores that is part
// of the columns' bias, or, where there is none, by a maximum that each lane keeps of its own columns.
template <class T>
struct LogSumExp : RowEpilogue<T> {
  using Arguments = LogSumExpArguments;
  static constexpr bool kTerms = true;
  static constexpr int kValues = 3, kState = kValues * T::kRowTiles * 2;  // sum, maximum, code of the row
  using Base = RowEpilogue<T>;
  const Arguments& a;

  __device__ LogSumExp(const Arguments& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : Base(p, block, l, state), a(a) {
    for (int k = 0; k < p.selections; ++k)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          this->template kept<kValues>(k, 0, m, h) = 0.f;
          this->template kept<kValues>(k, 1, m, h) = -INFINITY;
          this->template kept<kValues>(k, 2, m, h) = bit_copy<float>(this->owned_term(a.owned_terms, k, m, h).code);
        }
  }

  // f(m, h, score in units of log 2) for the allowed pairs of a selection, -inf for the others
  template <class F>
  MEDCL_DEVICE void each(const typename T::Scores& s, const View& v, int k, const int32_t (&code)[T::kRowTiles][2],
                         F&& f) {
    const int kind = a.kinds.of[k];
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Term column = this->column_term(v, k, n * 8 + this->l.t * 2 + e);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x = fmaf(s[m][n][h * 2 + e], a.scale, column.bias);
            f(m, h, allowed(kind, code[m][h], column.code) ? x : -INFINITY);
          }
      }
  }

  MEDCL_DEVICE void tile(const typename T::Scores& s, const View& v) {
    for (int k = 0; k < this->p.selections; ++k) {
      int32_t code[T::kRowTiles][2];
      float sum[T::kRowTiles][2] = {};
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) code[m][h] = bit_copy<int32_t>(this->template kept<kValues>(k, 2, m, h));
      if (a.bounded) {
        each(s, v, k, code, [&](int m, int h, float x) { sum[m][h] += ptx::exp2(x); });
      } else {
        float top[T::kRowTiles][2];
        raise_maximum(s, v, k, code, top);
        each(s, v, k, code, [&](int m, int h, float x) { sum[m][h] += ptx::exp2(x - top[m][h]); });
      }
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) this->template kept<kValues>(k, 0, m, h) += sum[m][h];
    }
  }

  // Takes the lane's maxima up to this tile's and its sums along; `top` is 0 where nothing is allowed so far.
  MEDCL_DEVICE void raise_maximum(const typename T::Scores& s, const View& v, int k,
                                  const int32_t (&code)[T::kRowTiles][2], float (&top)[T::kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) top[m][h] = this->template kept<kValues>(k, 1, m, h);
    each(s, v, k, code, [&](int m, int h, float x) { top[m][h] = fmaxf(top[m][h], x); });
    this->template raise<kValues>(k, top);
  }

  MEDCL_DEVICE void finish() {
    for (int k = 0; k < this->p.selections; ++k)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float shift = a.shift;
          const float total = this->template total<kValues>(k, m, h, a.bounded, shift);
          const bool valid = bit_copy<int32_t>(this->template kept<kValues>(k, 2, m, h)) >= 0;
          if (this->l.t == 0 && this->inside(m, h))
            a.lse[this->result(k, m, h)] = valid && total > 0.f ? (shift + log2f(total)) * kLn2 : -INFINITY;
        }
  }
};

struct PositiveLogArguments {
  const Term* owned_terms;
  float scale;
  float *sum, *tail;
};

// sum_p log(exp(s_ip) + exp(n_i)) over the columns of the row's label, and sum_p exp(n_i) / (exp(s_ip) + exp(n_i)).
// What the first exceeds max(s_ip, n_i) by are logarithms of numbers between 1 and 2, whose product has the sum as its
// own.
template <class T>
struct PositiveLog : RowEpilogue<T> {
  using Arguments = PositiveLogArguments;
  static constexpr bool kTerms = true;
  static constexpr int kValues = 4, kState = kValues * T::kRowTiles * 2;  // sum, tail, level and code of the row
  static_assert(2 * T::kColumnTiles < 127, "products of numbers up to 2");
  using Base = RowEpilogue<T>;
  const Arguments& a;

  __device__ PositiveLog(const Arguments& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : Base(p, block, l, state), a(a) {
    for (int k = 0; k < p.selections; ++k)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Term own = this->owned_term(a.owned_terms, k, m, h);
          this->template kept<kValues>(k, 0, m, h) = this->template kept<kValues>(k, 1, m, h) = 0.f;
          this->template kept<kValues>(k, 2, m, h) = own.level;
          this->template kept<kValues>(k, 3, m, h) = bit_copy<float>(own.code);
        }
  }

  MEDCL_DEVICE void tile(const typename T::Scores& s, const View& v) {
    for (int k = 0; k < this->p.selections; ++k) {
      int32_t code[T::kRowTiles][2];
      float level[T::kRowTiles][2], sum[T::kRowTiles][2] = {}, tail[T::kRowTiles][2] = {};
      float factor[T::kRowTiles][2];  // of numbers up to 2: one logarithm for all of them
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          factor[m][h] = 1.f;
          level[m][h] = this->template kept<kValues>(k, 2, m, h);
          code[m][h] = bit_copy<int32_t>(this->template kept<kValues>(k, 3, m, h));
        }
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int32_t column = this->column_term(v, k, n * 8 + this->l.t * 2 + e).code;
#pragma unroll
          for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float score = s[m][n][h * 2 + e];
              if (column != code[m][h] || score == -INFINITY) continue;
              const float x = score * a.scale, above = x - level[m][h];  // +inf where there is no negative
              const float smaller = ptx::exp2(-fabsf(above));
              sum[m][h] += fmaxf(x, level[m][h]);
              factor[m][h] *= 1.f + smaller;
              tail[m][h] += (above > 0.f ? smaller : 1.f) * ptx::reciprocal(1.f + smaller);
            }
        }
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          this->template kept<kValues>(k, 0, m, h) += sum[m][h] + ptx::log2(factor[m][h]);
          this->template kept<kValues>(k, 1, m, h) += tail[m][h];
        }
    }
  }

  MEDCL_DEVICE void finish() {
    for (int k = 0; k < this->p.selections; ++k)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float sum = sum_over_quad(this->template kept<kValues>(k, 0, m, h));
          const float tail = sum_over_quad(this->template kept<kValues>(k, 1, m, h));
          if (this->l.t != 0 || !this->inside(m, h)) continue;
          a.sum[this->result(k, m, h)] = sum * kLn2;
          a.tail[this->result(k, m, h)] = tail;
        }
  }
};

struct ArgmaxArguments {
  int64_t* index;
  float* value;
};

// The column with the largest score, the smallest of equals. Equal rows have equal scores wherever they stand,
// because every score is summed in the same order.
template <class T>
struct Argmax : RowEpilogue<T> {
  using Arguments = ArgmaxArguments;
  static constexpr bool kTerms = false;
  static constexpr int kState = 0;
  using Base = RowEpilogue<T>;
  const Arguments& a;
  float best[T::kRowTiles][2];
  int at[T::kRowTiles][2];

  __device__ Argmax(const Arguments& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : Base(p, block, l, state), a(a) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        best[m][h] = -INFINITY;
        at[m][h] = 0;
      }
  }

  MEDCL_DEVICE void tile(const typename T::Scores& s, const View& v) {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) {  // columns grow with r & 1, n and the tile: the first of equals stays
          const float x = s[m][n][r];
          if (!(x > best[m][r >> 1])) continue;
          best[m][r >> 1] = x;
          at[m][r >> 1] = v.column0 + n * 8 + this->l.t * 2 + (r & 1);
        }
  }

  MEDCL_DEVICE void finish() {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const float other = __shfl_xor_sync(0xffffffffu, best[m][h], step);
          const int other_at = __shfl_xor_sync(0xffffffffu, at[m][h], step);
          if (other > best[m][h] || (other == best[m][h] && other_at < at[m][h])) {
            best[m][h] = other;
            at[m][h] = other_at;
          }
        }
        if (this->l.t != 0 || !this->inside(m, h)) continue;
        a.index[this->result(0, m, h)] = at[m][h];
        a.value[this->result(0, m, h)] = best[m][h];
      }
  }
};

enum class Weights { bounded_softmax, softmax, sigmoid };

struct GradientArguments {
  const Term* owned_terms;
  Kinds kinds;
  bool owned_anchors, streamed_anchors;
  float scale;   // score to units of log 2
  float factor;  // of the result
  GradientScale gradient;
  bool add;    // to what out holds
  float* out;  // (groups, owned_padded, row length)
};

// d_row_i = sum_j w_ij row_j: the rows' terms, in shared memory, and the sums. Row-owned: no two blocks write one
// element.
template <class T>
struct RowGradient : RowEpilogue<T> {
  static constexpr bool kTerms = true;
  static constexpr int kValues = 4, kState = kValues * T::kRowTiles * 2;  // the row's Term
  using Base = RowEpilogue<T>;
  const GradientArguments& a;
  typename T::Sums sums = {};

  __device__ RowGradient(const GradientArguments& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : Base(p, block, l, state), a(a) {}

  MEDCL_DEVICE void keep(int k, int m, int h, const Term& own) {
    this->template kept<kValues>(k, 0, m, h) = own.bias;
    this->template kept<kValues>(k, 1, m, h) = own.weight;
    this->template kept<kValues>(k, 2, m, h) = own.level;
    this->template kept<kValues>(k, 3, m, h) = bit_copy<float>(own.code);
  }
  MEDCL_DEVICE Term kept_term(int k, int m, int h) const {
    return Term{this->template kept<kValues>(k, 0, m, h), this->template kept<kValues>(k, 1, m, h),
                this->template kept<kValues>(k, 2, m, h), bit_copy<int32_t>(this->template kept<kValues>(k, 3, m, h))};
  }

  MEDCL_DEVICE void finish() { this->store(sums, a.factor * power_of_two(-a.gradient.exponent()), a.add, a.out); }
};

// w_ij = dL/ds_ij + dL/ds_ji as far as the sides are anchors:
//   softmax   g_i exp(s_ij - lse_i), bounded: g_i exp(shift - lse_i) ready in the terms, one exp for both directions
//   sigmoid   g_i / (1 + exp(n_i - s_ij)) for equal labels
template <class T, Weights W>
struct Gradient : RowGradient<T> {
  using Arguments = GradientArguments;
  using Base = RowGradient<T>;
  using Base::a;

  __device__ Gradient(const Arguments& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : Base(a, p, block, l, state) {
    for (int k = 0; k < p.selections; ++k)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Term own = this->owned_term(a.owned_terms, k, m, h);
          own.bias = own.code < 0 ? -INFINITY : 0.f;
          this->keep(k, m, h, own);
        }
  }

  MEDCL_DEVICE float weight(float x, const Term& own, const Term& other) const {
    if constexpr (W == Weights::bounded_softmax) return (own.weight + other.weight) * ptx::exp2(x);
    float w = 0.f;
    if constexpr (W == Weights::softmax) {
      if (a.owned_anchors) w = own.weight * ptx::exp2(x - own.level);
      if (a.streamed_anchors) w = fmaf(other.weight, ptx::exp2(x - other.level), w);
    } else {
      if (a.owned_anchors) w = own.weight * ptx::reciprocal(1.f + ptx::exp2(own.level - x));
      if (a.streamed_anchors) w = fmaf(other.weight, ptx::reciprocal(1.f + ptx::exp2(other.level - x)), w);
    }
    return x == -INFINITY ? 0.f : w;
  }

  MEDCL_DEVICE void load_own(int k, Term (&own)[T::kRowTiles][2]) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) own[m][h] = this->kept_term(k, m, h);
  }

  // w += the weights of the pairs of columns n of the tile, for one selection
  MEDCL_DEVICE void add_weights(const typename T::Scores& s, const View& v, int k, int n,
                                const Term (&own)[T::kRowTiles][2], float (&w)[T::kRowTiles][4]) const {
    const int kind = a.kinds.of[k];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Term column = this->column_term(v, k, n * 8 + this->l.t * 2 + e);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x = fmaf(s[m][n][h * 2 + e], a.scale, column.bias) + own[m][h].bias;
          const bool pair = allowed(kind, own[m][h].code, column.code);
          w[m][h * 2 + e] += weight(pair ? x : -INFINITY, own[m][h], column);
        }
    }
  }

  // Weights take the place of scores. The rows' terms of one selection stay in registers, those of more are read anew.
  MEDCL_DEVICE void tile(typename T::Scores& s, const View& v) {
    Term first[T::kRowTiles][2];
    load_own(0, first);
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      float w[T::kRowTiles][4] = {};
      add_weights(s, v, 0, n, first, w);
      for (int k = 1; k < this->p.selections; ++k) {
        Term own[T::kRowTiles][2];
        load_own(k, own);
        add_weights(s, v, k, n, own, w);
      }
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) s[m][n][r] = w[m][r];
    }
    add_weighted_rows<T>(s, v.rows, this->l, this->sums);
  }
};

template <class T>
using BoundedSoftmaxGradient = Gradient<T, Weights::bounded_softmax>;
template <class T>
using SoftmaxGradient = Gradient<T, Weights::softmax>;
template <class T>
using SigmoidGradient = Gradient<T, Weights::sigmoid>;

}  // namespace medcl::cuda
