// The pair loops. A tile of similarities S = alpha Q K^T comes from one GEMM on packed rows; what happens to it is the
// caller's epilogue. Every sum has one owner and one order, so the bits do not depend on the number of threads.
#pragma once
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu/tile.h"

namespace medcl {

// f(i) for i in [0, n) on torch's own threads; nested calls run in line.
template <class F>
void parallel(int64_t n, const F& f) {
  auto run = [](int64_t begin, int64_t end, void* context) {
    OneBlasThread guard;
    for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
  };
  // an exception of a worker, such as a failed allocation, arrives here as an error code
  if (torch_parallel_for(0, n, 1, run, const_cast<void*>(static_cast<const void*>(&f))))
    throw std::runtime_error("medcl: a worker thread failed, most likely for want of memory");
}

template <class T>
class Buffer {  // 64-byte aligned, not initialised
 public:
  explicit Buffer(int64_t n = 0) { reserve(n); }
  T* reserve(int64_t n) {
    if (n > size_) {
      const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = n;
    }
    return data_.get();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// Per-thread tile storage, kept between calls: small (a few tiles), and page faults would cost more than the packing.
enum Slot { kOwn, kOther, kFactor, kScores, kSums, kExtra, kWork, kSlots };
template <class T>
T* scratch(Slot slot, int64_t n) {
  static thread_local Buffer<T> buffers[kSlots];
  return buffers[slot].reserve(n);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Evenly sized blocks of at most about `most` rows, a multiple of 16 where there is more than one: the GEMM loses 10 %
// on sizes that are not (docs/performance.md).
inline int64_t block_size(int64_t n, int64_t want, int64_t most) {
  const int64_t count = ceil_div(n, std::max<int64_t>(1, std::min(want, most)));
  return count <= 1 ? std::max<int64_t>(n, 1) : ceil_div(ceil_div(n, count), 16) * 16;
}

// What a problem may hold of E between two uses, so that it stays in a last-level cache of 32 MB beside the operands.
constexpr int64_t kStore = int64_t{24} << 20;

constexpr int64_t kColumns = 384;  // columns of a tile: with 192 rows S stays in a 1 MB L2 beside both operands

// One side of one pair problem: the rows that take part, packed together.
template <class T>
struct Side {
  Rows rows;
  const double* inverse = nullptr;  // 1 / norm, null: rows are used as they are
  const int32_t* code = nullptr;    // (selections, code_stride), null: every row valid in every selection
  int64_t code_stride = 0;
  const int64_t* slot = nullptr;  // where the row stands in per-row inputs and outputs

  Tile<T> pack(int64_t first, int64_t n, T* out, Layout layout) const {
    return tile_kernels<T>().pack(rows, first, n, inverse, layout, out);
  }
  // For products that take either layout: as the source lies.
  Layout natural() const { return rows.stride_d == 1 ? Layout::row_major : Layout::channel_major; }
};

// Packed tiles of one side for a loop that asks for each of them many times: channel-major, and row-major where the
// loop multiplies by them again. Packing at every request would read strided memory each time.
template <class T>
class Tiles {
 public:
  Tiles(const Side<T>& side, int64_t block, bool row_major)
      : n_(side.rows.n), dim_(side.rows.dim), block_(block), channels_(n_ * dim_), rows_(row_major ? n_ * dim_ : 0) {
    parallel(ceil_div(n_, block), [&](int64_t I) {
      const int64_t first = I * block;
      side.pack(first, size(first), channels_.get() + first * dim_, Layout::channel_major);
      if (row_major) side.pack(first, size(first), rows_.get() + first * dim_, Layout::row_major);
    });
  }
  // Rows from `first` to the end of its block.
  Tile<T> channels(int64_t first) const {
    const int64_t start = first / block_ * block_;
    return {channels_.get() + start * dim_ + first - start, 1, size(start)};
  }
  Tile<T> rows(int64_t first) const { return {rows_.get() + first * dim_, dim_, 1}; }

 private:
  int64_t size(int64_t start) const { return std::min(block_, n_ - start); }
  int64_t n_, dim_, block_;
  Buffer<T> channels_, rows_;
};

template <class T>
struct Problem {
  Side<T> query, key;  // the same side twice where a tensor meets itself
  bool self = false;   // then the pair (i, i) is excluded
  T alpha = 1;         // 1 / temperature
  const Kind* kind = nullptr;
  int64_t selections = 1;

  // Plain loops work to base 2: S and its shift times log2(e), so exp needs no multiplication per pair.
  T binary() const { return static_cast<T>(alpha * 1.4426950408889634); }

  // one selection of all rows that take part: no label needs a test
  bool single() const { return selections == 1 && kind[0] == Kind::all; }
  // |s| <= alpha for unit rows: exp(s - alpha) neither overflows nor vanishes as long as 2 alpha stays in range, and
  // then no running maximum is needed (anchors: "fixed shift")
  bool plain() const {
    const T range = sizeof(T) == 4 ? T(80) : T(700);
    return single() && query.inverse && key.inverse && 2 * alpha < range;
  }
  Selection selection(const Side<T>& row, int64_t i0, const Side<T>& col, int64_t j0) const {
    return {selections,      kind,           row.code ? row.code + i0 : nullptr, col.code ? col.code + j0 : nullptr,
            row.code_stride, col.code_stride};
  }
};

template <class T>
void scores(const Tile<T>& a, int64_t m, const Tile<T>& b, int64_t n, int64_t dim, T alpha, T* s, int64_t ld) {
  // a BLAS may scale a factor instead of the product: one more rounding, which exp(s) of a cold problem shows
  const bool after = alpha > T(40);
  gemm<T>(m, n, dim, after ? T(1) : alpha, a.data, a.row, a.col, b.data, b.col, b.row, T(0), s, ld);
  if (!after) return;
  for (int64_t i = 0; i < m; ++i) tile_kernels<T>().scale_row(s + i * ld, n, alpha);
}

// Sets the pairs (i, i) of a tile whose rows start at i0 and columns at j0.
template <class T>
void set_diagonal(T* s, int64_t ld, int64_t m, int64_t n, int64_t i0, int64_t j0, T value) {
  for (int64_t i = std::max<int64_t>(0, j0 - i0); i < m && i + i0 - j0 < n; ++i) s[i * ld + i + i0 - j0] = value;
}

inline int64_t row_block(int64_t n) { return block_size(n, std::max<int64_t>(16, n / 16), 192); }

// Row-owned sweep: begin(i0, m), then visit(S, ld, m, n, i0, j0, own, other) over all columns, then end(i0, m).
// gradient: the visitor multiplies by the other tile again, and gets it row-major. S itself always comes from the same
// kind of product: at low temperatures its rounding is amplified, and must be the same on the way back as it was forth.
template <class T, class Begin, class Visit, class End>
void sweep(const Side<T>& own, const Side<T>& other, bool self, T alpha, T diagonal, bool gradient, Begin&& begin,
           Visit&& visit, End&& end) {
  const int64_t n = own.rows.n, total = other.rows.n, dim = own.rows.dim;
  const int64_t mb = row_block(n);
  parallel(ceil_div(n, mb), [&](int64_t block) {
    const int64_t i0 = block * mb, m = std::min(mb, n - i0);
    const Tile<T> a = own.pack(i0, m, scratch<T>(kOwn, mb * dim), Layout::row_major);
    T* s = scratch<T>(kScores, mb * kColumns);
    begin(i0, m);
    for (int64_t j0 = 0; j0 < total; j0 += kColumns) {
      const int64_t w = std::min(kColumns, total - j0);
      const Tile<T> factor = other.pack(j0, w, scratch<T>(kFactor, kColumns * dim), Layout::channel_major);
      scores(a, m, factor, w, dim, alpha, s, w);
      if (self) set_diagonal(s, w, m, w, i0, j0, diagonal);
      const Tile<T> b = gradient ? other.pack(j0, w, scratch<T>(kOther, kColumns * dim), Layout::row_major) : factor;
      visit(s, w, m, w, i0, j0, a, b);
    }
    end(i0, m);
  });
}

// Gradient of rows [i0, i0 + m) from acc = sum_j W_ij other_j: times alpha, through the normalisation
// (I - z z^T) / |x|, into the layout and dtype of the input. adjust(g, i, z_i) adds what does not come from pairs.
struct NoAdjustment {
  template <class T>
  void operator()(T*, int64_t, const T*) const {}
};
template <class T, class Adjust = NoAdjustment>
void finish_gradient(T* acc, int64_t ld, const Side<T>& side, int64_t i0, int64_t m, T alpha, const RowsOut& out,
                     const Adjust& adjust = {}) {
  const int64_t dim = side.rows.dim;
  const auto& kernels = tile_kernels<T>();
  const Tile<T> z = side.pack(i0, m, scratch<T>(kExtra, m * dim), Layout::row_major);
  for (int64_t i = 0; i < m; ++i) {
    T* g = acc + i * ld;
    const T* zi = z.data + i * dim;
    adjust(g, i0 + i, zi);
    // a row that takes no part may hold anything, NaN too: 0 times it must stay 0
    if (std::all_of(g, g + dim, [](T v) { return v == T(0); })) continue;
    if (side.inverse)
      kernels.project(g, zi, dim, static_cast<T>(kernels.dot(g, zi, dim)),
                      static_cast<T>(alpha * side.inverse[i0 + i]));
    else
      kernels.project(g, zi, dim, T(0), alpha);
  }
  // Sums may be in place already. Counted in T, the rows of a narrower tensor lie beyond its end, where acc itself may
  // be.
  const bool same_type = out.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
  if (!same_type || acc != static_cast<T*>(out.data) + out.offset[i0]) kernels.unpack(acc, ld, out, i0, m);
}

// Row-owned gradient: weights(S, ld, m, n, i0, j0) turns similarities into dL/dS.
template <class T, class Weights, class Adjust = NoAdjustment>
void owned_gradient(const Side<T>& own, const Side<T>& other, bool self, T alpha, const RowsOut& out, Weights&& weights,
                    const Adjust& adjust = {}) {
  const int64_t dim = own.rows.dim;
  sweep<T>(
      own, other, self, alpha, T(0), true,
      [&](int64_t, int64_t m) { std::fill_n(scratch<T>(kSums, m * dim), m * dim, T(0)); },
      [&](T* s, int64_t ld, int64_t m, int64_t n, int64_t i0, int64_t j0, const Tile<T>&, const Tile<T>& b) {
        weights(s, ld, m, n, i0, j0);
        if (self) set_diagonal(s, ld, m, n, i0, j0, T(0));
        gemm<T>(m, dim, n, T(1), s, ld, 1, b.data, b.row, b.col, T(1), scratch<T>(kSums, m * dim), dim);
      },
      [&](int64_t i0, int64_t m) { finish_gradient(scratch<T>(kSums, m * dim), dim, own, i0, m, alpha, out, adjust); });
}

// Every unordered pair of rows once, in tiles: blocks meet in rounds in which each stands once (circle method), then
// each meets itself. So every block has a fixed order of additions, whatever the number of threads. tile(i0, m, j0, w,
// place) with i0 <= j0; i0 == j0 is a square on the diagonal; done(i0, m) after a block's last tile. place numbers the
// pairs of blocks, last round first and the diagonal at the end: a second walk in reverse meets in this order what a
// first one has left. Inside a square each row's tiles come from left to right (KeptTiles needs that).
template <class Visit, class Done>
void triangle(int64_t n, int64_t block, bool reverse, Visit&& tile, Done&& done) {
  const int64_t blocks = ceil_div(n, block);
  const int64_t players = blocks + blocks % 2, wheel = players - 1;  // an odd field gets a bye
  const int64_t rounds = blocks > 1 ? wheel : 0, tiles = blocks / 2, bye = blocks % 2;
  auto size = [&](int64_t I) { return std::min(block, n - I * block); };
  for (int64_t step = 0; step < rounds; ++step) {
    const int64_t round = reverse ? rounds - 1 - step : step;
    parallel(players / 2, [&](int64_t k) {  // with a bye it is the first one
      int64_t a = k == 0 ? wheel : (round + k) % wheel, b = k == 0 ? round : (round - k + wheel) % wheel;
      if (a > b) std::swap(a, b);
      if (b < blocks) tile(a * block, size(a), b * block, size(b), (rounds - 1 - round) * tiles + k - bye);
    });
  }
  // a square on the diagonal computes its lower half in vain: two squares of half the size waste half as much
  auto square = [&](auto&& again, int64_t i0, int64_t m, int64_t place) -> void {
    if (m < 128) return tile(i0, m, i0, m, place);
    const int64_t half = m / 2;
    again(again, i0, half, place);
    tile(i0, half, i0 + half, m - half, place);
    again(again, i0 + half, m - half, place);
  };
  parallel(blocks, [&](int64_t I) {
    square(square, I * block, size(I), rounds * tiles + I);
    done(I * block, size(I));
  });
}

// Tiles that one walk over the triangle leaves for the next one, as many as fit into `bytes`: what they save is a fifth
// of a tile's time, so where they would be less than one in 32 there are none.
template <class T>
class KeptTiles {
 public:
  KeptTiles(int64_t n, int64_t block, int64_t bytes) : block_(block), ld_(ExpTile<T>::padded(block + 15)) {
    const int64_t blocks = ceil_div(n, block), all = blocks * (blocks + 1) / 2;
    const int64_t most = bytes / (block * ld_ * static_cast<int64_t>(sizeof(T)));
    count_ = most * 32 < all ? 0 : std::min(all, most);
    data_.reserve(count_ * block * ld_);
  }
  // Where the tile from (i0, j0) stands, null if it is not kept. Rows are ld() apart and may be written to the end of
  // their last vector, which the next tile to the right writes again.
  T* at(int64_t i0, int64_t j0, int64_t place) const {
    return place < count_ ? data_.get() + (place * block_ + i0 % block_) * ld_ + j0 % block_ : nullptr;
  }
  int64_t ld() const { return ld_; }

 private:
  int64_t block_, ld_, count_ = 0;
  Buffer<T> data_;
};

// The rows of a gradient where they can be added up in place: plain rows of the compute type. Else null.
template <class T>
T* direct_rows(const RowsOut& out, int64_t n) {
  const bool same_type = out.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
  if (!same_type || out.stride_d != 1 || n == 0) return nullptr;
  for (int64_t r = 0; r < n; ++r)
    if (out.offset[r] != out.offset[0] + r * out.dim) return nullptr;
  return static_cast<T*>(out.data) + out.offset[0];
}

// Sixteen blocks make eight tiles a round for the threads to share. Large ones are whole blocks of the product (64
// columns, 6 rows); 384 rows measured best of 192 to 512 at N = 8192 (docs/performance.md).
inline int64_t triangle_block(int64_t n) {
  if (n <= 192) return std::max<int64_t>(n, 1);
  const int64_t want = std::clamp<int64_t>(n / 16, 128, 384);
  return want < 256 ? block_size(n, want, want) : ceil_div(want, 64) * 64;
}

}  // namespace medcl
