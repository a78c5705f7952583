// Log-sum-exp passes and their gradients.
//   self, one selection, unit rows:  upper triangle only, forward 1u, backward 3u GEMM passes
//   two tensors, one selection:      strips of rows, S once for both gradients, 3u (pairs.h)
//   everything else:                 row-owned sweeps with running maxima, 1u forward, 2u per gradient
#pragma once
#include "cpu/pairs.h"

namespace medcl {

template <class T>
inline constexpr T kNegInf = -std::numeric_limits<T>::infinity();

// Sums of exp(s - alpha) of every row, each pair visited once. kept: takes tiles of E for triangle_backward.
template <class T>
void triangle_forward(const Problem<T>& p, T* lse, const KeptTiles<T>* kept = nullptr) {
  const Side<T>& z = p.query;
  const int64_t n = z.rows.n, bs = triangle_block(n);
  const auto& kernels = tile_kernels<T>();
  const T binary = p.binary();
  const Tiles<T> tiles(z, bs, false);
  Buffer<double> sums(n);
  std::fill_n(sums.get(), n, 0.0);
  auto tile = [&](int64_t i0, int64_t m, int64_t j0, int64_t w, int64_t place) {
    ExpTile<T> e = exponentials(p, tiles.channels(i0), m, tiles.channels(j0), w);
    e.own = i0 - j0;
    e.shift = &binary;
    e.row_sum = sums.get() + i0;
    e.col_sum = i0 == j0 ? nullptr : sums.get() + j0;
    if (kept) {
      e.out = kept->at(i0, j0, place);
      e.ld = kept->ld();
    }
    kernels.exp_tile(e);
  };
  triangle(n, bs, false, tile, [](int64_t, int64_t) {});
  for (int64_t i = 0; i < n; ++i) lse[z.slot[i]] = static_cast<T>(binary * kLn2 + std::log(sums.get()[i]));
}

// dZ = alpha [(E o (a_i + a_j)) Z] with a_i = g_i exp(alpha - lse_i): one exp per pair serves both rows.
template <class T, class Adjust = NoAdjustment>
void triangle_backward(const Problem<T>& p, const T* g, const T* lse, const RowsOut& out, const Adjust& adjust = {},
                       const KeptTiles<T>* kept = nullptr) {
  const Side<T>& z = p.query;
  const int64_t n = z.rows.n, dim = z.rows.dim, bs = triangle_block(n);
  const auto& kernels = tile_kernels<T>();
  const T binary = p.binary();
  const Tiles<T> tiles(z, bs, true);
  T* direct = direct_rows<T>(out, n);
  Buffer<T> weight(n), held(direct ? 0 : n * dim);
  T* acc = direct ? direct : held.get();
  for (int64_t i = 0; i < n; ++i)
    weight.get()[i] =
        g[i] == T(0) || lse[i] == kNegInf<T> ? T(0) : static_cast<T>(g[i] * std::exp(binary * kLn2 - lse[i]));
  auto tile = [&](int64_t i0, int64_t m, int64_t j0, int64_t w, int64_t place) {
    const int64_t ld = ExpTile<T>::padded(w);
    const Tile<T> a = tiles.rows(i0), b = tiles.rows(j0);
    T* s = scratch<T>(kScores, bs * ExpTile<T>::padded(bs));
    if (const T* before = kept ? kept->at(i0, j0, place) : nullptr) {
      kernels.weigh(before, kept->ld(), m, w, weight.get() + i0, weight.get() + j0, s, ld);
    } else {
      ExpTile<T> e = exponentials(p, tiles.channels(i0), m, tiles.channels(j0), w);
      e.own = i0 - j0;
      e.shift = &binary;
      e.row_weight = weight.get() + i0;
      e.col_weight = weight.get() + j0;
      e.out = s;
      e.ld = ld;
      kernels.exp_tile(e);
    }
    gemm<T>(m, dim, w, T(1), s, ld, 1, b.data, b.row, b.col, T(1), acc + i0 * dim, dim);
    if (i0 != j0) gemm<T>(w, dim, m, T(1), s, 1, ld, a.data, a.row, a.col, T(1), acc + j0 * dim, dim);
  };
  parallel(ceil_div(n, bs), [&](int64_t I) { std::fill_n(acc + I * bs * dim, std::min(bs, n - I * bs) * dim, T(0)); });
  triangle(n, bs, true, tile,
           [&](int64_t i0, int64_t m) { finish_gradient(acc + i0 * dim, dim, z, i0, m, p.alpha, out, adjust); });
}

// Two tensors of unit rows, one selection: exp(s - alpha) added up by the owners of the rows.
template <class T>
void plain_forward(const Problem<T>& p, T* lse) {
  const int64_t n = p.query.rows.n, keys = p.key.rows.n, dim = p.query.rows.dim, mb = row_block(n);
  const T binary = p.binary();
  const Tiles<T> tiles(p.key, kColumns, false);
  Buffer<double> sums(n);
  parallel(ceil_div(n, mb), [&](int64_t block) {
    const int64_t i0 = block * mb, m = std::min(mb, n - i0);
    const Tile<T> a = p.query.pack(i0, m, scratch<T>(kOwn, mb * dim), Layout::channel_major);
    std::fill_n(sums.get() + i0, m, 0.0);
    for (int64_t j0 = 0; j0 < keys; j0 += kColumns) {
      const int64_t w = std::min(kColumns, keys - j0);
      ExpTile<T> e = exponentials(p, a, m, tiles.channels(j0), w);
      e.shift = &binary;
      e.row_sum = sums.get() + i0;
      tile_kernels<T>().exp_tile(e);
    }
    for (int64_t i = i0; i < i0 + m; ++i) {
      const double total = sums.get()[i];
      lse[p.query.slot[i]] = total > 0 ? static_cast<T>(binary * kLn2 + std::log(total)) : kNegInf<T>;
    }
  });
}

// Any selections: running maxima and sums.
template <class T>
void sweep_forward(const Problem<T>& p, T* lse, int64_t stride) {
  const auto& kernels = tile_kernels<T>();
  const int64_t S = p.selections, n = p.query.rows.n;
  Buffer<double> sums(S * n);
  Buffer<T> maxima(S * n);
  sweep<T>(
      p.query, p.key, p.self, p.alpha, kNegInf<T>, false,
      [&](int64_t i0, int64_t m) {
        for (int64_t k = 0; k < S; ++k) {
          std::fill_n(sums.get() + k * n + i0, m, 0.0);
          std::fill_n(maxima.get() + k * n + i0, m, kNegInf<T>);
        }
      },
      [&](T* s, int64_t ld, int64_t m, int64_t w, int64_t i0, int64_t j0, const Tile<T>&, const Tile<T>&) {
        kernels.online_sums(s, ld, m, w, p.selection(p.query, i0, p.key, j0), maxima.get() + i0, sums.get() + i0, n);
      },
      [&](int64_t i0, int64_t m) {
        for (int64_t k = 0; k < S; ++k)
          for (int64_t i = i0; i < i0 + m; ++i) {
            const double total = sums.get()[k * n + i];
            lse[k * stride + p.query.slot[i]] =
                total > 0 ? static_cast<T>(maxima.get()[k * n + i] + std::log(total)) : kNegInf<T>;
          }
      });
}

// lse of one group, wherever its rows lie; kept: as in triangle_forward, untouched elsewhere.
template <class T>
void forward_group(const Problem<T>& p, T* lse, int64_t stride, const KeptTiles<T>* kept = nullptr) {
  if (!p.plain())
    sweep_forward(p, lse, stride);
  else if (p.self)
    triangle_forward(p, lse, kept);
  else
    plain_forward(p, lse);
}

}  // namespace medcl
