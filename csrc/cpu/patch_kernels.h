// What patch affinity, window counts and the uncertainty gate need from one instruction set. Compiled three times like
// tile.h's table and chosen with it; no torch header here.
#pragma once
#include <cstdint>

#include "cpu/tile.h"

namespace medcl {

// Class shares of the rows and columns of a tile, shifted to its first row and column: share (p, k, i) of row i at
// row[p * row_patch + k * row_class + i].
template <class T>
struct Shares {
  const T* row = nullptr;
  const T* col = nullptr;
  int64_t row_patch = 0, row_class = 0, col_patch = 0, col_class = 0;
  int64_t patches = 1, classes = 1;
  bool swapped = false;  // form "release2d": the affinity weighs the denominator, the divergence the numerator
};

// Per patch size and row (or column): (patches, stride). Null members: not wanted.
template <class T>
struct AffinityTerms {
  const T* weight = nullptr;  // g exp(-log_z), or g where log_z is given
  const T* log_z = nullptr;   // to base 2; null: in the weight already
  const T* linear = nullptr;  // h
  int64_t stride = 0;
};
struct AffinitySums {
  double* z = nullptr;
  double* linear = nullptr;  // to base 2, as t is
  int64_t stride = 0;
};

// Labels of at most so many classes are counted as bytes, in rows of a multiple of kLabelPadding.
constexpr int64_t kByteClasses = 255, kLabelPadding = 64;

enum class IntType : int { u8, i8, i16, i32, i64 };

// One image of a map (channels, pixels).
struct Field {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_c = 0, stride_l = 1, channels = 1;
};
struct FieldOut {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_c = 0, stride_l = 1;
};

template <class T>
struct PatchKernels {
  // t = s - shift, both times log2(e). Adds the sums over columns of 2^(Q t) and P t to the rows, and those over rows
  // to the columns where these are wanted.
  void (*affinity_sums)(const T* s, int64_t ld, int64_t m, int64_t n, T shift, const Shares<T>&,
                        const AffinitySums& row, const AffinitySums& col);
  // the same with a running maximum of Q t, (patches, row.stride), for exponents of any size; rows only
  void (*affinity_online)(const T* s, int64_t ld, int64_t m, int64_t n, T shift, const Shares<T>&, T* maximum,
                          const AffinitySums& row);
  // s -> sum over patch sizes of (w_i + w_j) Q 2^(Q t) + (h_i + h_j) P; without columns: rows only
  void (*affinity_weights)(T* s, int64_t ld, int64_t m, int64_t n, T shift, const Shares<T>&,
                           const AffinityTerms<T>& row, const AffinityTerms<T>& col);
  // pixels [first, first + n): y = x (2 - U(z))
  void (*reweight)(const Field& x, const Field& z, const FieldOut& y, int64_t first, int64_t n);
  // and the gradients for g = dL/dy; null data: not wanted
  void (*reweight_backward)(const Field& g, const Field& x, const Field& z, const FieldOut& d_x, const FieldOut& d_z,
                            int64_t first, int64_t n);
  // Boxes of one size, side by side along the last axis, whose first cells are at[0], at[1], ... behind p:
  // counts[b, k - 1] += number of cells that equal k, for k in [1, classes)
  void (*count_classes)(const void* p, IntType, const int64_t* stride, const int64_t* size, const int64_t* at,
                        int64_t boxes, int64_t classes, int32_t* counts);
  // n labels as bytes, those that are none as 255; writes up to the next multiple of kLabelPadding
  void (*narrow_labels)(const void* p, IntType, int64_t stride, int64_t n, uint8_t* out);
};

template <class T>
const PatchKernels<T>& patch_kernels();

}  // namespace medcl
