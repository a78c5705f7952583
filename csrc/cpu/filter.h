// What the Gradient Filter and the Gradient Mitigator need from one instruction set (filter_impl.h), compiled and
// chosen like the tables of tile.h.
#pragma once
#include <cstdint>

#include "cpu/tile.h"
#include "pairs/mitigation.h"
#include "pairs/scores.h"

namespace medcl {

// Arrays of row constants are read in whole vectors: everything has this many elements to spare behind its end.
constexpr int64_t kSpare = 16;

struct Stack {  // (M, B, D, L) gradients
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t count = 1, dim = 1;  // M, D
  int64_t stride_m = 0, stride_d = 0, stride_l = 0;
};

template <class T>
struct FilterKernels {
  // g[j] = dl/ds for similarities s[j] of anchors with constants (a, b, c)[j], positive[j] = -1 or 0: (G1) to (G3) of
  // reference/pair_gradients.py. Whole vectors, so that an element has the same bits wherever it stands.
  void (*gradients)(Form, const T* s, int64_t n, const T* a, const T* b, const T* c, const int32_t* positive, T* g);
  // r[j] = |g[j]|, where scale is not null times scale[j] sqrt(1 - (t s[j])^2): (G4)
  void (*scores)(const T* s, const T* g, int64_t n, T temperature, const T* scale, T* r);
  // at[] = the places j with low[j * step] <= v[j] < high[j * step], in order; returns how many. *beyond += how many
  // v[j] reach high.
  int64_t (*pick)(const T* v, int64_t n, const T* low, const T* high, int64_t step, int32_t* at, int64_t* beyond);
  // w[j] += up[j * step] g[j] where r[j] is above the limit of its kind; returns whether some r[j] > 0 is equal to it
  bool (*select)(const T* g, const T* r, int64_t n, const T* up, const T* limit, const T* negative_limit, int64_t step,
                 const int32_t* positive, T* w);
  // gram (rows, M, M) of n rows l0 ... of one image; symmetric
  void (*gram_rows)(const Stack&, int64_t offset, int64_t l0, int64_t n, double* gram);
  // out = sum_m weight[r, m] g_m, weight (rows, M) or, step 0, (1, M)
  void (*combine_rows)(const Stack&, int64_t offset, int64_t l0, int64_t n, const double* weight, int64_t step,
                       void* out, int64_t out_d, int64_t out_l);
  // the mean of the M numbers where they agree in sign, else 0; times factor
  void (*consensus_rows)(const Stack&, int64_t offset, int64_t l0, int64_t n, double factor, void* out, int64_t out_d,
                         int64_t out_l);
};

template <class T>
const FilterKernels<T>& filter_kernels();

}  // namespace medcl
