// The epilogue of pair_topk's sweeps: histograms of scores, counts per row, or the list.
#pragma once
#include "cuda/pair_filter.cuh"

namespace medcl::cuda {

constexpr uint32_t kDecided = 0xffffffffu;
constexpr int kHistogramWords = 4096, kMostTileRows = 128;

enum class Stage { histogram, count, collect };

// What a row keeps of the scores equal to its cell's k-th.
struct Share {
  int32_t ties;    // how many
  int32_t closes;  // whether the last one of the cell is among them
};

struct SelectArguments {
  Stage stage;
  PairScores scores;
  const Term* anchors;
  Units units;
  // per cell: the leading bits of the k-th score, kDecided where no more are wanted; its value
  const uint32_t* prefix;
  const float* threshold;
  // histogram: bits before the digit, bits of the digit, cells of one class in a tile; (cells, 2^digit_bits)
  int known_shift, digit_shift, digit_bits, tile_units;
  unsigned long long* histogram;
  int32_t *above, *ties;  // count: (classes, rows)
  // collect
  const Share* shares;    // (classes, rows)
  const int64_t* begins;  // (rows)
  SelectedPairs to;
};

MEDCL_DEVICE uint64_t or_over_quad(uint64_t x) {
  x |= __shfl_xor_sync(0xffffffffu, x, 1);
  return x | __shfl_xor_sync(0xffffffffu, x, 2);
}

template <class T>
struct PairSelect : RowEpilogue<T> {
  using Arguments = SelectArguments;
  using Base = RowEpilogue<T>;
  static constexpr bool kTerms = true;
  static constexpr int kState = kHistogramWords / T::kThreads;
  // what a thread keeps of a row from tile to tile: (above, equal) per class; or taken pairs, and ties left per class
  static constexpr int kValues = 4;
  static_assert(T::kRows <= kMostTileRows && kValues * T::kRowTiles * 2 <= kState && T::kColumns <= 64, "tile");
  const Arguments& a;
  uint32_t* const words;
  const int64_t first_unit;
  int first_bin[T::kRowTiles][2];  // of the row's cell among those of the tile
  Term own[T::kRowTiles][2];
  float inverse_norm[T::kRowTiles][2];
  int32_t code[T::kRowTiles][2];
  uint32_t mark[2][T::kRowTiles][2];  // per class, of the row's cell: prefix, or bits of the threshold

  __device__ PairSelect(const Arguments& a, const Pairs& p, const Block& block, const Lane& l, float* state)
      : Base(p, block, l, state),
        a(a),
        words(reinterpret_cast<uint32_t*>(state)),
        first_unit(a.units.of(block.group * p.owned_count + block.row0)) {
    for (int i = threadIdx.x; i < kHistogramWords; i += T::kThreads) words[i] = 0;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        own[m][h] = this->owned_term(a.anchors, 0, m, h);
        inverse_norm[m][h] = this->owned_term(a.anchors, 1, m, h).bias;
        code[m][h] = own[m][h].code;
        first_bin[m][h] = static_cast<int>(a.units.of(linear(m, h)) - first_unit) << a.digit_bits;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          mark[k][m][h] = kDecided;
          if (code[m][h] < 0) continue;
          const int64_t cell = a.units.cell(linear(m, h), k == 0);
          mark[k][m][h] = a.stage == Stage::histogram ? a.prefix[cell] : bit_copy<uint32_t>(a.threshold[cell]);
          if (a.stage == Stage::collect && k < a.units.classes)
            kept_count(1 + k, m, h) = a.shares[this->result(k, m, h)].ties;
        }
      }
  }

  MEDCL_DEVICE int64_t linear(int m, int h) const { return this->block.group * this->p.owned_count + this->row(m, h); }
  MEDCL_DEVICE uint32_t& kept_count(int value, int m, int h) const {
    return words[((value * T::kRowTiles + m) * 2 + h) * T::kThreads + threadIdx.x];
  }

  // f(m, h, n, e, bits of the score, whether of the second class) for the allowed pairs with a score above 0
  template <class F>
  MEDCL_DEVICE void each(const typename T::Scores& s, const View& v, const PositivePairs<T>& positive, F&& f) const {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t other = column_code(v.terms, n * 8 + this->l.t * 2 + e);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x = s[m][n][h * 2 + e];
            const bool is_positive = positive.has(m, h, n, e);
            const float g = a.scores.gradient(x, own[m][h], is_positive);
            const float rank = a.scores.rank(g, x, inverse_norm[m][h]);
            if (rank > 0.f && x != -INFINITY && other >= 0 && code[m][h] >= 0)
              f(m, h, n, e, static_cast<uint32_t>(bits_of(rank)), a.units.classes == 2 && !is_positive);
          }
      }
  }

  MEDCL_DEVICE void tile(const typename T::Scores& s, const View& v) {
    const PositivePairs<T> positive = positive_pairs<T>(*this, a.scores.named, v, code, true);
    uint64_t above[T::kRowTiles][2] = {}, ties[2][T::kRowTiles][2] = {};  // columns, one bit each; or how many
    int bin = -1;
    uint32_t run = 0;  // neighbours often share a bin: one atomic for all of them
    each(s, v, positive, [&](int m, int h, int n, int e, uint32_t bits, bool second) {
      const uint32_t known = second ? mark[1][m][h] : mark[0][m][h];
      if (a.stage == Stage::histogram) {
        if (bits >> a.known_shift != known) return;
        const int cell = first_bin[m][h] + (second ? a.tile_units << a.digit_bits : 0);
        const int other = cell + static_cast<int>(bits >> a.digit_shift & ((1u << a.digit_bits) - 1));
        if (other != bin && run) atomicAdd(words + bin, run);
        run = other == bin ? run + 1 : 1;
        bin = other;
      } else {
        const uint64_t column = static_cast<uint64_t>(1) << (n * 8 + this->l.t * 2 + e);
        const uint64_t mine = a.stage == Stage::collect ? column : second ? uint64_t{1} << 32 : 1;
        if (bits > known) above[m][h] += mine;
        if (bits == known && second && a.stage == Stage::collect) ties[1][m][h] += mine;
        if (bits == known && !(second && a.stage == Stage::collect)) ties[0][m][h] += mine;
      }
    });
    if (run) atomicAdd(words + bin, run);
    if (a.stage == Stage::histogram) return;
    if (a.stage == Stage::collect) return collect(s, v, positive, above, ties);
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          kept_count(2 * k, m, h) += static_cast<uint32_t>(above[m][h] >> 32 * k);
          kept_count(2 * k + 1, m, h) += static_cast<uint32_t>(ties[0][m][h] >> 32 * k);
        }
  }

  static MEDCL_DEVICE uint64_t first_bits(uint64_t mask, int count) {
    for (int more = ptx::count_bits(mask) - count; more > 0; --more)
      mask ^= static_cast<uint64_t>(1) << ptx::highest_bit(mask);
    return mask;
  }

  // The four lanes of a row agree on which of its columns are kept; each writes its own, behind those before it.
  MEDCL_DEVICE void collect(const typename T::Scores& s, const View& v, const PositivePairs<T>& positive,
                            uint64_t (&above)[T::kRowTiles][2], uint64_t (&ties)[2][T::kRowTiles][2]) {
    const int64_t column0 = this->block.group * this->p.streamed_count + v.column0;  // of all candidates
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint64_t kept = or_over_quad(above[m][h]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint64_t all = or_over_quad(ties[k][m][h]);
          if (!all || code[m][h] < 0) continue;
          uint32_t& left = kept_count(1 + k, m, h);
          const uint64_t first = first_bits(all, static_cast<int>(left));
          left -= ptx::count_bits(first);
          kept |= first;
          if (first && !left && this->l.t == 0 && a.shares[this->result(k, m, h)].closes)
            a.to.cut[a.units.cell(linear(m, h), k == 0)] =
                linear(m, h) * this->p.groups * this->p.streamed_count + column0 + ptx::highest_bit(first);
        }
        if (!kept) continue;
        uint32_t& taken = kept_count(0, m, h);
        const int64_t begin = a.begins[linear(m, h)] + taken;
        taken += ptx::count_bits(kept);
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = n * 8 + this->l.t * 2 + e;
            if (!(kept >> column & 1)) continue;
            const int64_t at = begin + ptx::count_bits(kept & ((static_cast<uint64_t>(1) << column) - 1));
            if (at >= a.to.capacity) continue;
            a.to.anchor[at] = linear(m, h);
            a.to.candidate[at] = column0 + column;
            a.to.gradient[at] = a.scores.gradient(s[m][n][h * 2 + e], own[m][h], positive.has(m, h, n, e));
          }
      }
  }

  MEDCL_DEVICE void finish() {
    if (a.stage == Stage::histogram) {
      __syncthreads();
      const int bins = 1 << a.digit_bits;
      for (int i = threadIdx.x; i < a.units.classes * a.tile_units * bins; i += T::kThreads) {
        if (!words[i]) continue;
        const int local = i >> a.digit_bits;
        const int64_t cell = local / a.tile_units * a.units.count + first_unit + local % a.tile_units;
        atomicAdd(a.histogram + cell * bins + i % bins, static_cast<unsigned long long>(words[i]));
      }
    }
    if (a.stage != Stage::count) return;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        for (int k = 0; k < a.units.classes; ++k) {
          int total[2] = {static_cast<int>(kept_count(2 * k, m, h)), static_cast<int>(kept_count(2 * k + 1, m, h))};
#pragma unroll
          for (int& one : total) {
            one += __shfl_xor_sync(0xffffffffu, one, 1);
            one += __shfl_xor_sync(0xffffffffu, one, 2);
          }
          if (this->l.t != 0 || !this->inside(m, h)) continue;
          a.above[this->result(k, m, h)] = total[0];
          a.ties[this->result(k, m, h)] = total[1];
        }
  }
};

}  // namespace medcl::cuda
