// Rows as tensors have them, element by element, and as the engine reads them.
#pragma once
#include "cuda/launch.cuh"

namespace medcl::cuda {

constexpr int kPackRows = 32, kPackThreads = 256, kPackParts = kPackThreads / kPackRows;

// Which element a thread has in a 32 x 32 tile: neighbours along the channels, or along the rows.
struct TileElement {
  int row, channel;
  __device__ TileElement(int i, bool along_channels)
      : row(along_channels ? i / kPackRows : i % kPackRows), channel(along_channels ? i % kPackRows : i / kPackRows) {}
};

MEDCL_DEVICE float load_element(const Rows& x, int64_t at) {
  if (x.type == Type::f32) return static_cast<const float*>(x.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(x.data)[at];
  return x.type == Type::bf16 ? bf16_to_float(Bf16{bits}) : half_to_float(Half{bits});
}
MEDCL_DEVICE void store_element(const Rows& x, int64_t at, float value) {
  if (x.type == Type::f32)
    static_cast<float*>(x.data)[at] = value;
  else
    static_cast<uint16_t*>(x.data)[at] = x.type == Type::bf16 ? float_to_bf16(value).bits : float_to_half(value).bits;
}

// Offset of row r of a group in a tensor: a group is an image, or all images one after the other.
MEDCL_DEVICE int64_t row_offset(const Rows& x, int64_t group, int64_t r) {
  return (group + r / x.length) * x.stride_b + r % x.length * x.stride_l;
}

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
