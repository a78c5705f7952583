// Compiled once per instruction set: MEDCL_ISA names the namespace, the flags of the including file do the rest.
// Plain loops for gcc to vectorise. Reductions are named one by one (omp simd): -fassociative-math would also be free
// to undo exp_poly's two-part range reduction, and -ffast-math would break the infinities that masks rely on.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/rows_impl.h"

namespace medcl {
namespace MEDCL_ISA {

// The two loops that every pair of a plain problem goes through take similarities times log2(e), which costs the GEMM
// nothing and saves the range reduction two steps. Written out for AVX-512: gcc turns a clamp that keeps NaN into
// compares and blends under masks, and these loops were 1.6 times slower (docs/performance.md).
#if defined(__AVX512F__)
constexpr int64_t lanes = 16;
// exp2_poly for arguments below its upper clamp; the polynomial takes the powers of ln(2) into its coefficients
static inline __m512 exp2_lanes(__m512 x) {
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);  // the second operand survives where x is NaN
  const __m512 k = _mm512_roundscale_ps(y, 0);
  const __m512 f = _mm512_sub_ps(y, k);
  __m512 p = _mm512_set1_ps(1.532107331e-04f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339021797e-03f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618527096e-03f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550362156e-02f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264754e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931471806e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(k), _mm512_set1_epi32(127));
  return _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
}

// p -> 2^(p - shift), added to col (null: not); returns the sum
static inline float exp_row(float* p, int64_t n, float shift, float* col) {
  __m512 sum = _mm512_setzero_ps();
  const __m512 off = _mm512_set1_ps(shift);
  for (int64_t j = 0; j < n; j += lanes) {
    const __mmask16 in = n - j >= lanes ? 0xffff : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m512 e = _mm512_maskz_mov_ps(in, exp2_lanes(_mm512_sub_ps(_mm512_maskz_loadu_ps(in, p + j), off)));
    _mm512_mask_storeu_ps(p + j, in, e);
    sum = _mm512_add_ps(sum, e);
    if (col) _mm512_mask_storeu_ps(col + j, in, _mm512_add_ps(_mm512_maskz_loadu_ps(in, col + j), e));
  }
  return _mm512_reduce_add_ps(sum);
}

static inline void exp_weight_row(float* p, int64_t n, float shift, float a, const float* b) {
  const __m512 off = _mm512_set1_ps(shift), own = _mm512_set1_ps(a);
  for (int64_t j = 0; j < n; j += lanes) {
    const __mmask16 in = n - j >= lanes ? 0xffff : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m512 e = exp2_lanes(_mm512_sub_ps(_mm512_maskz_loadu_ps(in, p + j), off));
    _mm512_mask_storeu_ps(p + j, in, _mm512_mul_ps(e, _mm512_add_ps(own, _mm512_maskz_loadu_ps(in, b + j))));
  }
}
#endif

template <class T>
static inline T exp_row(T* p, int64_t n, T shift, T* col) {
  T sum = T(0);
  if (col) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const T e = exp2_poly(p[j] - shift);
      p[j] = e;
      sum += e;
      col[j] += e;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const T e = exp2_poly(p[j] - shift);
      p[j] = e;
      sum += e;
    }
  }
  return sum;
}

template <class T>
static inline void exp_weight_row(T* p, int64_t n, T shift, T a, const T* b) {
  for (int64_t j = 0; j < n; ++j) p[j] = exp2_poly(p[j] - shift) * (a + b[j]);
}

template <class T>
void exp_sums(T* s, int64_t ld, int64_t m, int64_t n, const T* shift, int64_t shift_stride, double* row, double* col) {
  // Column sums of a tile are gathered in T (at most a few hundred terms) and added to the running double once.
  constexpr int64_t width = 512;
  T part[width];
  for (int64_t j0 = 0; j0 < n; j0 += width) {
    const int64_t w = std::min(width, n - j0);
    if (col) std::fill_n(part, w, T(0));
    for (int64_t i = 0; i < m; ++i)
      row[i] += exp_row(s + i * ld + j0, w, shift[i * shift_stride], col ? part : nullptr);
    if (col)
      for (int64_t j = 0; j < w; ++j) col[j0 + j] += part[j];
  }
}

template <class T>
void exp_weights(T* s, int64_t ld, int64_t m, int64_t n, T shift, const T* row_weight, const T* col_weight) {
  for (int64_t i = 0; i < m; ++i) exp_weight_row(s + i * ld, n, shift, row_weight[i], col_weight);
}

// The label test of one selection as masks, so that a loop over candidates has no branch in it.
struct Test {
  int32_t equal, other;
  explicit Test(Kind kind) : equal(kind == Kind::different ? 0 : -1), other(kind == Kind::same ? 0 : -1) {}
  // all ones where the pair is allowed
  __attribute__((always_inline)) int32_t operator()(int32_t row, int32_t col) const {
    const int32_t same = -static_cast<int32_t>(row == col);
    return ((same & equal) | (~same & other)) & ~(col >> 31);
  }
};
__attribute__((always_inline)) static inline float keep(float v, int32_t mask) {
  return bit_copy<float>(bit_copy<int32_t>(v) & mask);
}
__attribute__((always_inline)) static inline double keep(double v, int32_t mask) {
  return bit_copy<double>(bit_copy<int64_t>(v) & static_cast<int64_t>(mask));
}

// Calls f(k, i, row code, column codes or null) for each selection and anchor row that can have candidates.
template <class F>
static inline void each_anchor(const Selection& sel, int64_t m, F&& f) {
  for (int64_t k = 0; k < sel.count; ++k)
    for (int64_t i = 0; i < m; ++i) {
      const int32_t code = sel.row_code ? sel.row_code[k * sel.row_stride + i] : 0;
      if (code >= 0) f(k, i, code, sel.col_code ? sel.col_code + k * sel.col_stride : nullptr);
    }
}

template <class T>
T row_maximum(const T* s, int64_t n) {
  T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = s[j] > top ? s[j] : top;
  return top;
}

template <class T>
void online_sums(const T* s, int64_t ld, int64_t m, int64_t n, const Selection& sel, T* maximum, double* sum,
                 int64_t stride) {
  constexpr T none = -std::numeric_limits<T>::infinity();
  each_anchor(sel, m, [&](int64_t k, int64_t i, int32_t code, const int32_t* codes) {
    const T* p = s + i * ld;
    const Test allowed(sel.kind[k]);
    T top = none;
    if (codes) {
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < n; ++j) {
        const T v = allowed(code, codes[j]) ? p[j] : none;
        top = v > top ? v : top;
      }
    } else {
      top = row_maximum(p, n);
    }
    if (top == none) return;
    T& running = maximum[k * stride + i];
    double& total = sum[k * stride + i];
    if (top > running) {
      total = running == none ? 0.0 : total * std::exp(static_cast<double>(running - top));
      running = top;
    }
    const T shift = running;
    T acc = T(0);
    if (codes) {
#pragma omp simd reduction(+ : acc)
      for (int64_t j = 0; j < n; ++j) acc += keep(exp_poly(p[j] - shift), allowed(code, codes[j]));
    } else {
#pragma omp simd reduction(+ : acc)
      for (int64_t j = 0; j < n; ++j) acc += exp_poly(p[j] - shift);
    }
    total += acc;
  });
}

// Anchors of the row side and, where the gradient is symmetric, of the column side meet in one weight per pair.
template <class T, class Term>
static inline void pair_weights(T* s, int64_t ld, int64_t m, int64_t n, const Selection& sel, const T* row_g,
                                const T* row_stat, const T* col_g, const T* col_stat, Term&& term) {
  constexpr int64_t width = 512;
  T w[width];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j0 = 0; j0 < n; j0 += width) {
      const int64_t len = std::min(width, n - j0);
      T* p = s + i * ld + j0;
      for (int64_t j = 0; j < len; ++j) w[j] = T(0);
      for (int64_t k = 0; k < sel.count; ++k) {
        const int32_t code = sel.row_code ? sel.row_code[k * sel.row_stride + i] : 0;
        if (code < 0) continue;
        const int32_t* codes = sel.col_code ? sel.col_code + k * sel.col_stride + j0 : nullptr;
        const Test allowed(sel.kind[k]);
        const T g = row_g[k * sel.row_stride + i], stat = row_stat[k * sel.row_stride + i];
        if (g != T(0)) {
          if (codes)
            for (int64_t j = 0; j < len; ++j) w[j] += keep(g * term(p[j], stat), allowed(code, codes[j]));
          else
            for (int64_t j = 0; j < len; ++j) w[j] += g * term(p[j], stat);
        }
        if (col_g) {
          const T* cg = col_g + k * sel.col_stride + j0;
          const T* cs = col_stat + k * sel.col_stride + j0;
          if (codes)
            for (int64_t j = 0; j < len; ++j) w[j] += keep(cg[j] * term(p[j], cs[j]), allowed(code, codes[j]));
          else
            for (int64_t j = 0; j < len; ++j) w[j] += cg[j] * term(p[j], cs[j]);
        }
      }
      for (int64_t j = 0; j < len; ++j) p[j] = w[j];
    }
}

template <class T>
void softmax_weights(T* s, int64_t ld, int64_t m, int64_t n, const Selection& sel, const T* row_g, const T* row_lse,
                     const T* col_g, const T* col_lse) {
  pair_weights(s, ld, m, n, sel, row_g, row_lse, col_g, col_lse, [](T v, T lse) { return exp_poly(v - lse); });
}

template <class T>
void positive_log_weights(T* s, int64_t ld, int64_t m, int64_t n, const Selection& sel, const T* row_g,
                          const T* row_negative, const T* col_g, const T* col_negative) {
  pair_weights(s, ld, m, n, sel, row_g, row_negative, col_g, col_negative,
               [](T v, T negative) { return T(1) / (T(1) + exp_poly(negative - v)); });
}

template <class T>
void positive_log(const T* s, int64_t ld, int64_t m, int64_t n, const Selection& sel, const T* negative, double* sum,
                  double* tail, int64_t stride) {
  each_anchor(sel, m, [&](int64_t k, int64_t i, int32_t code, const int32_t* codes) {
    const T* p = s + i * ld;
    const T floor = negative[k * stride + i];
    double acc = 0, below = 0;  // terms of size 1 / temperature, hundreds of them
#pragma omp simd reduction(+ : acc, below)
    for (int64_t j = 0; j < n; ++j) {
      const T v = p[j];
      const T gap = v > floor ? floor - v : v - floor;  // -|v - floor|; -inf where there is no negative
      const T e = exp_poly(gap);
      const T value = (v > floor ? v : floor) + log1p_unit(e);
      const T share = (v > floor ? e : T(1)) / (T(1) + e);  // sigmoid(floor - v)
      const int32_t mask = -static_cast<int32_t>(code == codes[j]);
      acc += keep(value, mask);
      below += keep(share, mask);
    }
    sum[k * stride + i] += acc;
    tail[k * stride + i] += below;
  });
}

template <class T>
void scale(const void* x, void* y, DType dtype, int64_t first, int64_t n, T factor) {
  with_dtype(dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* p = static_cast<const S*>(x) + first;
    S* q = static_cast<S*>(y) + first;
    for (int64_t i = 0; i < n; ++i) q[i] = Widen<S>::from(static_cast<T>(Widen<S>::to(p[i])) * factor);
  });
}

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return sum;
}

template <class T>
void add_to_sum(double* sum, const T* row, int64_t n, double weight) {
  for (int64_t d = 0; d < n; ++d) sum[d] += weight * static_cast<double>(row[d]);
}

template <class T>
void add_row(T* g, const T* a, int64_t n, T weight) {
  for (int64_t d = 0; d < n; ++d) g[d] += weight * a[d];
}

template <class T>
void scale_row(T* g, int64_t n, T factor) {
  for (int64_t d = 0; d < n; ++d) g[d] *= factor;
}

template <class T>
void project(T* g, const T* z, int64_t n, T along, T factor) {
  for (int64_t d = 0; d < n; ++d) g[d] = factor * (g[d] - along * z[d]);
}

// 4 x 32 outputs stay in registers over a block of k; any stride of A, B copied to unit stride where it has none.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, T beta, T* c, int64_t ldc) {
  constexpr int64_t width = 32, depth = 256, height = 4;
  T panel[depth * width];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = beta == T(0) ? T(0) : beta * c[i * ldc + j];
  for (int64_t l0 = 0; l0 < k; l0 += depth) {
    const int64_t kd = std::min(depth, k - l0);
    for (int64_t j0 = 0; j0 < n; j0 += width) {
      const int64_t w = std::min(width, n - j0);
      for (int64_t l = 0; l < kd; ++l)
        for (int64_t j = 0; j < width; ++j)
          panel[l * width + j] = j < w ? b[(l0 + l) * b_row + (j0 + j) * b_col] : T(0);
      for (int64_t i0 = 0; i0 < m; i0 += height) {
        const int64_t h = std::min(height, m - i0);
        T acc[height][width] = {};
        const T* row[height];
        for (int64_t i = 0; i < height; ++i) row[i] = a + (i0 + std::min(i, h - 1)) * a_row + l0 * a_col;
        for (int64_t l = 0; l < kd; ++l) {
          const T* q = panel + l * width;
          const T v0 = row[0][l * a_col], v1 = row[1][l * a_col], v2 = row[2][l * a_col], v3 = row[3][l * a_col];
          for (int64_t j = 0; j < width; ++j) {
            acc[0][j] += v0 * q[j];
            acc[1][j] += v1 * q[j];
            acc[2][j] += v2 * q[j];
            acc[3][j] += v3 * q[j];
          }
        }
        for (int64_t i = 0; i < h; ++i)
          for (int64_t j = 0; j < w; ++j) c[(i0 + i) * ldc + j0 + j] += alpha * acc[i][j];
      }
    }
  }
}

template <class T>
TileKernels<T> table() {
  return {inverse_norm<T>,    pack<T>,         unpack<T>,
          exp_sums<T>,        exp_weights<T>,  online_sums<T>,
          softmax_weights<T>, positive_log<T>, positive_log_weights<T>,
          row_maximum<T>,     scale<T>,        dot<T>,
          add_to_sum<T>,      add_row<T>,      scale_row<T>,
          project<T>,         gemm<T>};
}

const TileKernels<float>& table_f32() {
  static const TileKernels<float> t = table<float>();
  return t;
}
const TileKernels<double>& table_f64() {
  static const TileKernels<double> t = table<double>();
  return t;
}

}  // namespace MEDCL_ISA
}  // namespace medcl
