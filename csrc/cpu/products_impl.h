// Products of packed tiles, alone and with exp as their epilogue. Part of kernels_impl.h: compiled once per instruction
// set. Written with vectors of GCC's extension, so that the same few lines are AVX-512, AVX2, SSE2 or NEON.
#include <algorithm>
#include <iterator>
#include <limits>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/tile.h"
#include "pairs/numbers.h"

namespace medcl {
namespace MEDCL_ISA {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
// A block of 6 x 4 vectors of 32 is summed in registers with AVX-512, else of 6 x 2 of 16.
constexpr int kMostVectors = kVectorBytes == 64 ? 4 : 2, kBlockRows = 6;
static_assert(kMostVectors * kVectorBytes <= kPanelBytes, "a panel is one block wide");

template <class T>
struct Vector {
  using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T loose __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  typedef Integer bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / static_cast<int64_t>(sizeof(T));
};
template <class T>
using Vec = typename Vector<T>::type;

#define MEDCL_INLINE static inline __attribute__((always_inline))

template <class T>
MEDCL_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(p);
}
template <class T>
MEDCL_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Vector<T>::loose*>(p) = v;
}
template <class T>
MEDCL_INLINE T sum_of(Vec<T> v) {
  T sum = v[0];
  for (int64_t l = 1; l < Vector<T>::lanes; ++l) sum += v[l];
  return sum;
}
#if defined(__AVX512F__)
MEDCL_INLINE float sum_of(__m512 v) { return _mm512_reduce_add_ps(v); }
#endif

// max(x, low); NaN stays NaN. The float ones are written out because gcc turns a clamp that keeps NaN into compares and
// blends.
MEDCL_INLINE Vec<double> at_least(Vec<double> x, double low) { return x < low ? low - Vec<double>{} : x; }
#if defined(__AVX512F__)
MEDCL_INLINE __m512 at_least(__m512 x, float low) { return _mm512_max_ps(_mm512_set1_ps(low), x); }
#elif defined(__AVX2__)
MEDCL_INLINE __m256 at_least(__m256 x, float low) { return _mm256_max_ps(_mm256_set1_ps(low), x); }
#else
MEDCL_INLINE Vec<float> at_least(Vec<float> x, float low) { return x < low ? low - Vec<float>{} : x; }
#endif

// 2^f for |f| <= 1/2, highest power first: exp_reduced of numbers.h with the powers of ln(2) in the coefficients.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float magic = 12582912.0f, bias = 127.0f;  // adding magic rounds to an integer, in the low bits
  static constexpr int mantissa = 23;
  static constexpr float coefficient[] = {
      1.532107331e-04f, 1.339021797e-03f, 9.618527096e-03f, 5.550362156e-02f, 2.402264754e-01f, 6.931471806e-01f, 1.0f};
};
template <>
struct Exp2<double> {
  static constexpr double magic = 6755399441055744.0, bias = 1023.0;
  static constexpr int mantissa = 52;
  static constexpr double coefficient[] = {1.36914888539041289e-12, 2.56784359934882051e-11,
                                           4.44553827187081150e-10, 7.05491162080112333e-09,
                                           1.01780860092396997e-07, 1.32154867901443095e-06,
                                           1.52527338040598403e-05, 1.54035303933816100e-04,
                                           1.33335581464284434e-03, 9.61812910762847716e-03,
                                           5.55041086648215800e-02, 2.40226506959100712e-01,
                                           6.93147180559945309e-01, 1.0};
};

// x -> 2^x for x of at most the exponent range; 0 below the smallest normal number, also for -inf, of which Normal says
// that there is none. V vectors step by step: one after the other, their chains of dependent instructions would fill
// the scheduler.
template <int V, class T, bool Normal = false>
MEDCL_INLINE void exp2_lanes(Vec<T> (&x)[V]) {
  using E = Exp2<T>;
  using Integer = typename Vector<T>::Integer;
  Vec<T> shifted[V], p[V];
  if (!Normal)
    for (int v = 0; v < V; ++v) x[v] = at_least(x[v], -E::bias);
  for (int v = 0; v < V; ++v) shifted[v] = x[v] + E::magic;
  for (int v = 0; v < V; ++v) x[v] -= shifted[v] - E::magic;
  for (int v = 0; v < V; ++v) p[v] = E::coefficient[0] * x[v] + E::coefficient[1];
  constexpr int terms = std::size(E::coefficient);
#pragma GCC unroll 16
  for (int k = 2; k < terms; ++k)
    for (int v = 0; v < V; ++v) p[v] = p[v] * x[v] + E::coefficient[k];
  for (int v = 0; v < V; ++v) {
    const auto power = (bit_copy<typename Vector<T>::bits>(shifted[v]) + static_cast<Integer>(E::bias)) << E::mantissa;
    x[v] = p[v] * bit_copy<Vec<T>>(power);
  }
}

#if defined(__AVX512F__)
constexpr int64_t lanes = 16;
MEDCL_INLINE __m512 exp2_lanes(__m512 x) {  // one vector of them
  Vec<float> one[] = {x};
  exp2_lanes<1, float>(one);
  return one[0];
}
#endif

// k rows of w columns of B as rows of `width`, the rest 0.
template <class T>
MEDCL_INLINE void fill_panel(const T* b, int64_t b_row, int64_t b_col, int64_t k, int64_t w, int64_t width, T* panel) {
  for (int64_t l = 0; l < k; ++l, panel += width) {
    const T* row = b + l * b_row;
    if (b_col == 1 && w == width)
      for (int64_t j = 0; j < w; j += Vector<T>::lanes) store(panel + j, load(row + j));
    else if (b_col == 1)
      std::copy_n(row, w, panel);
    else
      for (int64_t j = 0; j < w; ++j) panel[j] = row[j * b_col];
    std::fill(panel + w, panel + width, T(0));
  }
}

// acc = R rows of A times a panel of V vectors
template <int R, int V, class T>
MEDCL_INLINE void multiply(const T* const (&row)[R], int64_t a_col, const T* panel, int64_t k, Vec<T> (&acc)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  const Vec<T>* b = reinterpret_cast<const Vec<T>*>(panel);
  for (int64_t l = 0; l < k; ++l, b += V) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T a = row[r][l * a_col];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += a * b[v];
    }
  }
}

// f(number of vectors that hold w columns, as a constant)
template <class T, class F>
MEDCL_INLINE void with_vectors(int64_t w, F&& f) {
  constexpr int64_t lanes = Vector<T>::lanes;
  if constexpr (kMostVectors == 4) {
    if (w > 3 * lanes) return f(std::integral_constant<int, 4>{});
    if (w > 2 * lanes) return f(std::integral_constant<int, 3>{});
  }
  if (w > lanes) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

// Rows i0 ... of A for one block; past the end the last one again, whose results are not used.
template <int R, class T>
MEDCL_INLINE void rows_from(const T* a, int64_t a_row, int64_t i0, int64_t m, const T* (&row)[R]) {
  for (int r = 0; r < R; ++r) row[r] = a + std::min(i0 + r, m - 1) * a_row;
}

// C = alpha A B + beta C for at most four columns of C: rows of A by dot products, columns of A by vectors of C's rows.
// A panel of one vector would multiply by zeros in most of its lanes.
template <class T>
MEDCL_INLINE void slim(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b,
                       int64_t b_row, int64_t b_col, T beta, T* c, int64_t ldc) {
  constexpr int64_t lanes = Vector<T>::lanes, depth = 384;
  constexpr int N = 4, R = kMostVectors;
  alignas(64) T factor[N * depth];
  for (int64_t l0 = 0; l0 < std::max<int64_t>(k, 1); l0 += depth) {
    const int64_t kd = std::min(depth, k - l0);
    const T keep = l0 > 0 ? T(1) : beta;
    auto add = [&](int64_t i, int64_t j, T x) __attribute__((always_inline)) {
      if (i >= m || j >= n) return;
      T& to = c[i * ldc + j];
      to = keep != T(0) ? alpha * x + keep * to : alpha * x;
    };
    std::fill_n(factor, N * kd, T(0));
    if (a_col == 1) {
      for (int64_t j = 0; j < n; ++j)
        for (int64_t l = 0; l < kd; ++l) factor[j * kd + l] = b[(l0 + l) * b_row + j * b_col];
      for (int64_t i0 = 0; i0 < m; i0 += R) {
        const T* row[R];
        rows_from(a + l0, a_row, i0, m, row);
        Vec<T> acc[R][N] = {};
        int64_t l = 0;
        for (; l + lanes <= kd; l += lanes)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const Vec<T> x = load(row[r] + l);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) acc[r][j] += x * load(factor + j * kd + l);
          }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) {
            T sum = sum_of<T>(acc[r][j]);
            for (int64_t rest = l; rest < kd; ++rest) sum += row[r][rest] * factor[j * kd + rest];
            add(i0 + r, j, sum);
          }
      }
    } else {
      for (int64_t l = 0; l < kd; ++l)
        for (int64_t j = 0; j < n; ++j) factor[l * N + j] = b[(l0 + l) * b_row + j * b_col];
      // V vectors of rows from i0; of the last one perhaps only a part is there
      auto block = [&](int64_t i0, auto vectors) __attribute__((always_inline)) {
        constexpr int V = vectors;
        const int64_t in = std::min(V * lanes, m - i0);
        Vec<T> acc[N][V] = {};
        for (int64_t l = 0; l < kd; ++l) {
          const T* column = a + (l0 + l) * a_col + i0;
          T part[lanes] = {};
          if (in < lanes) column = std::copy_n(column, in, part) - in;
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            const Vec<T> x = load(column + v * lanes);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) acc[j][v] += factor[l * N + j] * x;
          }
        }
        T sums[N][V * lanes];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) store(sums[j] + v * lanes, acc[j][v]);
        for (int64_t i = 0; i < in; ++i)
          for (int j = 0; j < n; ++j) add(i0 + i, j, sums[j][i]);
      };
      int64_t i0 = 0;
      for (; i0 + R * lanes <= m; i0 += R * lanes) block(i0, std::integral_constant<int, R>{});
      for (; i0 < m; i0 += lanes) block(i0, std::integral_constant<int, 1>{});
    }
  }
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, T beta, T* c, int64_t ldc) {
  constexpr int64_t lanes = Vector<T>::lanes, width = kMostVectors * lanes, most = 160;
  // a panel holds all of k, or one of equal parts of it: a short rest would cost a pass over C for little work
  const int64_t parts = k <= most ? 1 : (k + 127) / 128, depth = parts == 1 ? most : (k + parts - 1) / parts;
  if (a_row == 1 || a_col == 1) {
    // few columns, or the few beyond the last whole vector
    const int64_t few = n <= kSlim ? n : lanes > 4 && n % lanes <= 4 ? n % lanes : 0;
    n -= few;
    for (int64_t j = n; j < n + few; j += 4)
      slim(m, std::min<int64_t>(4, n + few - j), k, alpha, a, a_row, a_col, b + j * b_col, b_row, b_col, beta, c + j,
           ldc);
  }
  alignas(64) T panel[most * width];
  for (int64_t j0 = 0; j0 < n; j0 += width) {
    const int64_t w = std::min(width, n - j0);
    for (int64_t l0 = 0; l0 < std::max<int64_t>(k, 1); l0 += depth) {
      const int64_t kd = std::min(depth, k - l0);
      const T keep = l0 > 0 ? T(1) : beta;
      with_vectors<T>(
          w, [&](auto vectors) __attribute__((always_inline)) {
            constexpr int V = vectors, R = kBlockRows;
            fill_panel(b + l0 * b_row + j0 * b_col, b_row, b_col, kd, w, V * lanes, panel);
            for (int64_t i0 = 0; i0 < m; i0 += R) {
              if (keep != T(0))  // on their way while the product is made
                for (int64_t r = 0; r < std::min<int64_t>(R, m - i0); ++r)
                  for (int v = 0; v < V; ++v) __builtin_prefetch(c + (i0 + r) * ldc + j0 + v * lanes, 1);
              const T* row[R];
              rows_from(a + l0 * a_col, a_row, i0, m, row);
              Vec<T> acc[R][V];
              multiply<R, V, T>(row, a_col, panel, kd, acc);
#pragma GCC unroll 8
              for (int r = 0; r < R; ++r) {
                if (i0 + r >= m) break;
                T* to = c + (i0 + r) * ldc + j0;
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v, to += lanes) {
                  Vec<T> x = acc[r][v] * alpha;
                  const int64_t in = w - v * lanes;
                  if (in >= lanes) {
                    if (keep != T(0)) x += keep * load(to);
                    store(to, x);
                  } else {
                    for (int64_t l = 0; l < in; ++l) to[l] = keep != T(0) ? x[l] + keep * to[l] : x[l];
                  }
                }
              }
            }
          });
    }
  }
}

// One tile of exponentials; weights: with them, else with sums.
template <bool Weights, class T>
MEDCL_INLINE void exp_products(const ExpTile<T>& t) {
  constexpr int64_t lanes = Vector<T>::lanes, width = kMostVectors * lanes;
  using Bits = typename Vector<T>::bits;
  using Integer = typename Vector<T>::Integer;
  T* panel = t.work;
  T* row_sums = panel + t.dim * width;  // one vector per row, added up at the end
  T* rest = row_sums + t.m * lanes;
  if (!Weights) std::fill_n(row_sums, t.m * lanes, T(0));
  for (int64_t j0 = 0; j0 < t.n; j0 += width) {
    const int64_t w = std::min(width, t.n - j0);
    alignas(64) T of_column[width] = {};  // weights in, or sums out
    if (Weights) std::copy_n(t.col_weight + j0, w, of_column);
    with_vectors<T>(
        w, [&](auto vectors) __attribute__((always_inline)) {
          constexpr int V = vectors, R = kBlockRows;
          fill_panel(t.b.data + j0 * t.b.row, t.b.col, t.b.row, t.dim, w, V * lanes, panel);
          for (int64_t i0 = 0; i0 < t.m; i0 += R) {
            if (t.out)  // on their way while the product is made
              for (int64_t r = 0; r < std::min<int64_t>(R, t.m - i0); ++r)
                for (int v = 0; v < V; ++v) __builtin_prefetch(t.out + (i0 + r) * t.ld + j0 + v * lanes, 1);
            const T* a = t.a.data + i0;
            int64_t step = t.a.col;
            if (i0 + R > t.m) {  // whole blocks only: the last rows with zeros
              for (int64_t d = 0; d < t.dim; ++d)
                for (int64_t r = 0; r < R; ++r) rest[d * R + r] = i0 + r < t.m ? a[d * step + r] : T(0);
              a = rest;
              step = R;
            }
            const T* row[R];
            for (int r = 0; r < R; ++r) row[r] = a + r;
            Vec<T> acc[R][V];
            multiply<R, V, T>(row, step, panel, t.dim, acc);
            auto finish = [&](auto masked, auto normal) __attribute__((always_inline)) {
#pragma GCC unroll 8
              for (int r = 0; r < R; ++r) {
                const int64_t i = i0 + r;
                if (i >= t.m) break;
                const T shift = t.shift[i * t.shift_stride];
                Vec<T>(&e)[V] = acc[r];
                for (int v = 0; v < V; ++v) {
                  e[v] = e[v] * t.alpha - shift;
                  if constexpr (masked) {
                    Bits column;
                    for (int64_t l = 0; l < lanes; ++l) column[l] = static_cast<Integer>(v * lanes + l);
                    const int64_t own = i + t.own - j0;
                    const Bits out = (column >= static_cast<Integer>(w)) |
                                     (column == static_cast<Integer>(own >= 0 && own < w ? own : -1));
                    e[v] = out ? -std::numeric_limits<T>::infinity() - Vec<T>{} : e[v];
                  }
                }
                exp2_lanes<V, T, normal>(e);
                if constexpr (Weights) {
                  for (int v = 0; v < V; ++v) e[v] *= t.row_weight[i] + load(of_column + v * lanes);
                } else {
                  Vec<T> sum = load(row_sums + i * lanes);
                  for (int v = 0; v < V; ++v) {
                    sum += e[v];
                    store(of_column + v * lanes, load(of_column + v * lanes) + e[v]);
                  }
                  store(row_sums + i * lanes, sum);
                }
                if (t.out)
                  for (int v = 0; v < V; ++v) store(t.out + i * t.ld + j0 + v * lanes, e[v]);
              }
            };
            const int64_t first_own = i0 + t.own - j0;
            if (w < V * lanes || (first_own < w && first_own + R > 0))
              finish(std::true_type{}, std::false_type{});
            else if (t.normal)
              finish(std::false_type{}, std::true_type{});
            else
              finish(std::false_type{}, std::false_type{});
          }
        });
    if (!Weights && t.col_sum)
      for (int64_t j = 0; j < w; ++j) t.col_sum[j0 + j] += of_column[j];
  }
  if (!Weights)
    for (int64_t i = 0; i < t.m; ++i) t.row_sum[i] += sum_of<T>(load(row_sums + i * lanes));
}

template <class T>
void exp_tile(const ExpTile<T>& t) {
  if (t.row_weight)
    exp_products<true>(t);
  else
    exp_products<false>(t);
}

// s -> 2^(s - shift_i); adds the row sums
template <class T>
void exp_rows(T* s, int64_t ld, int64_t m, int64_t n, const T* shift, double* row_sum) {
  constexpr int64_t lanes = Vector<T>::lanes;
  constexpr int V = kMostVectors;
  for (int64_t i = 0; i < m; ++i) {
    T* p = s + i * ld;
    Vec<T> sum = Vec<T>{};
    int64_t j = 0;
    for (; j + V * lanes <= n; j += V * lanes) {
      Vec<T> e[V];
      for (int v = 0; v < V; ++v) e[v] = load(p + j + v * lanes) - shift[i];
      exp2_lanes<V, T>(e);
      for (int v = 0; v < V; ++v) {
        store(p + j + v * lanes, e[v]);
        sum += e[v];
      }
    }
    T total = sum_of<T>(sum);
    for (; j < n; ++j) total += p[j] = exp2_poly(p[j] - shift[i]);
    row_sum[i] += total;
  }
}

// What exp_products<true> does to E once it is there.
template <class T>
void weigh(const T* e, int64_t e_ld, int64_t m, int64_t n, const T* row_weight, const T* col_weight, T* out,
           int64_t ld) {
  for (int64_t i = 0; i < m; ++i, e += e_ld, out += ld)
    for (int64_t j = 0; j < n; ++j) out[j] = e[j] * (row_weight[i] + col_weight[j]);
}

}  // namespace MEDCL_ISA
}  // namespace medcl
