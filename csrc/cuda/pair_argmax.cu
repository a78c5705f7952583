// Correspondence by cosine similarity: for every query row the most similar key row of its image, fp32 accumulation.
// SIMT, 64 x 64 similarities per block step in registers (4 x 4 per thread); equal products are summed in the same
// order wherever they stand, so a tie is exact and goes to the smallest index.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace medcl {
namespace {

constexpr int kTile = 64, kDepth = 32, kThreads = 256, kPer = 4;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class S>
__global__ void __launch_bounds__(kThreads)
    inverse_norm_kernel(CudaRows x, int64_t batch, int64_t dim, float* inverse) {
  const int64_t r = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (r >= batch * x.length) return;
  const S* p = static_cast<const S*>(x.data) + r / x.length * x.stride_b + r % x.length * x.stride_l;
  float sum = 0.f;
  for (int64_t d = 0; d < dim; ++d) {
    const float v = widen(p[d * x.stride_d]);
    sum += v * v;
  }
  inverse[r] = sum > 0.f ? 1.f / fmaxf(sqrtf(sum), 1e-12f) : 0.f;
}

// Rows [first, first + 64) and channels [d0, d0 + 32) of image b, zero beyond the end, stored [channel][row].
template <class S>
__device__ __forceinline__ void load_tile(const CudaRows& x, const float* inverse, int64_t b, int64_t first, int64_t d0,
                                          int64_t dim, float (*tile)[kTile + 1]) {
  const S* p = static_cast<const S*>(x.data) + b * x.stride_b;
  for (int e = threadIdx.x; e < kTile * kDepth; e += kThreads) {
    // neighbouring threads follow the contiguous axis
    const int row = x.stride_d == 1 ? e / kDepth : e % kTile, d = x.stride_d == 1 ? e % kDepth : e / kTile;
    const bool inside = first + row < x.length && d0 + d < dim;
    float v = 0.f;
    if (inside) {
      v = widen(p[(first + row) * x.stride_l + (d0 + d) * x.stride_d]);
      if (inverse) v *= inverse[b * x.length + first + row];
    }
    tile[d][row] = v;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    pair_argmax_kernel(CudaRows query, CudaRows key, int64_t dim, const float* query_inverse, const float* key_inverse,
                       int64_t* index, float* value) {
  __shared__ float q_tile[kDepth][kTile + 1], k_tile[kDepth][kTile + 1];
  const int64_t b = blockIdx.y, i0 = blockIdx.x * static_cast<int64_t>(kTile);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;  // rows ty + 16 a, columns tx + 16 c
  float best[kPer];
  int64_t at[kPer];
  for (int a = 0; a < kPer; ++a) {
    best[a] = -INFINITY;
    at[a] = 0;
  }
  for (int64_t j0 = 0; j0 < key.length; j0 += kTile) {
    float acc[kPer][kPer] = {};
    for (int64_t d0 = 0; d0 < dim; d0 += kDepth) {
      __syncthreads();
      load_tile<S>(query, query_inverse, b, i0, d0, dim, q_tile);
      load_tile<S>(key, key_inverse, b, j0, d0, dim, k_tile);
      __syncthreads();
#pragma unroll 8
      for (int d = 0; d < kDepth; ++d) {
        float qa[kPer], kc[kPer];
        for (int a = 0; a < kPer; ++a) qa[a] = q_tile[d][ty + 16 * a];
        for (int c = 0; c < kPer; ++c) kc[c] = k_tile[d][tx + 16 * c];
        for (int a = 0; a < kPer; ++a)
          for (int c = 0; c < kPer; ++c) acc[a][c] = fmaf(qa[a], kc[c], acc[a][c]);
      }
    }
    for (int a = 0; a < kPer; ++a)
      for (int c = 0; c < kPer; ++c) {
        const int64_t j = j0 + tx + 16 * c;
        if (j < key.length && acc[a][c] > best[a]) {  // j grows with c and j0: the first of equals stays
          best[a] = acc[a][c];
          at[a] = j;
        }
      }
  }
  for (int a = 0; a < kPer; ++a) {
    for (int step = 8; step; step >>= 1) {  // the 16 lanes that share a row
      const float other = __shfl_xor_sync(~0u, best[a], step, 16);
      const int64_t other_at = __shfl_xor_sync(~0u, static_cast<long long>(at[a]), step, 16);
      if (other > best[a] || (other == best[a] && other_at < at[a])) {
        best[a] = other;
        at[a] = other_at;
      }
    }
    const int64_t row = i0 + ty + 16 * a;
    if (tx == 0 && row < query.length) {
      index[b * query.length + row] = at[a];
      value[b * query.length + row] = best[a];
    }
  }
}

template <class S>
int launch(CudaRows query, CudaRows key, int64_t batch, int64_t dim, bool normalize, float* query_inverse,
           float* key_inverse, int64_t* index, float* value, cudaStream_t stream) {
  if (normalize) {
    const auto blocks = [&](const CudaRows& x) {
      return static_cast<unsigned>((batch * x.length + kThreads - 1) / kThreads);
    };
    inverse_norm_kernel<S><<<blocks(query), kThreads, 0, stream>>>(query, batch, dim, query_inverse);
    inverse_norm_kernel<S><<<blocks(key), kThreads, 0, stream>>>(key, batch, dim, key_inverse);
  }
  const dim3 grid(static_cast<unsigned>((query.length + kTile - 1) / kTile), static_cast<unsigned>(batch));
  pair_argmax_kernel<S><<<grid, kThreads, 0, stream>>>(query, key, dim, normalize ? query_inverse : nullptr,
                                                       normalize ? key_inverse : nullptr, index, value);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int pair_argmax_cuda(CudaRows query, CudaRows key, CudaType type, int64_t batch, int64_t dim, bool normalize,
                     float* query_inverse, float* key_inverse, int64_t* index, float* value, int device, void* stream) {
  // the static runtime keeps a current device of its own
  const int set = static_cast<int>(cudaSetDevice(device));
  if (set != 0) return set;
  const auto run = [&](auto tag) {
    return launch<decltype(tag)>(query, key, batch, dim, normalize, query_inverse, key_inverse, index, value,
                                 static_cast<cudaStream_t>(stream));
  };
  switch (type) {
    case CudaType::f16:
      return run(__half{});
    case CudaType::bf16:
      return run(__nv_bfloat16{});
    default:
      return run(float{});
  }
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // a machine without a driver leaves an error behind
    return 0;
  }
  return count;
}

}  // namespace medcl
