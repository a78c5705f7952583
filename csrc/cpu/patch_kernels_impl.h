// Compiled once per instruction set, after kernels_impl.h, with the exp2_lanes of products_impl.h.
#include "cpu/patch_kernels.h"
#include "cpu/window_kernels_impl.h"
#include "pairs/entropy.h"

namespace medcl {
namespace MEDCL_ISA {

constexpr int64_t kStrip = 512;  // columns at a time: a few rows of this length stay in L1

// D_ij of row i for n columns from j0 on
template <class T>
static inline void divergences(const Shares<T>& f, int64_t p, int64_t i, int64_t j0, int64_t n, T* d) {
  const T* own = f.row + p * f.row_patch + i;
  const T* other = f.col + p * f.col_patch + j0;
  for (int64_t j = 0; j < n; ++j) d[j] = std::abs(own[0] - other[j]);
  for (int64_t k = 1; k < f.classes; ++k) {
    const T r = own[k * f.row_class];
    const T* q = other + k * f.col_class;
    for (int64_t j = 0; j < n; ++j) d[j] += std::abs(r - q[j]);
  }
}

template <bool Swapped, class T>
static inline void sums_of_row(const T* s, const T* d, int64_t n, T shift, T& z, T& linear, T* col_z, T* col_linear) {
  T e_sum = T(0), l_sum = T(0);
  if (col_z) {
#pragma omp simd reduction(+ : e_sum, l_sum)
    for (int64_t j = 0; j < n; ++j) {
      const T t = s[j] - shift, x = d[j] * t, y = t - x;
      const T e = exp2_poly(Swapped ? y : x), l = Swapped ? x : y;
      e_sum += e;
      l_sum += l;
      col_z[j] += e;
      col_linear[j] += l;
    }
  } else {
#pragma omp simd reduction(+ : e_sum, l_sum)
    for (int64_t j = 0; j < n; ++j) {
      const T t = s[j] - shift, x = d[j] * t, y = t - x;
      e_sum += exp2_poly(Swapped ? y : x);
      l_sum += Swapped ? x : y;
    }
  }
  z = e_sum;
  linear = l_sum;
}

// w += (a + a_j) Q 2^(Q t) + (h + h_j) P; other null: the row's terms only
template <bool Swapped, class T>
static inline void weights_of_row(const T* t, const T* d, int64_t n, T a, T h, const T* other_a, const T* other_h,
                                  T* w) {
  for (int64_t j = 0; j < n; ++j) {
    const T c = T(1) - d[j], q = Swapped ? c : d[j], p = Swapped ? d[j] : c;
    const T e = q * exp2_poly(q * t[j]);
    w[j] += other_a ? (a + other_a[j]) * e + (h + other_h[j]) * p : a * e + h * p;
  }
}

#if defined(__AVX512F__)
template <bool Swapped>
static inline void sums_of_row(const float* s, const float* d, int64_t n, float shift, float& z, float& linear,
                               float* col_z, float* col_linear) {
  __m512 e_sum = _mm512_setzero_ps(), l_sum = _mm512_setzero_ps();
  const __m512 off = _mm512_set1_ps(shift);
  for (int64_t j = 0; j < n; j += lanes) {
    const __mmask16 in = n - j >= lanes ? 0xffff : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m512 t = _mm512_maskz_sub_ps(in, _mm512_maskz_loadu_ps(in, s + j), off);
    const __m512 dj = _mm512_maskz_loadu_ps(in, d + j);
    const __m512 x = _mm512_mul_ps(dj, t), y = _mm512_sub_ps(t, x);
    const __m512 e = _mm512_maskz_mov_ps(in, exp2_lanes(Swapped ? y : x)), l = Swapped ? x : y;
    e_sum = _mm512_add_ps(e_sum, e);
    l_sum = _mm512_add_ps(l_sum, l);
    if (col_z) {
      _mm512_mask_storeu_ps(col_z + j, in, _mm512_add_ps(_mm512_maskz_loadu_ps(in, col_z + j), e));
      _mm512_mask_storeu_ps(col_linear + j, in, _mm512_add_ps(_mm512_maskz_loadu_ps(in, col_linear + j), l));
    }
  }
  z = _mm512_reduce_add_ps(e_sum);
  linear = _mm512_reduce_add_ps(l_sum);
}

template <bool Swapped>
static inline void weights_of_row(const float* t, const float* d, int64_t n, float a, float h, const float* other_a,
                                  const float* other_h, float* w) {
  const __m512 one = _mm512_set1_ps(1.0f), own_a = _mm512_set1_ps(a), own_h = _mm512_set1_ps(h);
  for (int64_t j = 0; j < n; j += lanes) {
    const __mmask16 in = n - j >= lanes ? 0xffff : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m512 dj = _mm512_maskz_loadu_ps(in, d + j), c = _mm512_sub_ps(one, dj);
    const __m512 q = Swapped ? c : dj, p = Swapped ? dj : c;
    const __m512 e = _mm512_mul_ps(q, exp2_lanes(_mm512_mul_ps(q, _mm512_maskz_loadu_ps(in, t + j))));
    __m512 wa = own_a, wh = own_h;
    if (other_a) {
      wa = _mm512_add_ps(wa, _mm512_maskz_loadu_ps(in, other_a + j));
      wh = _mm512_add_ps(wh, _mm512_maskz_loadu_ps(in, other_h + j));
    }
    const __m512 sum = _mm512_fmadd_ps(wh, p, _mm512_maskz_loadu_ps(in, w + j));
    _mm512_mask_storeu_ps(w + j, in, _mm512_fmadd_ps(wa, e, sum));
  }
}
#endif

template <class T>
void affinity_sums(const T* s, int64_t ld, int64_t m, int64_t n, T shift, const Shares<T>& f, const AffinitySums& row,
                   const AffinitySums& col) {
  T d[kStrip], z[kStrip], l[kStrip];  // column sums of a tile are gathered in T, at most a few hundred terms
  for (int64_t p = 0; p < f.patches; ++p)
    for (int64_t j0 = 0; j0 < n; j0 += kStrip) {
      const int64_t w = std::min(kStrip, n - j0);
      std::fill_n(z, w, T(0));
      std::fill_n(l, w, T(0));
      for (int64_t i = 0; i < m; ++i) {
        T e_sum, l_sum;
        divergences(f, p, i, j0, w, d);
        T *col_z = col.z ? z : nullptr, *col_l = col.z ? l : nullptr;
        if (f.swapped)
          sums_of_row<true>(s + i * ld + j0, d, w, shift, e_sum, l_sum, col_z, col_l);
        else
          sums_of_row<false>(s + i * ld + j0, d, w, shift, e_sum, l_sum, col_z, col_l);
        row.z[p * row.stride + i] += e_sum;
        row.linear[p * row.stride + i] += l_sum;
      }
      for (int64_t j = 0; col.z && j < w; ++j) {
        col.z[p * col.stride + j0 + j] += z[j];
        col.linear[p * col.stride + j0 + j] += l[j];
      }
    }
}

template <class T>
void affinity_online(const T* s, int64_t ld, int64_t m, int64_t n, T shift, const Shares<T>& f, T* maximum,
                     const AffinitySums& row) {
  T x[kStrip];
  for (int64_t p = 0; p < f.patches; ++p)
    for (int64_t j0 = 0; j0 < n; j0 += kStrip)
      for (int64_t i = 0; i < m; ++i) {
        const int64_t w = std::min(kStrip, n - j0);
        const T* v = s + i * ld + j0;
        divergences(f, p, i, j0, w, x);
        T l_sum = T(0);
#pragma omp simd reduction(+ : l_sum)
        for (int64_t j = 0; j < w; ++j) {
          const T t = v[j] - shift, by_d = x[j] * t, by_a = t - by_d;
          l_sum += f.swapped ? by_d : by_a;
          x[j] = f.swapped ? by_a : by_d;
        }
        T& running = maximum[p * row.stride + i];
        double& total = row.z[p * row.stride + i];
        const T top = row_maximum(x, w);
        if (top > running) {
          total *= std::exp2(static_cast<double>(running - top));  // 0 at first: the maximum starts at -inf
          running = top;
        }
        T e_sum = T(0);
#pragma omp simd reduction(+ : e_sum)
        for (int64_t j = 0; j < w; ++j) e_sum += exp2_poly(x[j] - running);
        total += e_sum;
        row.linear[p * row.stride + i] += l_sum;
      }
}

// sum of g 2^(Q t - log_z) of the row and of the columns: two exponentials, for exponents of any size
template <class T>
static inline void softmax_of_row(const T* t, const T* d, int64_t n, bool swapped, T g, T log_z, T h, const T* other_g,
                                  const T* other_log_z, const T* other_h, T* w) {
  for (int64_t j = 0; j < n; ++j) {
    const T c = T(1) - d[j], q = swapped ? c : d[j], p = swapped ? d[j] : c, x = q * t[j];
    T e = g * exp2_poly(x - log_z), sum = h;
    if (other_g) {
      e += other_g[j] * exp2_poly(x - other_log_z[j]);
      sum += other_h[j];
    }
    w[j] += q * e + sum * p;
  }
}

template <class T>
void affinity_weights(T* s, int64_t ld, int64_t m, int64_t n, T shift, const Shares<T>& f, const AffinityTerms<T>& row,
                      const AffinityTerms<T>& col) {
  T t[kStrip], d[kStrip], w[kStrip];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j0 = 0; j0 < n; j0 += kStrip) {
      const int64_t len = std::min(kStrip, n - j0);
      T* v = s + i * ld + j0;
      for (int64_t j = 0; j < len; ++j) t[j] = v[j] - shift;
      std::fill_n(w, len, T(0));
      for (int64_t p = 0; p < f.patches; ++p) {
        divergences(f, p, i, j0, len, d);
        const int64_t at = p * row.stride + i, there = p * col.stride + j0;
        const T *cw = col.weight ? col.weight + there : nullptr, *ch = col.weight ? col.linear + there : nullptr;
        if (row.log_z)
          softmax_of_row(t, d, len, f.swapped, row.weight[at], row.log_z[at], row.linear[at], cw,
                         cw ? col.log_z + there : nullptr, ch, w);
        else if (f.swapped)
          weights_of_row<true>(t, d, len, row.weight[at], row.linear[at], cw, ch, w);
        else
          weights_of_row<false>(t, d, len, row.weight[at], row.linear[at], cw, ch, w);
      }
      std::copy_n(w, len, v);
    }
}

// ---- uncertainty gate

constexpr int64_t kPixels = 256;

// f(l, value) for n pixels of channel c
template <class T, class F>
static inline void each_pixel(const Field& x, int64_t c, int64_t first, int64_t n, F&& f) {
  with_dtype(x.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* p = static_cast<const S*>(x.data) + c * x.stride_c + first * x.stride_l;
    if (x.stride_l == 1)
      for (int64_t l = 0; l < n; ++l) f(l, static_cast<T>(Widen<S>::to(p[l])));
    else
      for (int64_t l = 0; l < n; ++l) f(l, static_cast<T>(Widen<S>::to(p[l * x.stride_l])));
  });
}

// largest logit, log of the sum of exponentials relative to it, and H, per pixel
template <class T>
static inline void entropy(const Field& z, int64_t first, int64_t n, T* top, T* log_sum, T* h) {
  T sum[kPixels], weighted[kPixels];
  each_pixel<T>(z, 0, first, n, [&](int64_t l, T v) { top[l] = v; });
  for (int64_t m = 1; m < z.channels; ++m)
    each_pixel<T>(z, m, first, n, [&](int64_t l, T v) { top[l] = raised(top[l], v); });
  std::fill_n(sum, n, T(0));
  std::fill_n(weighted, n, T(0));
  for (int64_t m = 0; m < z.channels; ++m)
    each_pixel<T>(z, m, first, n, [&](int64_t l, T v) { add_logit(v - top[l], sum[l], weighted[l]); });
  for (int64_t l = 0; l < n; ++l) log_sum[l] = std::log(sum[l]);
  for (int64_t l = 0; l < n; ++l) h[l] = entropy_of(sum[l], log_sum[l], weighted[l]);
}

// out(c, l) = value(c, l, x) for a block of pixels, along whichever axis lies closer together
template <class T, class F>
static inline void map_field(const Field& x, const FieldOut& y, int64_t first, int64_t n, F&& value) {
  with_dtype(x.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* p = static_cast<const S*>(x.data) + first * x.stride_l;
    S* q = static_cast<S*>(y.data) + first * y.stride_l;
    const int64_t C = x.channels;
    if (x.stride_c == 1 && y.stride_c == 1) {
      for (int64_t l = 0; l < n; ++l)
        for (int64_t c = 0; c < C; ++c)
          q[l * y.stride_l + c] = Widen<S>::from(value(l, static_cast<T>(Widen<S>::to(p[l * x.stride_l + c]))));
    } else if (x.stride_l == 1 && y.stride_l == 1) {
      for (int64_t c = 0; c < C; ++c)
        for (int64_t l = 0; l < n; ++l)
          q[c * y.stride_c + l] = Widen<S>::from(value(l, static_cast<T>(Widen<S>::to(p[c * x.stride_c + l]))));
    } else {
      for (int64_t c = 0; c < C; ++c)
        for (int64_t l = 0; l < n; ++l)
          q[c * y.stride_c + l * y.stride_l] =
              Widen<S>::from(value(l, static_cast<T>(Widen<S>::to(p[c * x.stride_c + l * x.stride_l]))));
    }
  });
}

template <class T>
void reweight(const Field& x, const Field& z, const FieldOut& y, int64_t first, int64_t n) {
  const T per_log = static_cast<T>(1 / std::log(static_cast<double>(z.channels)));
  T top[kPixels], log_sum[kPixels], factor[kPixels];
  for (int64_t l0 = first; l0 < first + n; l0 += kPixels) {
    const int64_t w = std::min(kPixels, first + n - l0);
    entropy(z, l0, w, top, log_sum, factor);
    for (int64_t l = 0; l < w; ++l) factor[l] = T(2) - factor[l] * per_log;
    map_field<T>(x, y, l0, w, [&](int64_t l, T v) { return v * factor[l]; });
  }
}

// sum over channels of g x; short sums in T, then double
template <class T>
static inline void channel_products(const Field& g, const Field& x, int64_t first, int64_t n, double* total) {
  std::fill_n(total, n, 0.0);
  with_dtype(x.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* a = static_cast<const S*>(g.data) + first * g.stride_l;
    const S* b = static_cast<const S*>(x.data) + first * x.stride_l;
    if (g.stride_c == 1 && x.stride_c == 1) {
      for (int64_t l = 0; l < n; ++l) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < x.channels; ++c)
          sum +=
              static_cast<T>(Widen<S>::to(a[l * g.stride_l + c])) * static_cast<T>(Widen<S>::to(b[l * x.stride_l + c]));
        total[l] = sum;
      }
      return;
    }
    constexpr int64_t few = 32;
    T part[kPixels];
    for (int64_t c0 = 0; c0 < x.channels; c0 += few) {
      std::fill_n(part, n, T(0));
      for (int64_t c = c0; c < std::min(c0 + few, x.channels); ++c) {
        const S *u = a + c * g.stride_c, *v = b + c * x.stride_c;
        if (g.stride_l == 1 && x.stride_l == 1)
          for (int64_t l = 0; l < n; ++l)
            part[l] += static_cast<T>(Widen<S>::to(u[l])) * static_cast<T>(Widen<S>::to(v[l]));
        else
          for (int64_t l = 0; l < n; ++l)
            part[l] +=
                static_cast<T>(Widen<S>::to(u[l * g.stride_l])) * static_cast<T>(Widen<S>::to(v[l * x.stride_l]));
      }
      for (int64_t l = 0; l < n; ++l) total[l] += part[l];
    }
  });
}

template <class T>
void reweight_backward(const Field& g, const Field& x, const Field& z, const FieldOut& d_x, const FieldOut& d_z,
                       int64_t first, int64_t n) {
  const T per_log = static_cast<T>(1 / std::log(static_cast<double>(z.channels)));
  T top[kPixels], log_sum[kPixels], h[kPixels], factor[kPixels];
  double total[kPixels];
  for (int64_t l0 = first; l0 < first + n; l0 += kPixels) {
    const int64_t w = std::min(kPixels, first + n - l0);
    entropy(z, l0, w, top, log_sum, h);
    if (d_z.data) {
      channel_products<T>(g, x, l0, w, total);
      for (int64_t l = 0; l < w; ++l) factor[l] = static_cast<T>(total[l]) * per_log;
      map_field<T>(z, d_z, l0, w,
                   [&](int64_t l, T v) { return logit_gradient(v - top[l] - log_sum[l], h[l], factor[l]); });
    }
    if (d_x.data) {
      for (int64_t l = 0; l < w; ++l) factor[l] = T(2) - h[l] * per_log;
      map_field<T>(g, d_x, l0, w, [&](int64_t l, T v) { return v * factor[l]; });
    }
  }
}

template <class T>
PatchKernels<T> patch_table() {
  return {affinity_sums<T>,     affinity_online<T>, affinity_weights<T>, reweight<T>,
          reweight_backward<T>, count_classes,      narrow_labels};
}

const PatchKernels<float>& patch_table_f32() {
  static const PatchKernels<float> t = patch_table<float>();
  return t;
}
const PatchKernels<double>& patch_table_f64() {
  static const PatchKernels<double> t = patch_table<double>();
  return t;
}

}  // namespace MEDCL_ISA
}  // namespace medcl
