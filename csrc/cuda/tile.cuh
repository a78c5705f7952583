// Tiles of packed rows in shared memory, and the two products that every pair operation is made of, for one block.
// Scores and gradients live in registers in the layout of the mma accumulator: lane (g, t) of a warp holds rows
// g and g + 8 and columns 2t and 2t + 1 of every 16 x 8 piece. The SIMT path keeps that layout, so that an epilogue
// does not know how the products were made.
#pragma once
#include "cuda/launch.cuh"

namespace medcl::cuda {

// How a product is made. Rows are stored 2 bytes an element where kHalf, else 4.
struct Bf16Product {
  static constexpr bool kHalf = true, kMma = true;
  static MEDCL_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_bf16(c, a, b0, b1);
  }
  static MEDCL_DEVICE uint32_t pair(float low, float high) { return ptx::pack_bf16(low, high); }
};
struct Fp16Product {
  static constexpr bool kHalf = true, kMma = true;
  static MEDCL_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_fp16(c, a, b0, b1);
  }
  static MEDCL_DEVICE uint32_t pair(float low, float high) { return ptx::pack_fp16(low, high); }
};
struct Tf32Product {
  static constexpr bool kHalf = false, kMma = true;
  static MEDCL_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_tf32(c, a, b0, b1);
  }
};
struct IeeeProduct {  // fp32 multiply-add, no tensor core
  static constexpr bool kHalf = false, kMma = false;
};

// Slab: channels of a row that are in shared memory at once. Resident: the rows have one slab, and those that a block
// owns stay; else slabs of both sides stream, for any number of channels.
template <class Product_, int Slab_, int Warps, int RowTiles_, int Columns_, int Stages_, bool Resident_>
struct Tile {
  using Product = Product_;
  static constexpr int kSlab = Slab_, kRowTiles = RowTiles_, kColumns = Columns_, kStages = Stages_;
  static constexpr bool kResident = Resident_;
  static constexpr int kThreads = 32 * Warps, kRows = 16 * kRowTiles * Warps;
  static constexpr int kColumnTiles = kColumns / 8, kChannelTiles = kSlab / 8;
  static constexpr int kElement = Product::kHalf ? 2 : 4, kPitch = kSlab * kElement;  // bytes
  static constexpr int kChunks = kPitch / 16, kSteps = kPitch / 32;                   // a step: one mma of depth
  static constexpr uint32_t kOwnedBytes = kRows * kPitch, kStreamedBytes = kColumns * kPitch;
  static constexpr uint32_t kStageBytes = kStreamedBytes + (kResident ? 0 : kOwnedBytes);
  static_assert(kChunks % 8 == 0 && kColumns % 16 == 0 && kStages >= 2, "tile");

  // what tiles for wgmma (wgmma.cuh) have otherwise
  static constexpr bool kWgmma = false;
  static constexpr int kAlign = 128;             // of the block's shared memory
  static constexpr int kMinBlocks = 0;           // if the epilogue's is not what is wanted
  static constexpr int kMostThreads = kThreads;  // of a launch; fewer: this architecture lacks the kernel
  static MEDCL_DEVICE void publish_copies() {}   // after a thread's copies have landed, before the barrier

  using Scores = float[kRowTiles][kColumnTiles][4];
  using Sums = float[kRowTiles][kChannelTiles][4];

  // Eight consecutive rows at one logical chunk fall into eight different groups of four banks.
  static MEDCL_DEVICE uint32_t at(int row, int chunk) {
    return static_cast<uint32_t>(row * kPitch + ((chunk ^ (row & 7)) << 4));
  }
};

struct Lane {
  int warp, lane, g, t;
  __device__ Lane() : warp(threadIdx.x >> 5), lane(threadIdx.x & 31), g(lane >> 2), t(lane & 3) {}
};

// rows [first, first + Count) of a packed matrix, one slab of them; zeros from `limit` on
template <class T, int Count>
MEDCL_DEVICE void load_rows(uint32_t to, const unsigned char* rows, int64_t row_bytes, int first, int limit) {
#pragma unroll 4
  for (int i = threadIdx.x; i < Count * T::kChunks; i += T::kThreads) {
    const int row = i / T::kChunks, chunk = i % T::kChunks;
    const bool ok = first + row < limit;
    ptx::cp_async_16(to + T::at(row, chunk), rows + (ok ? first + row : 0) * row_bytes + chunk * 16, ok);
  }
}

// s += <owned row, streamed row> over one slab. `owned` is the address of the warp's rows.
template <class T>
MEDCL_DEVICE void add_scores(uint32_t owned, int warp_row, uint32_t streamed, const Lane& l, typename T::Scores& s) {
  if constexpr (T::Product::kMma) {
#pragma unroll
    for (int k = 0; k < T::kSteps; ++k) {
      uint32_t a[T::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
        ptx::ldmatrix_x4(a[m], owned + T::at(warp_row + m * 16 + (l.lane & 15), k * 2 + (l.lane >> 4)));
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, streamed + T::at(n * 8 + (l.lane & 7) + (l.lane >> 4) * 8, k * 2 + (l.lane >> 3 & 1)));
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
          T::Product::mma(s[m][n], a[m], b[0], b[1]);
          T::Product::mma(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int chunk = 0; chunk < T::kChunks; ++chunk) {
      float a[T::kRowTiles][2][4];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) ptx::load_shared(a[m][h], owned + T::at(warp_row + m * 16 + l.g + h * 8, chunk));
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float b[4];
          ptx::load_shared(b, streamed + T::at(n * 8 + l.t * 2 + e, chunk));
#pragma unroll
          for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int d = 0; d < 4; ++d) s[m][n][h * 2 + e] = fmaf(a[m][h][d], b[d], s[m][n][h * 2 + e]);
        }
    }
  }
}

// sums += w K for the slab of K in shared memory
template <class T>
MEDCL_DEVICE void add_weighted_rows(const typename T::Scores& w, uint32_t streamed, const Lane& l,
                                    typename T::Sums& sums) {
  if constexpr (T::Product::kHalf) {
#pragma unroll
    for (int j = 0; j < T::kColumns / 16; ++j) {  // 16 rows of K: two pieces of w are one A fragment
      uint32_t a[T::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float(&x)[4] = w[m][2 * j + (r >> 1)];
          a[m][r] = T::Product::pair(x[2 * (r & 1)], x[2 * (r & 1) + 1]);
        }
#pragma unroll
      for (int d = 0; d < T::kChannelTiles; d += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, streamed + T::at(j * 16 + (l.lane & 15), d + (l.lane >> 4)));
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
          T::Product::mma(sums[m][d], a[m], b[0], b[1]);
          T::Product::mma(sums[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  } else if constexpr (T::Product::kMma) {
    // The depth index may be permuted if both operands agree: slots t and t + 4 hold the lane's own columns 2t and
    // 2t + 1, so that w is an A fragment as it stands.
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      uint32_t a[T::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[m][r] = ptx::to_tf32(w[m][n][(r & 1) * 2 + (r >> 1)]);
      const int row = n * 8 + l.t * 2;
#pragma unroll
      for (int d = 0; d < T::kChannelTiles; ++d) {
        const int chunk = d * 2 + (l.g >> 2), within = (l.g & 3) * 4;
        const uint32_t b0 = ptx::load_shared(streamed + T::at(row, chunk) + within);
        const uint32_t b1 = ptx::load_shared(streamed + T::at(row + 1, chunk) + within);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) T::Product::mma(sums[m][d], a[m], b0, b1);
      }
    }
  } else {
    // Columns that are added up before they join the sum: a chain of all of them has twice the rounding error, and this
    // costs five operations for four.
    constexpr int kTogether = 4;
    static_assert(8 % kTogether == 0 && kTogether % 2 == 0, "w[...][k & 1] is the column's own");
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll 1
      for (int j = 0; j < 8; j += kTogether) {
        float a[kTogether][T::kRowTiles][2];
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
#pragma unroll
          for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)  // the lane of the quad that holds column j + k
              a[k][m][h] = __shfl_sync(0xffffffffu, w[m][n][h * 2 + (k & 1)], (l.lane & 28) | ((j + k) >> 1));
#pragma unroll
        for (int d = 0; d < T::kChannelTiles; ++d) {
          float b[kTogether][2];
#pragma unroll
          for (int k = 0; k < kTogether; ++k)
            ptx::load_shared(b[k], streamed + T::at(n * 8 + j + k, d * 2 + (l.t >> 1)) + (l.t & 1) * 8);
#pragma unroll
          for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              float part = a[0][m][r >> 1] * b[0][r & 1];
#pragma unroll
              for (int k = 1; k < kTogether; ++k) part = fmaf(a[k][m][r >> 1], b[k][r & 1], part);
              sums[m][d][r] += part;
            }
        }
      }
  }
}

}  // namespace medcl::cuda
