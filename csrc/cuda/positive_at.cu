// positive_at on the GPU (medcl_kernels/reference/positive_at.py). Rows are rounded as the pair engine sees them.
#include "cuda/segments.cuh"

namespace medcl::cuda {
namespace {

struct GatherArguments {
  Packed query, key;
  const int64_t* positives;  // (groups, count, several)
  int64_t several;
  float inverse_temperature;
  const float* upstream;
  float *out, *d_z;
};

// A warp per anchor. An index past the end reads nothing and gives NaN: it must not look like a result.
__global__ void gather_kernel(GatherArguments a) {
  const WarpRow w(a.query.groups, a.query.count);
  if (w.group == a.query.groups) return;
  for (int64_t r = 0; r < a.several; ++r) {
    const int64_t at = (w.group * a.query.count + w.row) * a.several + r, j = a.positives[at];
    float dot = 0.f;
    if (j >= 0 && j < a.key.count)
      for (int d = w.lane; d < a.query.pitch; d += 32)
        dot = fmaf(a.query.at(a.query.element(w.group, w.row, d)),
                   a.key.at(a.key.element(w.group, static_cast<int>(j), d)), dot);
    dot = sum_over_warp(dot);
    if (w.lane == 0) a.out[at] = j >= a.key.count ? NAN : dot * a.inverse_temperature;
  }
}

__global__ void gather_gradient_kernel(GatherArguments a) {
  const WarpRow w(a.query.groups, a.query.count);
  if (w.group == a.query.groups) return;
  for (int d = w.lane; d < a.query.pitch; d += 32) {
    float sum = 0.f;
    for (int64_t r = 0; r < a.several; ++r) {
      const int64_t at = (w.group * a.query.count + w.row) * a.several + r, j = a.positives[at];
      if (j >= a.key.count) sum = NAN;
      if (j < 0 || j >= a.key.count) continue;
      sum = fmaf(a.upstream[at], a.key.at(a.key.element(w.group, static_cast<int>(j), d)), sum);
    }
    a.d_z[a.query.element(w.group, w.row, d)] = sum * a.inverse_temperature;
  }
}

struct ScatterArguments {
  Packed key;
  Sorted named;       // key rows that entries name, sorted
  const float* sums;  // of what their anchors send
  float inverse_temperature;
  float* d_z;
};

__global__ void scatter_gradient_kernel(ScatterArguments a) {
  const WarpRow w(a.key.groups, a.key.count);
  if (w.group == a.key.groups) return;
  const int64_t first = a.named.lower(w.group, w.row);
  const bool any = first < a.named.length && a.named.keys[w.group * a.named.length + first] == w.row;
  for (int d = w.lane; d < a.key.pitch; d += 32)
    a.d_z[a.key.element(w.group, w.row, d)] =
        any ? a.inverse_temperature * a.sums[(w.group * a.named.length + first) * a.key.pitch + d] : 0.f;
}

GatherArguments arguments(const PackedSides& s, const int64_t* positives, int64_t several) {
  GatherArguments a{};
  a.query = s.query;
  a.key = s.key();
  a.positives = positives;
  a.several = several;
  a.inverse_temperature = 1.f / s.o.temperature;
  return a;
}

}  // namespace

void positive_at(Workspace& w, const Sides& sides, const Options& o, const int64_t* positives, int64_t several,
                 float* out) {
  const PackedSides s(w, sides, o, false);
  GatherArguments a = arguments(s, positives, several);
  a.out = out;
  launch_rows(gather_kernel, s.query, w.stream, a);
}

void positive_at_backward(Workspace& w, const Sides& sides, const Options& o, const int64_t* positives, int64_t several,
                          const float* d_out, const Rows& d_query, const Rows& d_key) {
  const PackedSides s(w, sides, o, false);
  if (d_query.data) {
    GatherArguments a = arguments(s, positives, several);
    a.upstream = d_out;
    a.d_z = gradient_rows(w, s.query);
    launch_rows(gather_gradient_kernel, s.query, w.stream, a);
    unpack(w, s.query, sides.query, d_query, a.d_z, o);
  }
  if (!d_key.data) return;
  ScatterArguments a{};
  a.key = s.key();
  a.named.lists = s.query.groups;
  a.named.length = s.query.count * several;
  w.sort(positives, a.named.lists, a.named.length, &a.named.keys, &a.named.order);
  float* sums = w.take<float>(a.named.lists * a.named.length * s.key().pitch);
  SegmentArguments segments{a.named, s.query, d_out, several, sums};
  sum_segments(segments, w.stream);
  a.sums = sums;
  a.inverse_temperature = 1.f / o.temperature;
  a.d_z = gradient_rows(w, s.key());
  launch_rows(scatter_gradient_kernel, s.key(), w.stream, a);
  unpack(w, s.key(), sides.key, d_key, a.d_z, o);
}

}  // namespace medcl::cuda
