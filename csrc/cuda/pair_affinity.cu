// pair_affinity on the GPU (medcl_kernels/reference/pair_affinity.py).
#include "cuda/affinity.cuh"

#include "cuda/sides.cuh"

namespace medcl::cuda {
namespace {

constexpr int kReduceThreads = 512;

struct RangeArguments {
  const float *query, *key;  // (patches, batch, classes, count); key may be null
  int64_t batch, classes, query_count, key_count;
};

// Upper bound of D over all pairs, per patch size: per class the largest difference of two shares. A block each.
__global__ void __launch_bounds__(kReduceThreads) divergence_kernel(RangeArguments a, float* divergence) {
  MEDCL_SHARED(memory);
  float* low = reinterpret_cast<float*>(memory);  // (warps)
  float* high = low + kReduceThreads / 32;
  float total = 0.f;
  for (int64_t k = 0; k < a.classes; ++k) {
    float least = INFINITY, most = -INFINITY;
    const auto scan = [&](const float* ratios, int64_t count) {
      if (!ratios) return;
      for (int64_t b = 0; b < a.batch; ++b) {
        const float* share = ratios + ((blockIdx.x * a.batch + b) * a.classes + k) * count;
#pragma unroll 4
        for (int64_t i = threadIdx.x; i < count; i += kReduceThreads) {
          least = fminf(least, share[i]);
          most = fmaxf(most, share[i]);
        }
      }
    };
    scan(a.query, a.query_count);
    scan(a.key, a.key_count);
#pragma unroll
    for (int step = 16; step; step >>= 1) {
      least = fminf(least, __shfl_xor_sync(0xffffffffu, least, step));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    }
    if (threadIdx.x % 32 == 0) {
      low[threadIdx.x / 32] = least;
      high[threadIdx.x / 32] = most;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kReduceThreads / 32; ++warp) {
        least = fminf(least, low[warp]);
        most = fmaxf(most, high[warp]);
      }
      total += most - least;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) divergence[blockIdx.x] = total;
}

struct PatchTermArguments {
  const float* ratios;                      // (patches, groups, classes, count)
  const float *d_log_z, *d_linear, *log_z;  // (patches, groups, count), or null: no anchors
  bool backward;
  LevelSource level;
  GradientScale gradient;
  int64_t patches, classes, groups;
  int count, padded, records;
  PatchTerm* terms;
  FourShares* more;
};

// Rows past the edge have weight 0.
__global__ void patch_terms_kernel(PatchTermArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.patches * a.groups * a.padded) return;
  const int64_t list = i / a.padded, row = i % a.padded, from = row < a.count ? row : 0;
  const float* share = a.ratios + list * a.classes * a.count + from;
  PatchTerm term{share[0], 0.f, INFINITY, 0.f};
  if (row < a.count && !a.backward) term.weight = 1.f;
  if (row < a.count && a.d_log_z) {
    const int64_t at = list * a.count + row;
    const float size = power_of_two(a.gradient.exponent());
    const double log_z = a.log_z[at] * 1.4426950408889634;
    term.weight = a.d_log_z[at] * size;
    if (a.level.level().bounded) term.weight *= static_cast<float>(::exp2(-log_z));
    term.level = static_cast<float>(log_z);
    term.linear = a.d_linear[at] * size;
  }
  a.terms[i] = term;
  const int64_t patch = list / a.groups, group = list % a.groups;
  for (int record = 0; record < a.records; ++record) {
    FourShares four;
    for (int c = 0; c < 4; ++c) {
      const int64_t k = 1 + record * 4 + c;
      four.of[c] = k < a.classes ? share[k * a.count] : 0.f;
    }
    a.more[((patch * a.records + record) * a.groups + group) * a.padded + row] = four;
  }
}

// out = -scale times the sum of all values, in a fixed order
__global__ void __launch_bounds__(kReduceThreads)
    shift_kernel(const float* values, int64_t n, float scale, float* out) {
  MEDCL_SHARED(memory);
  double* part = reinterpret_cast<double*>(memory);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kReduceThreads) sum += values[i];
  part[threadIdx.x] = sum;
  for (int half = kReduceThreads / 2; half; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = static_cast<float>(-scale * part[0]);
}

Options with_patches(Options o, const Patches& patches) {
  o.selections = static_cast<int>(patches.count);
  return o;
}

// The sides of a call with the records of their patches.
struct PatchSides {
  const Patches& patches;
  const Options o;  // selections are patch sizes
  const PackedSides s;
  LevelSource level{};
  int records;

  PatchSides(Workspace& w, const Sides& sides, const Options& options, const Patches& patches)
      : patches(patches),
        o(with_patches(options, patches)),
        s(w, sides, o, false),
        records(static_cast<int>((patches.classes - 1 + 3) / 4)) {
    float* divergence = w.take<float>(patches.count);
    const RangeArguments range{patches.query_ratios, s.self() ? nullptr : patches.key_ratios,
                               sides.query.batch,    patches.classes,
                               sides.query.length,   sides.key.length};
    launch(divergence_kernel, patches.count, kReduceThreads, 2 * sizeof(float) * kReduceThreads / 32, w.stream, range,
           divergence);
    level.divergence = divergence;
    level.shift = patches.shift;
    level.patches = static_cast<int>(patches.count);
    level.inverse_temperature = 1.f / o.temperature;
    level.normalize = o.normalize;
    level.swapped = patches.swapped;
  }

  struct Upstream {
    const float *d_log_z = nullptr, *d_linear = nullptr, *log_z = nullptr;
    GradientScale gradient{};
    bool backward = false;
  };
  // the records of one side; only queries are anchors
  AffinitySide side(bool of_key, const Upstream& upstream) const {
    const Packed& p = of_key ? s.key() : s.query;
    PatchTermArguments a{};
    a.ratios = of_key && !s.self() ? patches.key_ratios : patches.query_ratios;
    a.backward = upstream.backward;
    if (!of_key) {
      a.d_log_z = upstream.d_log_z;
      a.d_linear = upstream.d_linear;
      a.log_z = upstream.log_z;
    }
    a.level = level;
    a.gradient = upstream.gradient;
    a.patches = patches.count;
    a.classes = patches.classes;
    a.groups = p.groups;
    a.count = p.count;
    a.padded = p.padded;
    a.records = records;
    const int64_t rows = a.patches * a.groups * a.padded;
    a.terms = s.w.take<PatchTerm>(rows);
    a.more = records ? s.w.take<FourShares>(rows * records) : nullptr;
    launch_each(patch_terms_kernel, rows, s.w.stream, a);
    return {a.terms, a.more};
  }

  // what a launch for patch sizes [first, ...) reads of a side
  AffinitySide from(const AffinitySide& side, const Packed& p, int first) const {
    const int64_t rows = first * p.groups * p.padded;
    return {side.terms + rows, side.more ? side.more + rows * records : nullptr};
  }

  template <class Arguments>
  Pairs pairs(Arguments& a, bool to_key, const AffinitySide& query, const AffinitySide& key, int first,
              int count) const {
    const Packed &owned = to_key ? s.key() : s.query, &streamed = to_key ? s.query : s.key();
    a.owned = from(to_key ? key : query, owned, first);
    a.streamed = from(to_key ? query : key, streamed, first);
    a.records = records;
    a.level = level;
    a.scale = score_scale(o);
    Pairs pairs = s.pairs(to_key, !to_key, nullptr, first, count);
    pairs.terms = reinterpret_cast<const Term*>(a.streamed.terms);
    pairs.self = false;  // a row is a candidate of its own
    return pairs;
  }
};

}  // namespace

void pair_affinity(Workspace& w, const Sides& sides, const Options& o, const Patches& patches, float* log_z,
                   float* linear) {
  const PatchSides sized(w, sides, o, patches);
  const PackedSides& s = sized.s;
  const AffinitySide query = sized.side(false, {}), key = s.self() ? query : sized.side(true, {});
  each_share(sized.o.selections, [&](int first, int count) {
    AffinityArguments a{};
    const Pairs pairs = sized.pairs(a, false, query, key, first, count);
    const int64_t at = first * s.query.groups * s.query.count;
    a.log_z = log_z + at;
    a.linear = linear + at;
    run_statistic<Affinity>(s.query, pairs, a, w.stream);
  });
}

void pair_affinity_backward(Workspace& w, const Sides& sides, const Options& o, const Patches& patches,
                            const float* d_log_z, const float* d_linear, const float* log_z, const Rows& d_query,
                            const Rows& d_key, float* d_shift) {
  const PatchSides sized(w, sides, o, patches);
  const PackedSides& s = sized.s;
  TermSource of_log_z, of_linear;
  of_log_z.upstream = d_log_z;
  of_linear.upstream = d_linear;
  PatchSides::Upstream upstream{d_log_z, d_linear, log_z, s.scale({of_log_z, of_linear}), true};
  --upstream.gradient.room;  // both ends of a pair, |P| + |Q| up to 3
  const AffinitySide query = sized.side(false, upstream), key = s.self() ? query : sized.side(true, upstream);
  // sum of dL/dt over all pairs: along with a gradient that is made anyway, by the rows of either side
  const bool by_key = !d_query.data && d_key.data;
  const Packed& summed = by_key ? s.key() : s.query;
  float* sums = d_shift ? w.take<float>(summed.groups * summed.count) : nullptr;
  const auto into = [&](bool to_key, const Rows& d_x, float* sums) {
    if (!d_x.data && !sums) return;
    const Packed& owned = to_key ? s.key() : s.query;
    float* d_z = gradient_rows(w, owned);
    each_share(sized.o.selections, [&](int first, int count) {
      AffinityGradientArguments a{};
      const Pairs pairs = sized.pairs(a, to_key, query, key, first, count);
      a.factor = 1.f / o.temperature;
      a.owned_anchors = !to_key;
      a.streamed_anchors = to_key || s.self();
      a.gradient = upstream.gradient;
      a.add = first > 0;
      a.out = d_z;
      a.sums = sums;
      run_gradient<AffinityGradient>(owned, pairs, a, w.stream);
    });
    if (d_x.data) unpack(w, owned, to_key ? sides.key : sides.query, d_x, d_z, sized.o);
  };
  into(false, d_query, by_key ? nullptr : sums);
  if (!s.self()) into(true, d_key, by_key ? sums : nullptr);
  if (d_shift)  // a tensor against itself has met every pair twice
    launch(shift_kernel, 1, kReduceThreads, sizeof(double) * kReduceThreads, w.stream, static_cast<const float*>(sums),
           summed.groups * summed.count, s.self() ? 0.5f : 1.f, d_shift);
}

}  // namespace medcl::cuda
