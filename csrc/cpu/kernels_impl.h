// Compiled once per instruction set: MEDCL_ISA names the namespace, the flags of the including file do the rest.
// Plain loops for gcc to vectorise. Reductions are named one by one (omp simd): -fassociative-math would also be free
// to undo exp_poly's two-part range reduction, and -ffast-math would break the infinities that masks rely on.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/products_impl.h"
#include "cpu/rows_impl.h"

namespace medcl {
namespace MEDCL_ISA {

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

// log(exp(v) + exp(floor)) = max(v, floor) + log(1 + e): the factors 1 + e <= 2 of a block are multiplied, and one
// logarithm serves many blocks.
template <class T>
void positive_log(const T* s, int64_t ld, int64_t m, int64_t n, const Selection& sel, const T* negative, double* sum,
                  double* tail, int64_t stride) {
  constexpr int64_t width = 96;  // a product of 2^96 at most
  each_anchor(sel, m, [&](int64_t k, int64_t i, int32_t code, const int32_t* codes) {
    const T floor = negative[k * stride + i];
    double acc = 0, below = 0, factors = 1;  // of blocks: terms of size 1 / temperature, hundreds of them
    for (int64_t j0 = 0; j0 < n; j0 += width) {
      const T* p = s + i * ld + j0;
      const int64_t len = std::min(width, n - j0);
      T level = 0, share = 0, product = 1;
#pragma omp simd reduction(+ : level, share) reduction(* : product)
      for (int64_t j = 0; j < len; ++j) {
        const T v = p[j];
        const T gap = v > floor ? floor - v : v - floor;  // -|v - floor|; -inf where there is no negative
        const int32_t mask = -static_cast<int32_t>(code == codes[j0 + j]);
        const T e = exp_poly(gap), one = T(1) + e;
        level += keep(v > floor ? v : floor, mask);
        share += keep((v > floor ? e : T(1)) / one, mask);  // sigmoid(floor - v)
        product *= mask ? one : T(1);
      }
      acc += level;
      below += share;
      factors *= product;
      if (factors > 0x1p900) {
        acc += std::log(factors);
        factors = 1;
      }
    }
    sum[k * stride + i] += acc + std::log(factors);
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

template <class T>
TileKernels<T> table() {
  return {inverse_norm<T>, pack<T>,
          unpack<T>,       exp_tile<T>,
          exp_rows<T>,     weigh<T>,
          online_sums<T>,  softmax_weights<T>,
          positive_log<T>, positive_log_weights<T>,
          row_maximum<T>,  scale<T>,
          dot<T>,          add_to_sum<T>,
          add_row<T>,      scale_row<T>,
          project<T>,      gemm<T>};
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
