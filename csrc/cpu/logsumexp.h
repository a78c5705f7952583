// Log-sum-exp passes and their gradients.
//   self, one selection, unit rows:  upper triangle only, forward 1u, backward 3u GEMM passes
//   two tensors, one selection:      strips of rows, S once for both gradients, 3u (pairs.h)
//   everything else:                 row-owned sweeps with running maxima, 1u forward, 2u per gradient
#pragma once
#include "cpu/pairs.h"

namespace medcl {

template <class T>
inline constexpr T kNegInf = -std::numeric_limits<T>::infinity();

// Sums of exp(s - alpha) of every row, each pair visited once.
template <class T>
void triangle_forward(const Problem<T>& p, T* lse) {
  const Side<T>& z = p.query;
  const int64_t n = z.rows.n, dim = z.rows.dim, bs = triangle_block(n);
  const auto& kernels = tile_kernels<T>();
  const T binary = p.binary();
  Buffer<double> sums(n);
  std::fill_n(sums.get(), n, 0.0);
  auto tile = [&](int64_t i0, int64_t m, int64_t j0, int64_t w) {
    const Tile<T> a = z.pack(i0, m, scratch<T>(kOwn, bs * dim), z.natural());
    const Tile<T> b = z.pack(j0, w, scratch<T>(kOther, bs * dim), z.factor(bs));
    T* s = scratch<T>(kScores, bs * bs);
    scores(a, m, b, w, dim, binary, s, w);
    if (i0 == j0) set_diagonal(s, w, m, w, i0, j0, kNegInf<T>);
    kernels.exp_sums(s, w, m, w, &binary, 0, sums.get() + i0, i0 == j0 ? nullptr : sums.get() + j0);
  };
  triangle(n, bs, tile, [](int64_t, int64_t) {});
  for (int64_t i = 0; i < n; ++i) lse[z.slot[i]] = static_cast<T>(binary * kLn2 + std::log(sums.get()[i]));
}

// dZ = alpha [(E o (a_i + a_j)) Z] with a_i = g_i exp(alpha - lse_i): one exp per pair serves both rows.
template <class T, class Adjust = NoAdjustment>
void triangle_backward(const Problem<T>& p, const T* g, const T* lse, const RowsOut& out, const Adjust& adjust = {}) {
  const Side<T>& z = p.query;
  const int64_t n = z.rows.n, dim = z.rows.dim, bs = triangle_block(n);
  const auto& kernels = tile_kernels<T>();
  const T binary = p.binary();
  T* direct = direct_rows<T>(out, n);
  Buffer<T> weight(n), held(direct ? 0 : n * dim);
  T* acc = direct ? direct : held.get();
  for (int64_t i = 0; i < n; ++i)
    weight.get()[i] =
        g[i] == T(0) || lse[i] == kNegInf<T> ? T(0) : static_cast<T>(g[i] * std::exp(binary * kLn2 - lse[i]));
  auto tile = [&](int64_t i0, int64_t m, int64_t j0, int64_t w) {
    const Tile<T> a = z.pack(i0, m, scratch<T>(kOwn, bs * dim), Layout::row_major);
    const Tile<T> b = i0 == j0 ? a : z.pack(j0, w, scratch<T>(kOther, bs * dim), Layout::row_major);
    const Tile<T> factor = bs < 192 ? z.pack(j0, w, scratch<T>(kFactor, bs * dim), Layout::channel_major) : b;
    T* s = scratch<T>(kScores, bs * bs);
    scores(a, m, factor, w, dim, binary, s, w);
    kernels.exp_weights(s, w, m, w, binary, weight.get() + i0, weight.get() + j0);
    if (i0 == j0) set_diagonal(s, w, m, w, i0, j0, T(0));
    gemm<T>(m, dim, w, T(1), s, w, 1, b.data, b.row, b.col, T(1), acc + i0 * dim, dim);
    if (i0 != j0) gemm<T>(w, dim, m, T(1), s, 1, w, a.data, a.row, a.col, T(1), acc + j0 * dim, dim);
  };
  parallel(ceil_div(n, bs), [&](int64_t I) { std::fill_n(acc + I * bs * dim, std::min(bs, n - I * bs) * dim, T(0)); });
  triangle(n, bs, tile,
           [&](int64_t i0, int64_t m) { finish_gradient(acc + i0 * dim, dim, z, i0, m, p.alpha, out, adjust); });
}

template <class T>
void sweep_forward(const Problem<T>& p, T* lse, int64_t stride) {
  const auto& kernels = tile_kernels<T>();
  const int64_t S = p.selections, n = p.query.rows.n;
  const bool plain = p.plain();
  const T binary = p.binary();
  Buffer<double> sums(S * n);
  Buffer<T> maxima(plain ? 0 : S * n);
  sweep<T>(
      p.query, p.key, p.self, plain ? binary : p.alpha, kNegInf<T>, false,
      [&](int64_t i0, int64_t m) {
        for (int64_t k = 0; k < S; ++k) {
          std::fill_n(sums.get() + k * n + i0, m, 0.0);
          if (!plain) std::fill_n(maxima.get() + k * n + i0, m, kNegInf<T>);
        }
      },
      [&](T* s, int64_t ld, int64_t m, int64_t w, int64_t i0, int64_t j0, const Tile<T>&, const Tile<T>&) {
        if (plain)
          kernels.exp_sums(s, ld, m, w, &binary, 0, sums.get() + i0, nullptr);
        else
          kernels.online_sums(s, ld, m, w, p.selection(p.query, i0, p.key, j0), maxima.get() + i0, sums.get() + i0, n);
      },
      [&](int64_t i0, int64_t m) {
        for (int64_t k = 0; k < S; ++k)
          for (int64_t i = i0; i < i0 + m; ++i) {
            const double total = sums.get()[k * n + i];
            const double shift = plain ? binary * kLn2 : maxima.get()[k * n + i];
            lse[k * stride + p.query.slot[i]] = total > 0 ? static_cast<T>(shift + std::log(total)) : kNegInf<T>;
          }
      });
}

}  // namespace medcl
