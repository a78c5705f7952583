// Pairs weighted by the affinity of their patches (medcl_kernels/reference/pair_affinity.py): the sums log_z and linear
// of a row, and its gradient. Several patch sizes share a tile of scores; each has a record per row.
#pragma once
#include "cuda/epilogues.cuh"
#include "pairs/affinity.h"

namespace medcl::cuda {

// What a pair needs to know of one of its rows, for one patch size. Travels like a Term.
struct alignas(16) PatchTerm {
  float share;   // of the first class
  float weight;  // forward: 1, past the edge 0. Backward: upstream gradient of log_z, scaled; 0 where the row is no
                 // anchor; times exp(-log_z) where the exponents are bounded
  float level;   // log_z in units of log 2, +inf where the row is no anchor
  float linear;  // upstream gradient of linear, scaled
};
static_assert(sizeof(PatchTerm) == sizeof(Term), "the engine copies one like the other");
struct alignas(16) FourShares {
  float of[4];
};

// The shift of t in units of log 2, and whether exponents need no running maximum: found on the device, where the
// ratios and the shift are.
struct AffinityLevel {
  float shift;
  bool bounded;
};
struct LevelSource {
  const float* divergence;  // (patches): largest D
  const float* shift;       // m, or null: 1 / temperature
  int patches;
  float inverse_temperature;
  bool normalize, swapped;

  MEDCL_DEVICE AffinityLevel level() const {
    float largest = divergence[0];
    for (int p = 1; p < patches; ++p) largest = fmaxf(largest, divergence[p]);
    const float m = shift ? *shift : inverse_temperature;
    // e^60 leaves room for the number of pairs, and for a scaled gradient
    return {m * kLog2E, normalize && plain_exponents(largest, swapped, inverse_temperature + fabsf(m), 60.0)};
  }
};

struct AffinitySide {
  const PatchTerm* terms;  // (patches, groups, padded)
  const FourShares* more;  // (patches, records, groups, padded): further classes
};

struct AffinityArguments {
  AffinitySide owned, streamed;
  int records;
  LevelSource level;
  float scale;  // score to units of log 2
  float *log_z, *linear;
};

struct AffinityGradientArguments {
  AffinitySide owned, streamed;
  int records;
  LevelSource level;
  float scale;   // score to units of log 2
  float factor;  // of the result
  bool owned_anchors, streamed_anchors;
  GradientScale gradient;
  bool add;     // to what out and sums hold
  float* out;   // (groups, owned_padded, row length)
  float* sums;  // (groups, owned_count): sum of the row's weights, or null
};

template <class T, class A>
struct AffinityEpilogue : RowEpilogue<T> {
  using Arguments = A;
  using Scores = typename T::Scores;
  static constexpr bool kTerms = true;
  static constexpr int kMinBlocks = 1;
  using Own = PatchTerm[T::kRowTiles][2];
  const A& a;
  const AffinityLevel level;

  __device__ AffinityEpilogue(const A& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : RowEpilogue<T>(p, block, l, state), a(a), level(a.level.level()) {}

  // scores to t, in units of log 2
  MEDCL_DEVICE void shift(Scores& s) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
        for (int r = 0; r < 4; ++r) s[m][n][r] = fmaf(s[m][n][r], a.scale, -level.shift);
  }

  // rows past the padding read the last record: nothing of theirs is stored
  MEDCL_DEVICE int inner_row(int m, int h) const {
    const int row = this->row(m, h);
    return row < this->p.owned_padded ? row : this->p.owned_padded - 1;
  }
  MEDCL_DEVICE void load_own(int k, Own& own) const {
    const PatchTerm* rows = a.owned.terms + (k * this->p.groups + this->block.group) * this->p.owned_padded;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) own[m][h] = rows[inner_row(m, h)];
  }
  MEDCL_DEVICE PatchTerm column_patch(const View& v, int k, int column) const {
    float x[4];
    ptx::load_shared(x, v.terms + (k * T::kColumns + column) * sizeof(PatchTerm));
    return PatchTerm{x[0], x[1], x[2], x[3]};
  }

  // Q of one column and this lane's rows: D, or 1 - D where the weights are swapped; P is 1 - Q. Further classes, which
  // most calls do not have, stay a loop: unrolled, they would be the larger part of the kernel.
  MEDCL_DEVICE void weights(const View& v, int k, int column, const Own& own, const PatchTerm& other,
                            float (&q)[T::kRowTiles][2]) const {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) q[m][h] = fabsf(own[m][h].share - other.share);
#pragma unroll 1
    for (int record = 0; record < a.records; ++record) {
      const int64_t list = (static_cast<int64_t>(k) * a.records + record) * this->p.groups + this->block.group;
      const FourShares theirs = a.streamed.more[list * this->p.streamed_padded + v.column0 + column];
      const FourShares* rows = a.owned.more + list * this->p.owned_padded;
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const FourShares ours = rows[inner_row(m, h)];
#pragma unroll
          for (int c = 0; c < 4; ++c) q[m][h] += fabsf(ours.of[c] - theirs.of[c]);
        }
    }
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) q[m][h] = a.level.swapped ? 1.f - q[m][h] : q[m][h];
  }
};

// log_z_i = log sum_j exp(Q_ij t_ij) and linear_i = sum_j P_ij t_ij per patch size. Rows past the edge have weight 0,
// so that no pair needs a test.
template <class T>
struct Affinity : AffinityEpilogue<T, AffinityArguments> {
  static constexpr bool kMasked = false;
  static constexpr int kValues = 4, kState = kValues * T::kRowTiles * 2;  // sum, maximum, linear and what it lost
  using Base = AffinityEpilogue<T, AffinityArguments>;
  using typename Base::Own;
  using typename Base::Scores;

  __device__ Affinity(const AffinityArguments& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : Base(a, p, block, l, state) {
    for (int k = 0; k < p.selections; ++k)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int value = 0; value < kValues; ++value)
            this->template kept<kValues>(k, value, m, h) = value == 1 ? -INFINITY : 0.f;
  }

  // f(m, h, t, Q, whether there is such a pair)
  template <class F>
  MEDCL_DEVICE void each(const Scores& t, const View& v, int k, const Own& own, F&& f) const {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + this->l.t * 2 + e;
        const PatchTerm other = this->column_patch(v, k, column);
        float q[T::kRowTiles][2];
        this->weights(v, k, column, own, other, q);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) f(m, h, t[m][n][h * 2 + e], q[m][h], other.weight != 0.f);
      }
  }

  MEDCL_DEVICE void tile(Scores& s, const View& v) {
    this->shift(s);
#pragma unroll 1
    for (int k = 0; k < this->p.selections; ++k) {
      Own own;
      this->load_own(k, own);
      float sum[T::kRowTiles][2] = {}, linear[T::kRowTiles][2] = {}, top[T::kRowTiles][2] = {};
      if (!this->level.bounded) {
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) top[m][h] = this->template kept<kValues>(k, 1, m, h);
        each(s, v, k, own, [&](int m, int h, float t, float q, bool real) {
          if (real) top[m][h] = fmaxf(top[m][h], q * t);
        });
        this->template raise<kValues>(k, top);
      }
      each(s, v, k, own, [&](int m, int h, float t, float q, bool real) {
        const float e = ptx::exp2(fmaf(q, t, -top[m][h])), l = fmaf(-q, t, t);
        sum[m][h] += real ? e : 0.f;
        linear[m][h] += real ? l : 0.f;
      });
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          this->template kept<kValues>(k, 0, m, h) += sum[m][h];
          float &so_far = this->template kept<kValues>(k, 2, m, h), &lost = this->template kept<kValues>(k, 3, m, h);
          const float more = linear[m][h] - lost, total = so_far + more;  // Kahan: no logarithm hides its rounding
          lost = (total - so_far) - more;
          so_far = total;
        }
    }
  }

  MEDCL_DEVICE void finish() {
    for (int k = 0; k < this->p.selections; ++k)
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float shift = 0.f;
          const float total = this->template total<kValues>(k, m, h, this->level.bounded, shift);
          const float linear = sum_over_quad(this->template kept<kValues>(k, 2, m, h));
          if (this->l.t != 0 || !this->inside(m, h)) continue;
          this->a.log_z[this->result(k, m, h)] = (shift + log2f(total)) * kLn2;
          this->a.linear[this->result(k, m, h)] = linear * kLn2;
        }
  }
};

// d_row_i = sum_j w_ij row_j with w_ij = dL/dt_ij + dL/dt_ji as far as the sides are anchors, summed over patch sizes:
//   (g_i exp(-log_z_i) + g_j exp(-log_z_j)) Q_ij exp(Q_ij t_ij) + (h_i + h_j) P_ij
// D and t are symmetric, so a tensor against itself needs one pass. Row-owned: no two blocks write one element.
template <class T>
struct AffinityGradient : AffinityEpilogue<T, AffinityGradientArguments> {
  static constexpr int kState = 0;
  using Base = AffinityEpilogue<T, AffinityGradientArguments>;
  using typename Base::Own;
  using typename Base::Scores;
  typename T::Sums sums = {};
  float total[T::kRowTiles][2] = {};  // of the rows' weights

  __device__ AffinityGradient(const AffinityGradientArguments& a, const Pairs& p, const Block& block, const Lane& l,
                              float* state)
      : Base(a, p, block, l, state) {}

  // w += the weights of the pairs of columns n of the tile, for one patch size
  template <bool Bounded>
  MEDCL_DEVICE void add_weights(const Scores& t, const View& v, int k, int n, float (&w)[T::kRowTiles][4]) const {
    Own own;
    this->load_own(k, own);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = n * 8 + this->l.t * 2 + e;
      const PatchTerm other = this->column_patch(v, k, column);
      float q[T::kRowTiles][2];
      this->weights(v, k, column, own, other, q);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x = q[m][h] * t[m][n][h * 2 + e];
          float g = 0.f;
          if constexpr (Bounded) {
            g = (own[m][h].weight + other.weight) * ptx::exp2(x);
          } else {
            if (this->a.owned_anchors) g = own[m][h].weight * ptx::exp2(x - own[m][h].level);
            if (this->a.streamed_anchors) g = fmaf(other.weight, ptx::exp2(x - other.level), g);
          }
          const float h_both = own[m][h].linear + other.linear;
          w[m][h * 2 + e] += fmaf(g, q[m][h], fmaf(-h_both, q[m][h], h_both));
        }
    }
  }

  // Weights take the place of scores.
  template <bool Bounded>
  MEDCL_DEVICE void weigh(Scores& s, const View& v) {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      float w[T::kRowTiles][4] = {};
#pragma unroll 1
      for (int k = 0; k < this->p.selections; ++k) add_weights<Bounded>(s, v, k, n, w);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          s[m][n][r] = s[m][n][r] == -INFINITY ? 0.f : w[m][r];
          total[m][r >> 1] += s[m][n][r];
        }
    }
  }

  MEDCL_DEVICE void tile(Scores& s, const View& v) {
    this->shift(s);
    if (this->level.bounded)
      weigh<true>(s, v);
    else
      weigh<false>(s, v);
    add_weighted_rows<T>(s, v.rows, this->l, sums);
  }

  MEDCL_DEVICE void finish() {
    const float back = power_of_two(-this->a.gradient.exponent());
    this->store(sums, this->a.factor * back, this->a.add, this->a.out);
    if (!this->a.sums || this->block.output != 0) return;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = back * sum_over_quad(total[m][h]);
        if (this->l.t != 0 || !this->inside(m, h)) continue;
        float& to = this->a.sums[this->result(0, m, h)];
        to = this->a.add ? to + x : x;
      }
  }
};

}  // namespace medcl::cuda
