// Gradients of pairs, their scores and choice, and combinations of rows. Compiled once per instruction set, after
// kernels_impl.h.
#include "cpu/filter.h"
#include "cpu/kernels_impl.h"

namespace medcl {
namespace MEDCL_ISA {

static inline int64_t whole(int64_t n) { return (n + kSpare - 1) / kSpare * kSpare; }

template <class T>
void pair_gradients(Form form, const T* s, int64_t n, const T* a, const T* b, const T* c, const int32_t* positive,
                    T* g) {
  n = whole(n);
  if (form == Form::out) {
    for (int64_t j = 0; j < n; ++j) g[j] = exp_poly(s[j] - a[j]) - keep(b[j], positive[j]);
  } else if (form == Form::in) {
    for (int64_t j = 0; j < n; ++j) g[j] = exp_poly(s[j] - a[j]) - keep(exp_poly(s[j] - b[j]), positive[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) {
      const T e = exp_poly(c[j] - s[j]), attract = -b[j] * e / (T(1) + e);  // no negatives: c = -inf, e = 0
      g[j] = keep(attract, positive[j]) + keep(exp_poly(s[j] - a[j]), ~positive[j]);
    }
  }
}

template <class T>
void pair_scores(const T* s, const T* g, int64_t n, T temperature, const T* scale, T* r) {
  n = whole(n);
  if (!scale) {
    for (int64_t j = 0; j < n; ++j) r[j] = std::abs(g[j]);
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    const T cosine = temperature * s[j], square = T(1) - cosine * cosine;
    r[j] = std::abs(g[j]) * std::sqrt(square > T(0) ? square : T(0)) * scale[j];
  }
}

template <class T>
int64_t pick(const T* v, int64_t n, const T* low, const T* high, int64_t step, int32_t* at, int64_t* beyond) {
  int64_t count = 0, over = 0;
  for (int64_t j = 0; j < n; ++j) {
    const bool reached = v[j] >= high[j * step];
    over += reached;
    at[count] = static_cast<int32_t>(j);
    count += (v[j] >= low[j * step]) & !reached;
  }
  *beyond += over;
  return count;
}
#if defined(__AVX512F__)
template <>
int64_t pick(const float* v, int64_t n, const float* low, const float* high, int64_t step, int32_t* at,
             int64_t* beyond) {
  int64_t count = 0, over = 0;
  const __m512 one_low = _mm512_set1_ps(low[0]), one_high = _mm512_set1_ps(high[0]);
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t j = 0; j < n; j += lanes) {
    const __mmask16 in = n - j >= lanes ? 0xffff : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m512 x = _mm512_maskz_loadu_ps(in, v + j);
    const __mmask16 hit =
        _mm512_mask_cmp_ps_mask(in, x, step ? _mm512_maskz_loadu_ps(in, low + j) : one_low, _CMP_GE_OQ);
    if (!hit) continue;
    const __mmask16 reached =
        _mm512_mask_cmp_ps_mask(hit, x, step ? _mm512_maskz_loadu_ps(in, high + j) : one_high, _CMP_GE_OQ);
    const __mmask16 between = hit & static_cast<__mmask16>(~reached);
    over += __builtin_popcount(reached);
    if (!between) continue;
    // compressed in a register, stored whole: compressing stores are slow on some processors
    const __m512i found = _mm512_add_epi32(places, _mm512_set1_epi32(static_cast<int>(j)));
    _mm512_storeu_si512(at + count, _mm512_maskz_compress_epi32(between, found));
    count += __builtin_popcount(between);
  }
  *beyond += over;
  return count;
}
#endif

template <class T>
bool select(const T* g, const T* r, int64_t n, const T* up, const T* limit, const T* negative_limit, int64_t step,
            const int32_t* positive, T* w) {
  int32_t equal = 0;
  for (int64_t j = 0; j < n; ++j) {
    const T bound = positive[j] ? limit[j * step] : negative_limit[j * step];
    w[j] += r[j] > bound ? up[j * step] * g[j] : T(0);
    equal |= (r[j] == bound) & (r[j] > T(0));
  }
  return equal != 0;
}

// ---- combinations of M rows. Rows whose channels follow each other in memory are taken one by one, others kLane at a
// time along the pixels.
constexpr int64_t kLane = 64;

// Calls f(row of perspective m) for rows that are contiguous in D.
template <class S, class T>
static inline void load_block(const Stack& x, int64_t at, int64_t n, T (*to)[kLane]) {
  const S* p = static_cast<const S*>(x.data) + at;
  for (int64_t m = 0; m < x.count; ++m)
    for (int64_t r = 0; r < n; ++r) to[m][r] = static_cast<T>(Widen<S>::to(p[m * x.stride_m + r * x.stride_l]));
}

template <class T>
void gram_rows(const Stack& x, int64_t offset, int64_t l0, int64_t n, double* gram) {
  const int64_t M = x.count;
  with_dtype(x.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* base = static_cast<const S*>(x.data) + offset + l0 * x.stride_l;
    if (x.stride_d == 1) {
      for (int64_t r = 0; r < n; ++r) {
        const S* row = base + r * x.stride_l;
        for (int64_t a = 0; a < M; ++a)
          for (int64_t b = 0; b <= a; ++b) {
            const S *u = row + a * x.stride_m, *v = row + b * x.stride_m;
            T sum = T(0);
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < x.dim; ++d)
              sum += static_cast<T>(Widen<S>::to(u[d])) * static_cast<T>(Widen<S>::to(v[d]));
            gram[(r * M + a) * M + b] = gram[(r * M + b) * M + a] = sum;
          }
      }
      return;
    }
    for (int64_t r0 = 0; r0 < n; r0 += kLane) {
      const int64_t h = std::min(kLane, n - r0);
      alignas(64) T value[kPerspectives][kLane], sum[kPerspectives][kPerspectives][kLane];
      for (int64_t a = 0; a < M; ++a)
        for (int64_t b = 0; b <= a; ++b)
          for (int64_t r = 0; r < kLane; ++r) sum[a][b][r] = T(0);
      for (int64_t d = 0; d < x.dim; ++d) {
        load_block<S>(x, offset + (l0 + r0) * x.stride_l + d * x.stride_d, h, value);
        for (int64_t a = 0; a < M; ++a)
          for (int64_t b = 0; b <= a; ++b)
            for (int64_t r = 0; r < h; ++r) sum[a][b][r] += value[a][r] * value[b][r];
      }
      for (int64_t r = 0; r < h; ++r)
        for (int64_t a = 0; a < M; ++a)
          for (int64_t b = 0; b <= a; ++b)
            gram[((r0 + r) * M + a) * M + b] = gram[((r0 + r) * M + b) * M + a] = sum[a][b][r];
    }
  });
}

template <class T>
void combine_rows(const Stack& x, int64_t offset, int64_t l0, int64_t n, const double* weight, int64_t step, void* out,
                  int64_t out_d, int64_t out_l) {
  const int64_t M = x.count;
  with_dtype(x.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* base = static_cast<const S*>(x.data) + offset + l0 * x.stride_l;
    S* to = static_cast<S*>(out);
    if (x.stride_d == 1 && out_d == 1) {
      constexpr int64_t width = 256;
      T sum[width];
      for (int64_t r = 0; r < n; ++r)
        for (int64_t d0 = 0; d0 < x.dim; d0 += width) {
          const int64_t h = std::min(width, x.dim - d0);
          const S* row = base + r * x.stride_l + d0;
          for (int64_t d = 0; d < h; ++d) sum[d] = T(0);
          for (int64_t m = 0; m < M; ++m) {
            const T w = static_cast<T>(weight[r * step + m]);
            for (int64_t d = 0; d < h; ++d) sum[d] += w * static_cast<T>(Widen<S>::to(row[m * x.stride_m + d]));
          }
          for (int64_t d = 0; d < h; ++d) to[r * out_l + d0 + d] = Widen<S>::from(sum[d]);
        }
      return;
    }
    for (int64_t r0 = 0; r0 < n; r0 += kLane) {
      const int64_t h = std::min(kLane, n - r0);
      alignas(64) T value[kPerspectives][kLane], w[kPerspectives][kLane];
      for (int64_t m = 0; m < M; ++m)
        for (int64_t r = 0; r < h; ++r) w[m][r] = static_cast<T>(weight[(r0 + r) * step + m]);
      for (int64_t d = 0; d < x.dim; ++d) {
        load_block<S>(x, offset + (l0 + r0) * x.stride_l + d * x.stride_d, h, value);
        T sum[kLane];
        for (int64_t r = 0; r < h; ++r) sum[r] = T(0);
        for (int64_t m = 0; m < M; ++m)
          for (int64_t r = 0; r < h; ++r) sum[r] += w[m][r] * value[m][r];
        for (int64_t r = 0; r < h; ++r) to[(r0 + r) * out_l + d * out_d] = Widen<S>::from(sum[r]);
      }
    }
  });
}

template <class T>
void consensus_rows(const Stack& x, int64_t offset, int64_t l0, int64_t n, double factor, void* out, int64_t out_d,
                    int64_t out_l) {
  with_dtype(x.dtype, [&](auto tag) {
    using S = decltype(tag);
    const S* base = static_cast<const S*>(x.data) + offset + l0 * x.stride_l;
    S* to = static_cast<S*>(out);
    const T share = static_cast<T>(factor / x.count);
    // the inner loop runs along whatever lies together
    const bool rows_in = x.stride_d == 1;
    const int64_t outer = rows_in ? n : x.dim, inner = rows_in ? x.dim : n;
    const int64_t step_o = rows_in ? x.stride_l : x.stride_d, step_i = rows_in ? 1 : x.stride_l;
    const int64_t to_o = rows_in ? out_l : out_d, to_i = rows_in ? out_d : out_l;
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i0 = 0; i0 < inner; i0 += kLane) {
        const int64_t h = std::min(kLane, inner - i0);
        T sum[kLane], low[kLane], high[kLane];
        for (int64_t i = 0; i < h; ++i) sum[i] = low[i] = high[i] = T(0);
        for (int64_t m = 0; m < x.count; ++m) {
          const S* p = base + m * x.stride_m + o * step_o + i0 * step_i;
          for (int64_t i = 0; i < h; ++i) {
            const T v = static_cast<T>(Widen<S>::to(p[i * step_i]));
            sum[i] += v;
            low[i] = v < low[i] ? v : low[i];
            high[i] = v > high[i] ? v : high[i];
          }
        }
        for (int64_t i = 0; i < h; ++i)
          to[o * to_o + (i0 + i) * to_i] = Widen<S>::from(low[i] < T(0) && high[i] > T(0) ? T(0) : sum[i] * share);
      }
  });
}

template <class T>
FilterKernels<T> filter_table() {
  return {pair_gradients<T>, pair_scores<T>, pick<T>, select<T>, gram_rows<T>, combine_rows<T>, consensus_rows<T>};
}
const FilterKernels<float>& filter_f32() {
  static const FilterKernels<float> t = filter_table<float>();
  return t;
}
const FilterKernels<double>& filter_f64() {
  static const FilterKernels<double> t = filter_table<double>();
  return t;
}

}  // namespace MEDCL_ISA
}  // namespace medcl
