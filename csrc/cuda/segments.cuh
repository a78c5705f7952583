// Sums of rows that share a key (a label), in a fixed order and without atomics.
// Entries are sorted by key once, stably. Chunks of sorted entries are added up in order, each run of equal keys inside
// a chunk on its own; then the chunks of a run that goes on are joined, in order again. The sum of a run lies at the
// run's first entry.
#pragma once
#include "cuda/sides.cuh"

namespace medcl::cuda {

constexpr int kChunk = 64, kSegmentThreads = 128;

// Entries of several lists, sorted: (lists, length).
struct Sorted {
  const int64_t *keys = nullptr, *order = nullptr;
  int64_t lists = 0, length = 0;

  // the first entry of a list whose key is not below / is above `key`
  MEDCL_DEVICE int64_t lower(int64_t list, int64_t key) const {
    int64_t low = 0, high = length;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[list * length + middle] < key)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  MEDCL_DEVICE int64_t upper(int64_t list, int64_t key) const {
    return key == INT64_MAX ? length : lower(list, key + 1);
  }
};

struct SegmentArguments {
  Sorted sorted;
  Packed rows;
  const float* weight;  // (lists, length) by row, or null: 1
  float* sums;          // (lists, length, pitch)

  MEDCL_DEVICE int64_t chunks() const { return (sorted.length + kChunk - 1) / kChunk; }
};

// One block per chunk and list; threads are channels.
static __global__ void __launch_bounds__(kSegmentThreads) segment_kernel(SegmentArguments a) {
  const int64_t list = blockIdx.x / a.chunks(), first = blockIdx.x % a.chunks() * kChunk;
  const int64_t end = first + kChunk < a.sorted.length ? first + kChunk : a.sorted.length;
  const int64_t* keys = a.sorted.keys + list * a.sorted.length;
  const int64_t* order = a.sorted.order + list * a.sorted.length;
  for (int d = threadIdx.x; d < a.rows.pitch; d += kSegmentThreads) {
    double sum = 0;
    int64_t start = first;
    for (int64_t i = first; i < end; ++i) {
      const int64_t entry = order[i];
      const float weight = a.weight ? a.weight[list * a.sorted.length + entry] : 1.f;
      if (weight != 0.f)
        sum += static_cast<double>(weight) * a.rows.at(a.rows.element(list, static_cast<int>(entry), d));
      if (i + 1 < end && keys[i + 1] == keys[i]) continue;
      a.sums[(list * a.sorted.length + start) * a.rows.pitch + d] = static_cast<float>(sum);
      sum = 0;
      start = i + 1;
    }
  }
}

// One block per chunk and list: joins the run that begins in this chunk and goes on in the next.
static __global__ void __launch_bounds__(kSegmentThreads) join_kernel(SegmentArguments a) {
  const int64_t list = blockIdx.x / a.chunks(), first = blockIdx.x % a.chunks() * kChunk, next = first + kChunk;
  const int64_t* keys = a.sorted.keys + list * a.sorted.length;
  if (next >= a.sorted.length || keys[next] != keys[next - 1]) return;
  int64_t start = next - 1;
  while (start > first && keys[start - 1] == keys[start]) --start;
  if (start == first && first > 0 && keys[first - 1] == keys[first]) return;  // it began earlier
  float* sums = a.sums + list * a.sorted.length * a.rows.pitch;
  for (int d = threadIdx.x; d < a.rows.pitch; d += kSegmentThreads) {
    double sum = sums[start * a.rows.pitch + d];
    for (int64_t i = next; i < a.sorted.length && keys[i] == keys[start]; i += kChunk)
      sum += sums[i * a.rows.pitch + d];
    sums[start * a.rows.pitch + d] = static_cast<float>(sum);
  }
}

inline void sum_segments(const SegmentArguments& a, void* stream) {
  const int64_t blocks = a.sorted.lists * ((a.sorted.length + kChunk - 1) / kChunk);
  launch(segment_kernel, blocks, kSegmentThreads, 0, stream, a);
  launch(join_kernel, blocks, kSegmentThreads, 0, stream, a);
}

MEDCL_DEVICE float sum_over_warp(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

constexpr int kRowsPerBlock = 4;  // a warp per row

// The row (group, row) of this warp; group == groups: none, but the warp stays for the shuffles.
struct WarpRow {
  int64_t group;
  int row, lane;
  __device__ WarpRow(int64_t groups, int count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + (threadIdx.x >> 5);
    lane = threadIdx.x & 31;
    group = i < groups * count ? i / count : groups;
    row = static_cast<int>(i % count);
  }
};

template <class... P, class... A>
void launch_rows(void (*kernel)(P...), const Packed& p, void* stream, A... arguments) {
  launch(kernel, (p.groups * p.count + kRowsPerBlock - 1) / kRowsPerBlock, 32 * kRowsPerBlock, 0, stream, arguments...);
}

}  // namespace medcl::cuda
