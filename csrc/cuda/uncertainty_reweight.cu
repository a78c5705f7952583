// uncertainty_reweight on the GPU (medcl_kernels/reference/uncertainty_reweight.py). Bound by memory: features are read
// and written once, in tiles of 32 pixels whose threads lie along the contiguous axis; the logits of a tile are few.
#include "cuda/packed.cuh"
#include "pairs/entropy.h"

namespace medcl::cuda {
namespace {

constexpr int kGateChannels = 64;  // of a block

struct GateArguments {
  Rows x, logits, y;
  float per_log;  // 1 / log M
  int64_t tiles, chunks;
};

MEDCL_DEVICE int64_t offset(const Rows& x, int64_t image, int64_t channel, int64_t pixel) {
  return image * x.stride_b + channel * x.stride_d + pixel * x.stride_l;
}

struct Gate {
  float top, log_sum, entropy;
};

MEDCL_DEVICE Gate gate_of(const Rows& z, int64_t image, int64_t pixel) {
  const int64_t first = offset(z, image, 0, pixel);
  Gate gate{load_element(z, first), 0.f, 0.f};
  for (int64_t m = 1; m < z.dim; ++m) gate.top = raised(gate.top, load_element(z, first + m * z.stride_d));
  float sum = 0.f, weighted = 0.f;
  for (int64_t m = 0; m < z.dim; ++m) add_logit(load_element(z, first + m * z.stride_d) - gate.top, sum, weighted);
  gate.log_sum = logf(sum);
  gate.entropy = entropy_of(sum, gate.log_sum, weighted);
  return gate;
}

// y = x (2 - U) for 32 pixels and 64 channels; with the upstream gradient as x it is the gradient of the features
__global__ void __launch_bounds__(kPackThreads) gate_kernel(GateArguments a) {
  MEDCL_SHARED(memory);
  float* factor = reinterpret_cast<float*>(memory);  // (rows)
  const int64_t tile = blockIdx.x % a.tiles, chunk = blockIdx.x / a.tiles % a.chunks;
  const int64_t image = blockIdx.x / a.tiles / a.chunks, pixel0 = tile * kPackRows;
  if (threadIdx.x < kPackRows && pixel0 + threadIdx.x < a.x.length)
    factor[threadIdx.x] = 2.f - gate_of(a.logits, image, pixel0 + threadIdx.x).entropy * a.per_log;
  __syncthreads();
#pragma unroll
  for (int c0 = 0; c0 < kGateChannels; c0 += kPackRows)
#pragma unroll
    for (int k = 0; k < kPackRows / kPackParts; ++k) {
      const TileElement e(threadIdx.x + k * kPackThreads, a.x.stride_d == 1);
      const int64_t channel = chunk * kGateChannels + c0 + e.channel, pixel = pixel0 + e.row;
      if (channel >= a.x.dim || pixel >= a.x.length) continue;
      const float x = load_element(a.x, offset(a.x, image, channel, pixel));
      store_element(a.y, offset(a.y, image, channel, pixel), x * factor[e.row]);
    }
}

struct LogitArguments {
  Rows d_out, x, logits, d_logits;
  float per_log;
  int64_t tiles;
};

// dL/dz for 32 pixels. The sum over channels of g x is made in double and in a fixed order.
__global__ void __launch_bounds__(kPackThreads) gate_logits_kernel(LogitArguments a) {
  MEDCL_SHARED(memory);
  double* part = reinterpret_cast<double*>(memory);            // (parts, rows)
  Gate* gate = reinterpret_cast<Gate*>(part + kPackThreads);   // (rows)
  float* factor = reinterpret_cast<float*>(gate + kPackRows);  // (rows)
  const int64_t image = blockIdx.x / a.tiles, pixel0 = blockIdx.x % a.tiles * kPackRows;
  const bool along = a.x.stride_d == 1;
  constexpr int kEach = kPackRows / kPackParts;
  double sum[kEach] = {};  // along the channels: of rows warp, warp + 8, ...; else all of this thread's row
  for (int64_t c0 = 0; c0 < a.x.dim; c0 += kPackRows)
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const TileElement e(threadIdx.x + k * kPackThreads, along);
      const int64_t channel = c0 + e.channel, pixel = pixel0 + e.row;
      if (channel >= a.x.dim || pixel >= a.x.length) continue;
      const float g = load_element(a.d_out, offset(a.d_out, image, channel, pixel));
      const float x = load_element(a.x, offset(a.x, image, channel, pixel));
      sum[k] += static_cast<double>(g) * x;
    }
  const int own = threadIdx.x % kPackRows, first = threadIdx.x / kPackRows;
  if (along) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
#pragma unroll
      for (int step = 16; step; step >>= 1) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], step);
      if (own == 0) part[first + k * kPackParts] = sum[k];
    }
  } else {
    part[threadIdx.x] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  __syncthreads();
  if (first == 0 && pixel0 + own < a.x.length) {
    double total = part[own];
    if (!along)
      for (int p = 1; p < kPackParts; ++p) total += part[p * kPackRows + own];
    gate[own] = gate_of(a.logits, image, pixel0 + own);
    factor[own] = static_cast<float>(total) * a.per_log;
  }
  __syncthreads();
  if (pixel0 + own >= a.x.length) return;
  const Rows &z = a.logits, &d_z = a.d_logits;
  const int64_t pixel = pixel0 + own;
  for (int64_t m = first; m < z.dim; m += kPackParts) {
    const float log_p = load_element(z, offset(z, image, m, pixel)) - gate[own].top - gate[own].log_sum;
    store_element(d_z, offset(d_z, image, m, pixel), logit_gradient(log_p, gate[own].entropy, factor[own]));
  }
}

float per_log(const Rows& logits) { return static_cast<float>(1.0 / std::log(static_cast<double>(logits.dim))); }

}  // namespace

void uncertainty_reweight(Workspace& w, const Rows& features, const Rows& logits, const Rows& out) {
  const int64_t tiles = (features.length + kPackRows - 1) / kPackRows;
  const int64_t chunks = (features.dim + kGateChannels - 1) / kGateChannels;
  const GateArguments a{features, logits, out, per_log(logits), tiles, chunks};
  launch(gate_kernel, features.batch * tiles * chunks, kPackThreads, sizeof(float) * kPackRows, w.stream, a);
}

void uncertainty_reweight_backward(Workspace& w, const Rows& d_out, const Rows& features, const Rows& logits,
                                   const Rows& d_features, const Rows& d_logits) {
  if (d_features.data) uncertainty_reweight(w, d_out, logits, d_features);
  if (!d_logits.data) return;
  const int64_t tiles = (features.length + kPackRows - 1) / kPackRows;
  const LogitArguments a{d_out, features, logits, d_logits, per_log(logits), tiles};
  constexpr size_t bytes = sizeof(double) * kPackThreads + (sizeof(Gate) + sizeof(float)) * kPackRows;
  launch(gate_logits_kernel, features.batch * tiles, kPackThreads, bytes, w.stream, a);
}

}  // namespace medcl::cuda
