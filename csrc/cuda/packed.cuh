// Rows as the engine reads them.
#pragma once
#include "cuda/launch.cuh"

namespace medcl::cuda {

// Rows of one tensor, packed: (groups, padded, pitch) elements, zeros in rows that are left out and in the padding.
struct Packed {
  unsigned char* rows = nullptr;
  float* inverse = nullptr;  // (groups, padded): 1 / norm; 1 where rows are taken as they are; 0: no gradient
  int64_t groups = 0, length = 0;
  int count = 0, padded = 0, pitch = 0;
  Product product = Product::ieee;

  MEDCL_DEVICE int64_t element(int64_t group, int row, int channel) const {
    return (group * padded + row) * pitch + channel;
  }
  MEDCL_DEVICE float at(int64_t element) const {
    if (product == Product::tf32 || product == Product::ieee) return reinterpret_cast<const float*>(rows)[element];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(rows)[element];
    return product == Product::bf16 ? bf16_to_float(Bf16{bits}) : half_to_float(Half{bits});
  }
};

}  // namespace medcl::cuda
