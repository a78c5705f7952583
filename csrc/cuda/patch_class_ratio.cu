// patch_class_ratio on the GPU (medcl_kernels/reference/patch_class_ratio.py): every window is counted by a warp, or by
// a block where windows are large, in integers: exact, and the same in any order.
#include "cuda/launch.cuh"
#include "pairs/windows.h"

namespace medcl::cuda {
namespace {

constexpr int kRatioThreads = 256, kAtOnce = 4;  // classes counted in one pass over a window
constexpr int kWindowsAtOnce = 16;               // sizes of one launch
constexpr int64_t kBlockCells = 1024;            // larger windows have a block of their own

struct RatioArguments {
  LabelMap map;
  const int64_t* centers;  // (count, dims)
  int64_t count, from[kWindowsAtOnce][3], to[kWindowsAtOnce][3];
  int dims, windows, num_classes, team;  // team: threads that count a window together
  bool full, wide;
  void* out;  // (windows, batch, num_classes - 1, count), double where wide, else float
};

template <class S>
__global__ void __launch_bounds__(kRatioThreads) ratio_kernel(RatioArguments a) {
  MEDCL_SHARED(memory);
  int* counts = reinterpret_cast<int*>(memory);  // (warps, kAtOnce)
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kRatioThreads / a.team) + threadIdx.x / a.team;
  const int64_t i = n % a.count, image = n / a.count % a.map.batch, window = n / a.count / a.map.batch;
  const bool valid = window < a.windows;
  const int member = threadIdx.x % a.team;
  Box box{{0, 0, 0}, {1, 1, 1}};
  int64_t whole = 1;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    if (!valid || axis < 3 - a.dims) continue;
    const int64_t from = a.from[window][axis], to = a.to[window][axis];
    clip_window(box, axis, a.centers[i * a.dims + axis - (3 - a.dims)], from, to, a.map.size[axis]);
    whole *= to - from;
  }
  const auto cells = static_cast<uint32_t>(valid ? cells_of(box) : 0);
  const auto rows = static_cast<uint32_t>(box.high[1] - box.low[1]);
  const auto length = static_cast<uint32_t>(box.high[2] - box.low[2]);
  const S* labels = static_cast<const S*>(a.map.data) + image * a.map.stride_b;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) labels += box.low[axis] * a.map.stride[axis];

  for (int k0 = 1; k0 < a.num_classes; k0 += kAtOnce) {
    int own[kAtOnce] = {};
    for (uint32_t cell = member; cell < cells; cell += a.team) {
      const uint32_t row = cell / length;
      const int64_t label =
          labels[row / rows * a.map.stride[0] + row % rows * a.map.stride[1] + cell % length * a.map.stride[2]];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) own[k] += label == k0 + k;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (int step = 16; step; step >>= 1) own[k] += __shfl_xor_sync(0xffffffffu, own[k], step);
      if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32 * kAtOnce + k] = own[k];
    }
    __syncthreads();
    if (valid && member < kAtOnce && k0 + member < a.num_classes) {
      int64_t total = 0;
      for (int warp = 0; warp < a.team / 32; ++warp) total += counts[(threadIdx.x / 32 + warp) * kAtOnce + member];
      const int64_t classes = a.num_classes - 1;
      const int64_t at = ((window * a.map.batch + image) * classes + k0 - 1 + member) * a.count + i;
      const int64_t size = a.full ? whole : cells;
      if (a.wide)
        static_cast<double*>(a.out)[at] = share_of<double>(total, size);
      else
        static_cast<float*>(a.out)[at] = share_of<float>(total, size);
    }
    __syncthreads();
  }
}

void run(const RatioArguments& a, void* stream) {
  const int64_t teams = kRatioThreads / a.team, blocks = (a.windows * a.map.batch * a.count + teams - 1) / teams;
  constexpr size_t bytes = sizeof(int) * kRatioThreads / 32 * kAtOnce;
  const auto start = [&](auto kernel) { launch(kernel, blocks, kRatioThreads, bytes, stream, a); };
  switch (a.map.type) {
    case LabelType::u8:
      return start(ratio_kernel<uint8_t>);
    case LabelType::i8:
      return start(ratio_kernel<int8_t>);
    case LabelType::i16:
      return start(ratio_kernel<int16_t>);
    case LabelType::i32:
      return start(ratio_kernel<int32_t>);
    case LabelType::i64:
      return start(ratio_kernel<int64_t>);
  }
}

}  // namespace

void patch_class_ratio(Workspace& w, const LabelMap& map, const int64_t* centers, int64_t count, int dims,
                       const int64_t* bounds, int64_t windows, int num_classes, bool full, bool wide, void* out) {
  const int64_t bytes = map.batch * (num_classes - 1) * count * (wide ? sizeof(double) : sizeof(float));
  for (int64_t first = 0; first < windows; first += kWindowsAtOnce) {
    RatioArguments a{};
    a.map = map;
    a.centers = centers;
    a.count = count;
    a.dims = dims;
    a.windows = static_cast<int>(windows - first < kWindowsAtOnce ? windows - first : kWindowsAtOnce);
    a.num_classes = num_classes;
    a.full = full;
    a.wide = wide;
    a.out = static_cast<char*>(out) + first * bytes;
    a.team = 32;
    for (int p = 0; p < a.windows; ++p) {
      int64_t cells = 1;
      for (int axis = 3 - dims; axis < 3; ++axis) {
        const int64_t* bound = bounds + ((first + p) * dims + axis - (3 - dims)) * 2;
        a.from[p][axis] = bound[0];
        a.to[p][axis] = bound[1];
        cells *= bound[1] - bound[0] < map.size[axis] ? bound[1] - bound[0] : map.size[axis];
      }
      if (cells > kBlockCells) a.team = kRatioThreads;
    }
    run(a, w.stream);
  }
}

}  // namespace medcl::cuda
