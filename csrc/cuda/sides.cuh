// Host side shared by the operations: packed rows, terms and gradients of one call.
#pragma once
#include <initializer_list>

#include "cuda/epilogues.cuh"
#include "cuda/packed.cuh"

namespace medcl::cuda {

// exp(s - 1/t) of unit rows neither overflows nor underflows without a running maximum
inline bool bounded(const Options& o) { return o.normalize && 2.0 / o.temperature <= 80.0; }
inline float score_scale(const Options& o) { return static_cast<float>(1.4426950408889634 / o.temperature); }

// How many selections one launch takes: their row state lives in shared memory, of which the smallest chip has 99 KiB.
constexpr int kSelectionsAtOnce = 3;

void fill(int64_t* to, int64_t value, int64_t n, void* stream);

// labels null: all rows take part
Packed pack(Workspace&, const Rows& x, const int64_t* labels, const Options&);
void unpack(Workspace&, const Packed&, const Rows& x, const Rows& d_x, const float* d_z, const Options&);

inline float* gradient_rows(Workspace& w, const Packed& p) { return w.take<float>(p.groups * p.padded * p.pitch); }

// What the terms of one side are made of; per-row values are (selections, groups, count).
struct TermSource {
  const int64_t* labels = nullptr;  // or null
  const float* level = nullptr;     // log-sum-exp, or null
  const float* upstream = nullptr;  // or null: no anchors
  bool needs_level = false;         // a row whose level is -inf has no gradient
  bool weight_by_level = false;     // weight = upstream exp(shift - level)
};

// The two sides of a call, packed, with codes for their labels where labels are compared.
struct PackedSides {
  Workspace& w;
  const Sides& sides;
  const Options& o;
  Packed query, key_rows;
  LabelTable table{};
  bool compares;  // labels, and not only who takes part

  PackedSides(Workspace&, const Sides&, const Options&, bool compares);
  bool self() const { return sides.key.data == nullptr; }
  const Packed& key() const { return self() ? query : key_rows; }
  GradientScale scale(std::initializer_list<TermSource> anchors) const;  // of what flows into the anchors' rows
  Term* terms(bool of_key, const TermSource&, float shift, GradientScale) const;
  // a launch of the engine between packed sides, selections [first, first + count) of it
  Pairs pairs(bool owned_key, bool streamed_key, const Term* streamed_terms, int first, int count) const;
};

// f(first, count) for every launch's share of the selections
template <class F>
void each_share(int selections, F&& f) {
  for (int first = 0; first < selections; first += kSelectionsAtOnce)
    f(first, selections - first < kSelectionsAtOnce ? selections - first : kSelectionsAtOnce);
}

inline Kinds share_of(const Options& o, int first, int count) {
  Kinds kinds{};
  for (int k = 0; k < count; ++k) kinds.of[k] = static_cast<int8_t>(o.kinds[first + k]);
  return kinds;
}

// Channels are padded to a whole number of slabs; wider rows than the widest resident tile stream theirs.
inline int slab_of(Product product, int64_t dim) {
  const bool half = product == Product::bf16 || product == Product::fp16;
  if (dim <= 64) return 64;
  if (dim <= 128) return 128;
  if (half && dim <= 256) return 256;
  return half ? 128 : 64;
}

// Tiles by row width: up to 64, 128 and (2-byte elements) 256 channels whole, more of them streamed.
// Row statistics need few registers: a warp takes 32 rows where shared memory allows, and uses a B fragment twice.
template <class P, bool Half = P::kHalf>
struct StatisticTiles {
  using Narrow = Tile<P, 64, 4, 2, 64, 3, true>;
  using Wide = Tile<P, 128, 4, 2, 64, 2, true>;
  using Widest = Tile<P, 256, 4, 1, 32, 3, true>;
  using Streamed = Tile<P, 128, 4, 1, 64, 2, false>;
};
template <class P>
struct StatisticTiles<P, false> {
  using Narrow = Tile<P, 64, 4, 2, 64, 2, true>;
  using Wide = Tile<P, 128, 4, 1, 32, 2, true>;
  using Widest = Wide;
  using Streamed = Tile<P, 64, 4, 1, 64, 2, false>;
};
// Gradients hold a slab of the result in registers.
template <class P, bool Half = P::kHalf>
struct GradientTiles {
  using Narrow = Tile<P, 64, 4, 2, 64, 3, true>;
  using Wide = Tile<P, 128, 8, 1, 64, 2, true>;
  using Widest = Tile<P, 256, 4, 1, 32, 2, true>;
  using Streamed = Tile<P, 128, 4, 1, 64, 2, false>;
};
template <class P>
struct GradientTiles<P, false> {
  using Narrow = Tile<P, 64, 8, 1, 64, 2, true>;
  using Wide = Tile<P, 128, 4, 1, 32, 2, true>;
  using Widest = Wide;
  using Streamed = Tile<P, 64, 4, 1, 64, 2, false>;
};

template <class Tiles, template <class> class Epilogue, class Arguments>
void run_width(int pitch, const Pairs& p, const Arguments& a, bool split_output, void* stream) {
  if (pitch <= 64)
    run_pairs<typename Tiles::Narrow, Epilogue>(p, a, split_output, stream);
  else if (pitch <= 128)
    run_pairs<typename Tiles::Wide, Epilogue>(p, a, split_output, stream);
  else if (Tiles::Widest::kSlab == 256 && pitch == 256)
    run_pairs<typename Tiles::Widest, Epilogue>(p, a, split_output, stream);
  else
    run_pairs<typename Tiles::Streamed, Epilogue>(p, a, split_output, stream);
}

template <template <class> class Tiles, template <class> class Epilogue, class Arguments>
void run_product(const Packed& owned, const Pairs& p, const Arguments& a, bool split_output, void* stream) {
  switch (owned.product) {
    case Product::bf16:
      return run_width<Tiles<Bf16Product>, Epilogue>(owned.pitch, p, a, split_output, stream);
    case Product::fp16:
      return run_width<Tiles<Fp16Product>, Epilogue>(owned.pitch, p, a, split_output, stream);
    case Product::tf32:
      return run_width<Tiles<Tf32Product>, Epilogue>(owned.pitch, p, a, split_output, stream);
    case Product::ieee:
      return run_width<Tiles<IeeeProduct>, Epilogue>(owned.pitch, p, a, split_output, stream);
  }
}
template <class P>
using ForStatistics = StatisticTiles<P>;
template <class P>
using ForGradients = GradientTiles<P>;

template <template <class> class Epilogue, class Arguments>
void run_statistic(const Packed& owned, const Pairs& p, const Arguments& a, void* stream) {
  run_product<ForStatistics, Epilogue>(owned, p, a, false, stream);
}
template <template <class> class Epilogue, class Arguments>
void run_gradient(const Packed& owned, const Pairs& p, const Arguments& a, void* stream) {
  run_product<ForGradients, Epilogue>(owned, p, a, true, stream);
}

}  // namespace medcl::cuda
