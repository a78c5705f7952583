#include "cuda/listed.cuh"

#include "cuda/segments.cuh"

namespace medcl::cuda {
namespace {

struct ListArguments {
  Packed query, key;
  Listed list;
  float inverse_temperature;
  float* out;

  __device__ int64_t anchor(int64_t group, int64_t entry) const {
    return list.several ? entry / list.several : list.anchor[group * list.length + entry];
  }
  __device__ int64_t candidate(int64_t group, int64_t entry) const {
    return list.candidate[group * list.length + entry];
  }
};

// A warp per entry. Rows are those that the pair engine sees, rounded alike.
__global__ void listed_kernel(ListArguments a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + (threadIdx.x >> 5);
  if (at >= a.query.groups * a.list.length) return;  // a whole warp
  const int64_t group = at / a.list.length, i = a.anchor(group, at % a.list.length),
                j = a.candidate(group, at % a.list.length);
  const bool pair = i >= 0 && j >= 0, inside = i < a.query.count && j < a.key.count;
  const int lane = threadIdx.x & 31;
  float dot = 0.f;
  if (pair && inside)
    for (int d = lane; d < a.query.pitch; d += 32)
      dot = fmaf(a.query.at(a.query.element(group, static_cast<int>(i), d)),
                 a.key.at(a.key.element(group, static_cast<int>(j), d)), dot);
  dot = sum_over_warp(dot);
  if (lane == 0) a.out[at] = pair && !inside ? NAN : dot * a.inverse_temperature;
}

// Which entries name a row: entries [first, last) of the list sorted by the names of that side, or
// of a list in the order of the rows.
struct Runs {
  Sorted by;
  int64_t several = 0;  // 0 where the list is sorted, or empty
  __device__ int64_t first(int64_t group, int64_t row) const { return several ? row * several : by.lower(group, row); }
  __device__ int64_t last(int64_t group, int64_t row) const {
    return several ? (row + 1) * several : by.upper(group, row);
  }
  __device__ int64_t entry(int64_t group, int64_t at) const { return several ? at : by.order[group * by.length + at]; }
};

struct ListGradientArguments {
  ListArguments of;
  Runs runs;
  bool to_key;  // the rows that own the gradient are named as candidates
  bool add;
  float* d_z;
};

constexpr int kListWarps = 4, kListChannels = 4;  // channels of a lane at once

// A block per row. Its warps take every fourth entry of the row's run each; their sums are added in order.
__global__ void __launch_bounds__(32 * kListWarps) listed_gradient_kernel(ListGradientArguments a) {
  MEDCL_SHARED(memory);
  auto* part = reinterpret_cast<float(*)[32 * kListChannels]>(memory);  // (warps, channels)
  const Packed &own = a.to_key ? a.of.key : a.of.query, &other = a.to_key ? a.of.query : a.of.key;
  const int64_t group = blockIdx.x / own.count, row = blockIdx.x % own.count;
  const int64_t first = a.runs.first(group, row), last = a.runs.last(group, row);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int c0 = 0; c0 < own.pitch; c0 += 32 * kListChannels) {
    float sum[kListChannels] = {};
    for (int64_t at = first + warp; at < last; at += kListWarps) {
      const int64_t entry = a.runs.entry(group, at), i = a.of.anchor(group, entry), j = a.of.candidate(group, entry);
      if (i < 0 || j < 0) continue;
      const bool inside = i < a.of.query.count && j < a.of.key.count;
      const int partner = !inside ? 0 : static_cast<int>(a.to_key ? i : j);
      float weight = inside ? a.of.list.upstream[group * a.of.list.length + entry] : NAN;
      if (inside && a.of.list.row_upstream) weight *= a.of.list.row_upstream[group * a.of.query.count + i];
      if (weight == 0.f) continue;
#pragma unroll
      for (int c = 0; c < kListChannels; ++c) {
        const int d = c0 + c * 32 + lane;
        if (d < own.pitch) sum[c] = fmaf(weight, other.at(other.element(group, partner, d)), sum[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kListChannels; ++c) part[warp][c * 32 + lane] = sum[c];
    __syncthreads();
    for (int d = threadIdx.x; d < 32 * kListChannels && c0 + d < own.pitch; d += 32 * kListWarps) {
      float total = 0.f;
#pragma unroll
      for (int k = 0; k < kListWarps; ++k) total += part[k][d];
      total *= a.of.inverse_temperature;
      float* out = a.d_z + own.element(group, static_cast<int>(row), c0 + d);
      *out = a.add ? *out + total : total;
    }
    __syncthreads();
  }
}

ListArguments arguments(const PackedSides& s, const Listed& list) {
  ListArguments a{};
  a.query = s.query;
  a.key = s.key();
  a.list = list;
  a.inverse_temperature = 1.f / s.o.temperature;
  return a;
}

}  // namespace

void listed_similarities(const PackedSides& s, const Listed& list, float* out) {
  ListArguments a = arguments(s, list);
  a.out = out;
  const int64_t entries = s.query.groups * list.length;
  launch(listed_kernel, (entries + kRowsPerBlock - 1) / kRowsPerBlock, 32 * kRowsPerBlock, 0, s.w.stream, a);
}

void listed_gradients(const PackedSides& s, const Listed& list, const Rows& d_query, const Rows& d_key) {
  const auto collect = [&](bool to_key, bool add, float* d_z) {
    ListGradientArguments a{};
    a.of = arguments(s, list);
    a.to_key = to_key;
    a.add = add;
    a.d_z = d_z;
    a.runs.several = to_key ? 0 : list.several;
    if (!a.runs.several && list.length) {
      a.runs.by.lists = s.query.groups;
      a.runs.by.length = list.length;
      s.w.sort(to_key ? list.candidate : list.anchor, s.query.groups, list.length, &a.runs.by.keys, &a.runs.by.order);
    }
    const Packed& own = to_key ? s.key() : s.query;
    launch(listed_gradient_kernel, own.groups * own.count, 32 * kListWarps,
           sizeof(float) * kListWarps * 32 * kListChannels, s.w.stream, a);
  };
  if (d_query.data) {
    float* d_z = gradient_rows(s.w, s.query);
    collect(false, false, d_z);
    if (s.self()) collect(true, true, d_z);
    unpack(s.w, s.query, s.sides.query, d_query, d_z, s.o);
  }
  if (!s.self() && d_key.data) {
    float* d_z = gradient_rows(s.w, s.key());
    collect(true, false, d_z);
    unpack(s.w, s.key(), s.sides.key, d_key, d_z, s.o);
  }
}

namespace {

Listed listed(const PairList& pairs) {
  Listed list;
  list.length = pairs.length;
  list.anchor = pairs.anchor;
  list.candidate = pairs.candidate;
  return list;
}

}  // namespace

void pair_list(Workspace& w, const Sides& sides, Options o, const PairList& pairs, float* out) {
  o.across = true;
  listed_similarities(PackedSides(w, sides, o, false), listed(pairs), out);
}

void pair_list_backward(Workspace& w, const Sides& sides, Options o, const PairList& pairs, const float* upstream,
                        const float* row_upstream, const Rows& d_query, const Rows& d_key) {
  o.across = true;
  Listed list = listed(pairs);
  list.upstream = upstream;
  list.row_upstream = row_upstream;
  listed_gradients(PackedSides(w, sides, o, false), list, d_query, d_key);
}

}  // namespace medcl::cuda
