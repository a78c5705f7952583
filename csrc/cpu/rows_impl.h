// Rows in and out of tiles: norms, widening, packing in either layout, and the way back. Part of kernels_impl.h:
// compiled once per instruction set.
#include <algorithm>
#include <cmath>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/tile.h"
#include "pairs/numbers.h"

namespace medcl {
namespace MEDCL_ISA {

template <class S>
struct Widen;
template <>
struct Widen<double> {
  static inline double to(double x) { return x; }
  static inline double from(double x) { return x; }
};
template <>
struct Widen<float> {
  static inline float to(float x) { return x; }
  static inline float from(double x) { return static_cast<float>(x); }
};
template <>
struct Widen<Bf16> {
  static inline float to(Bf16 x) { return bf16_to_float(x); }
  static inline Bf16 from(float x) { return float_to_bf16(x); }
};
template <>
struct Widen<Half> {
  static inline float to(Half x) { return half_to_float(x); }
  static inline Half from(float x) { return float_to_half(x); }
};

template <class F>
static inline void with_dtype(DType t, F&& f) {
  switch (t) {
    case DType::f64:
      return f(double{});
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(Bf16{});
    case DType::f16:
      return f(Half{});
  }
}

// Whether rows follow each other in memory, so that each channel of a channel-major source is one run.
static inline bool consecutive(const int64_t* offset, int64_t n) {
  bool yes = true;
  for (int64_t r = 0; r < n; ++r) yes &= offset[r] == offset[0] + r;
  return yes;
}

template <class T>
void inverse_norm(const Rows& x, int64_t first, int64_t n, double* inverse) {
  with_dtype(x.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* p = static_cast<const S*>(x.data);
    constexpr int64_t block = 128;  // rows at a time, so that a channel-major source is read along its rows
    double sum[block];
    for (int64_t r0 = 0; r0 < n; r0 += block) {
      const int64_t m = std::min(block, n - r0);
      const int64_t* off = x.offset + first + r0;
      if (x.stride_d == 1) {
        for (int64_t r = 0; r < m; ++r) {
          const S* row = p + off[r];
          double acc = 0;
#pragma omp simd reduction(+ : acc)
          for (int64_t d = 0; d < x.dim; ++d) {
            const double v = Widen<S>::to(row[d]);
            acc += v * v;
          }
          sum[r] = acc;
        }
      } else {
        std::fill(sum, sum + m, 0.0);
        for (int64_t d = 0; d < x.dim; ++d) {
          const S* column = p + d * x.stride_d;
          if (consecutive(off, m)) {
            const S* run = column + off[0];
            for (int64_t r = 0; r < m; ++r) {
              const double v = Widen<S>::to(run[r]);
              sum[r] += v * v;
            }
          } else {
            for (int64_t r = 0; r < m; ++r) {
              const double v = Widen<S>::to(column[off[r]]);
              sum[r] += v * v;
            }
          }
        }
      }
      for (int64_t r = 0; r < m; ++r) inverse[r0 + r] = sum[r] > 0 ? 1.0 / std::max(std::sqrt(sum[r]), 1e-12) : 0.0;
    }
  });
}

constexpr int64_t kEdge = 16;  // blocks of 16 x 16 turn in registers or L1

// out[d * ld + r] = block[r][d] for r < h, d < w
template <class T>
static inline void turn(const T (*block)[kEdge], int64_t h, int64_t w, T* out, int64_t ld) {
  for (int64_t d = 0; d < w; ++d)
    for (int64_t r = 0; r < h; ++r) out[d * ld + r] = block[r][d];
}

#if defined(__AVX512F__)
// Four rounds of pairwise exchanges at distances 1, 2, 4 and 8.
static inline void turn(const float (*block)[kEdge], int64_t h, int64_t w, float* out, int64_t ld) {
  if (h < kEdge || w < kEdge) return turn<float>(block, h, w, out, ld);
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(block[i]);
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 2; ++k) {
      const __m512d lo = _mm512_castps_pd(b[4 * i + k]), hi = _mm512_castps_pd(b[4 * i + 2 + k]);
      a[4 * i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      a[4 * i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 4; ++k) {
      b[8 * i + k] = _mm512_shuffle_f32x4(a[8 * i + k], a[8 * i + 4 + k], 0x88);
      b[8 * i + 4 + k] = _mm512_shuffle_f32x4(a[8 * i + k], a[8 * i + 4 + k], 0xdd);
    }
  for (int k = 0; k < 8; ++k) {
    const int d = k;  // column of the 128-bit lanes 0 and 2, then 1 and 3
    _mm512_storeu_ps(out + d * ld, _mm512_shuffle_f32x4(b[k], b[8 + k], 0x88));
    _mm512_storeu_ps(out + (d + 8) * ld, _mm512_shuffle_f32x4(b[k], b[8 + k], 0xdd));
  }
}
#endif

// Reads along the source's contiguous axis; where the tile wants the other one, blocks turn on the way.
template <class T>
Tile<T> pack(const Rows& x, int64_t first, int64_t n, const double* scale, Layout layout, T* out) {
  const int64_t* off = x.offset + first;
  const int64_t dim = x.dim;
  const double* f = scale ? scale + first : nullptr;
  const bool rows_in = x.stride_d == 1, rows_out = layout == Layout::row_major || n == 1;
  with_dtype(x.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* p = static_cast<const S*>(x.data);
    alignas(64) T block[kEdge][kEdge];
    auto load_row = [&](int64_t r, int64_t d0, int64_t w, T* to) {
      const S* row = p + off[r] + d0;
      const T g = f ? static_cast<T>(f[r]) : T(1);
      for (int64_t d = 0; d < w; ++d) to[d] = static_cast<T>(Widen<S>::to(row[d])) * g;
    };
    const bool run = consecutive(off, n);
    auto load_channel = [&](int64_t d, int64_t r0, int64_t h, T* to) {
      const S* column = p + d * x.stride_d;
      if (run) {
        const S* q = column + off[0] + r0;
        if (f)
          for (int64_t r = 0; r < h; ++r) to[r] = static_cast<T>(Widen<S>::to(q[r])) * static_cast<T>(f[r0 + r]);
        else
          for (int64_t r = 0; r < h; ++r) to[r] = static_cast<T>(Widen<S>::to(q[r]));
      } else {
        for (int64_t r = 0; r < h; ++r)
          to[r] = static_cast<T>(Widen<S>::to(column[off[r0 + r]])) * (f ? static_cast<T>(f[r0 + r]) : T(1));
      }
    };
    if (rows_in && rows_out) {
      for (int64_t r = 0; r < n; ++r) load_row(r, 0, dim, out + r * dim);
    } else if (!rows_in && !rows_out) {
      for (int64_t d = 0; d < dim; ++d) load_channel(d, 0, n, out + d * n);
    } else {
      for (int64_t r0 = 0; r0 < n; r0 += kEdge)
        for (int64_t d0 = 0; d0 < dim; d0 += kEdge) {
          const int64_t h = std::min(kEdge, n - r0), w = std::min(kEdge, dim - d0);
          if (rows_in) {
            for (int64_t r = 0; r < h; ++r) load_row(r0 + r, d0, w, block[r]);
            turn(block, h, w, out + d0 * n + r0, n);
          } else {
            for (int64_t d = 0; d < w; ++d) load_channel(d0 + d, r0, h, block[d]);
            turn(block, w, h, out + r0 * dim + d0, dim);
          }
        }
    }
  });
  return rows_out ? Tile<T>{out, dim, 1} : Tile<T>{out, 1, n};
}

template <class T>
void unpack(const T* tile, int64_t ld, const RowsOut& y, int64_t first, int64_t n) {
  const int64_t* off = y.offset + first;
  with_dtype(y.dtype, [&](auto tag) {
    using S = decltype(tag);
    S* p = static_cast<S*>(y.data);
    if (y.stride_d == 1) {
      for (int64_t r = 0; r < n; ++r)
        for (int64_t d = 0; d < y.dim; ++d) p[off[r] + d] = Widen<S>::from(tile[r * ld + d]);
      return;
    }
    alignas(64) T block[kEdge][kEdge], turned[kEdge][kEdge];
    for (int64_t r0 = 0; r0 < n; r0 += kEdge)
      for (int64_t d0 = 0; d0 < y.dim; d0 += kEdge) {
        const int64_t h = std::min(kEdge, n - r0), w = std::min(kEdge, y.dim - d0);
        for (int64_t r = 0; r < h; ++r) std::copy_n(tile + (r0 + r) * ld + d0, w, block[r]);
        turn(block, h, w, turned[0], kEdge);
        for (int64_t d = 0; d < w; ++d)
          for (int64_t r = 0; r < h; ++r) p[off[r0 + r] + (d0 + d) * y.stride_d] = Widen<S>::from(turned[d][r]);
      }
  });
}

}  // namespace MEDCL_ISA
}  // namespace medcl
