// Rows of any layout to packed unit rows and back: one fused pass each, tiles of 32 rows x 32 channels in shared
// memory, so that both sides are read and written along their contiguous axis.
#pragma once
#include "cuda/packed.cuh"

namespace medcl::cuda {

MEDCL_DEVICE void store_packed(const Packed& p, int64_t element, float x) {
  switch (p.product) {
    case Product::bf16:
      reinterpret_cast<uint16_t*>(p.rows)[element] = float_to_bf16(x).bits;
      break;
    case Product::fp16:
      reinterpret_cast<uint16_t*>(p.rows)[element] = float_to_half(x).bits;
      break;
    case Product::tf32:
      reinterpret_cast<uint32_t*>(p.rows)[element] = ptx::to_tf32(x);
      break;
    default:
      reinterpret_cast<float*>(p.rows)[element] = x;
  }
}

struct PackArguments {
  Rows x;
  Packed to;
  const int64_t* labels;  // (selections, batch, length) or null: every row takes part
  int selections;
  int64_t ignore_index;
  bool normalize;
};

struct PackBlock {
  int64_t group;
  int row0;
  MEDCL_DEVICE explicit PackBlock(const Packed& p) {
    const int64_t tiles = p.padded / kPackRows;
    group = blockIdx.x / tiles;
    row0 = static_cast<int>(blockIdx.x % tiles) * kPackRows;
  }
};

// Shared memory of the packing kernels, one array after the other.
struct PackMemory {
  double* part;                   // (parts, rows)
  float (*tile)[kPackRows + 1];   // (channels, rows)
  float (*other)[kPackRows + 1];  // (channels, rows)
  int64_t *from, *to;             // (rows): offsets in the tensor read and in the tensor written
  float* row;                     // (rows)
  static constexpr size_t kBytes = sizeof(double) * kPackParts * kPackRows + 2 * sizeof(int64_t) * kPackRows +
                                   sizeof(float) * (2 * kPackRows * (kPackRows + 1) + kPackRows);
  MEDCL_DEVICE explicit PackMemory(unsigned char* memory) {
    part = reinterpret_cast<double*>(memory);
    from = reinterpret_cast<int64_t*>(part + kPackParts * kPackRows);
    to = from + kPackRows;
    tile = reinterpret_cast<float(*)[kPackRows + 1]>(to + kPackRows);
    other = tile + kPackRows;
    row = reinterpret_cast<float*>(other + kPackRows);
  }
};

// One tile of channels [c0, c0 + 32) as (channel, row); zero where there is none, or where a row's factor is zero.
MEDCL_DEVICE void load_tile(const Rows& x, int c0, const PackMemory& m) {
  for (int i = threadIdx.x; i < kPackRows * kPackRows; i += kPackThreads) {
    const TileElement e(i, x.stride_d == 1);
    const int channel = c0 + e.channel;
    const bool in = channel < x.dim && m.row[e.row] != 0.f;
    m.tile[e.channel][e.row] = in ? load_element(x, m.from[e.row] + channel * x.stride_d) : 0.f;
  }
}

// f of all threads of a row (they differ in threadIdx.x / 32), added up in a fixed order; the result in part[row]
MEDCL_DEVICE void add_parts(const PackMemory& m, double value) {
  m.part[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x < kPackRows)
    for (int part = 1; part < kPackParts; ++part) m.part[threadIdx.x] += m.part[part * kPackRows + threadIdx.x];
  __syncthreads();
}

__global__ void __launch_bounds__(kPackThreads) pack_kernel(PackArguments a) {
  MEDCL_SHARED(memory);
  const PackMemory m(memory);
  const PackBlock block(a.to);
  const int own = threadIdx.x % kPackRows, part = threadIdx.x / kPackRows;
  if (part == 0) {
    const int row = block.row0 + own;
    bool valid = row < a.to.count;
    if (valid && a.labels) {
      valid = false;
      for (int k = 0; k < a.selections; ++k)
        valid |= a.labels[(k * a.to.groups + block.group) * a.to.count + row] != a.ignore_index;
    }
    m.row[own] = valid ? 1.f : 0.f;
    m.from[own] = valid ? row_offset(a.x, block.group, row) : 0;
  }
  __syncthreads();
  if (a.normalize) {
    double square = 0;
    for (int c0 = 0; c0 < a.x.dim; c0 += kPackRows) {
      load_tile(a.x, c0, m);
      __syncthreads();
      for (int c = part; c < kPackRows; c += kPackParts) {
        const double v = m.tile[c][own];
        square += v * v;
      }
      __syncthreads();
    }
    add_parts(m, square);
  }
  if (part == 0) {
    float inverse = m.row[own];
    if (a.normalize) {
      const double norm = sqrt(m.part[own]);
      inverse = norm > 0 ? static_cast<float>(1.0 / (norm < 1e-12 ? 1e-12 : norm)) : inverse * static_cast<float>(norm);
    }
    m.row[own] = inverse;  // a NaN in the row stays one
    a.to.inverse[block.group * a.to.padded + block.row0 + own] = inverse;
  }
  __syncthreads();
  for (int c0 = 0; c0 < a.to.pitch; c0 += kPackRows) {
    load_tile(a.x, c0, m);
    __syncthreads();
    for (int i = threadIdx.x; i < kPackRows * kPackRows; i += kPackThreads) {
      const TileElement e(i, true);
      store_packed(a.to, a.to.element(block.group, block.row0 + e.row, c0 + e.channel),
                   m.tile[e.channel][e.row] * m.row[e.row]);
    }
    __syncthreads();
  }
}

struct UnpackArguments {
  Rows x, d_x;
  Packed from;
  const float* d_z;  // (groups, padded, pitch)
  bool normalize;
};

// dx = (dz - z <z, dz>) / norm in the layout of x; zero where a row is left out, or where nothing came in (so that a
// NaN in a row that takes part in no pair does not come back).
__global__ void __launch_bounds__(kPackThreads, 4) unpack_kernel(UnpackArguments a) {
  MEDCL_SHARED(memory);
  const PackMemory m(memory);
  const PackBlock block(a.from);
  const int own = threadIdx.x % kPackRows, part = threadIdx.x / kPackRows;
  if (part == 0) {
    const int row = block.row0 + own;
    m.row[own] = row < a.from.count ? a.from.inverse[block.group * a.from.padded + row] : 0.f;
    m.from[own] = row_offset(a.x, block.group, row);
    m.to[own] = row_offset(a.d_x, block.group, row);
  }
  __syncthreads();
  const auto load_gradient = [&](int c0) {
    for (int i = threadIdx.x; i < kPackRows * kPackRows; i += kPackThreads) {
      const TileElement e(i, true);
      const bool in = c0 + e.channel < a.x.dim && m.row[e.row] != 0.f;
      const int64_t at = a.from.element(block.group, block.row0 + e.row, c0 + e.channel);
      m.other[e.channel][e.row] = in ? a.d_z[at] : 0.f;
    }
  };
  double along = 0;
  bool any = false;
  for (int c0 = 0; c0 < a.x.dim; c0 += kPackRows) {
    if (a.normalize) load_tile(a.x, c0, m);
    load_gradient(c0);
    __syncthreads();
    for (int c = part; c < kPackRows; c += kPackParts) {
      const float d = m.other[c][own];
      any |= d != 0.f;
      if (a.normalize && d != 0.f) along += static_cast<double>(m.tile[c][own]) * m.row[own] * d;
    }
    __syncthreads();
  }
  add_parts(m, any ? 1.0 : 0.0);
  const bool moved = m.part[own] > 0;
  __syncthreads();
  add_parts(m, along);
  if (part == 0 && !moved) m.row[own] = 0.f;
  __syncthreads();
  for (int c0 = 0; c0 < a.x.dim; c0 += kPackRows) {
    if (a.normalize) load_tile(a.x, c0, m);
    load_gradient(c0);
    __syncthreads();
    for (int i = threadIdx.x; i < kPackRows * kPackRows; i += kPackThreads) {
      const TileElement e(i, a.d_x.stride_d == 1);
      const int channel = c0 + e.channel;
      if (block.row0 + e.row >= a.from.count || channel >= a.x.dim) continue;
      const float inverse = m.row[e.row];
      float d = inverse == 0.f ? 0.f : m.other[e.channel][e.row];
      if (a.normalize && inverse != 0.f)
        d = static_cast<float>((d - m.tile[e.channel][e.row] * static_cast<double>(inverse) * m.part[e.row]) * inverse);
      store_element(a.d_x, m.to[e.row] + channel * a.d_x.stride_d, d);
    }
    __syncthreads();
  }
}

}  // namespace medcl::cuda
