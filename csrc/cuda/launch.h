// CUDA kernels as plain functions: raw pointers, element strides and a stream; no torch header. Return cudaError_t as
// int.
#pragma once
#include <cstdint>

namespace medcl {

enum class CudaType : int { f32, f16, bf16 };

// (B, D, L) features with any strides
struct CudaRows {
  const void* data;
  int64_t stride_b, stride_d, stride_l, length;
};

// inverse: (B, L) scratch for each side, used when normalize; index, value: (B, L)
int pair_argmax_cuda(CudaRows query, CudaRows key, CudaType type, int64_t batch, int64_t dim, bool normalize,
                     float* query_inverse, float* key_inverse, int64_t* index, float* value, int device, void* stream);

const char* cuda_error_string(int error);
int cuda_runtime_version();
int cuda_device_count();

}  // namespace medcl
