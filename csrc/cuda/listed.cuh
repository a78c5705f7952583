// Lists of pairs of rows: their similarities, and the gradients of the rows they name.
#pragma once
#include "cuda/sides.cuh"

namespace medcl::cuda {

// One list per group, (groups, length). A negative anchor or candidate: no pair.
struct Listed {
  int64_t length = 0;
  int64_t several = 0;  // entry e belongs to row e / several; 0: to the row that anchor names
  const int64_t* anchor = nullptr;
  const int64_t* candidate = nullptr;
  // on the way back, per entry, and per row of the query, or null: what an entry's similarity gets is their product
  const float *upstream = nullptr, *row_upstream = nullptr;
};

// out (groups, length): 0 where there is no pair; NaN where a row past the end is named, which reads nothing
void listed_similarities(const PackedSides&, const Listed&, float* out);
void listed_gradients(const PackedSides&, const Listed&, const Rows& d_query, const Rows& d_key);

// One list over the rows of the whole batch.
void pair_list(Workspace&, const Sides&, Options, const PairList&, float* out);
void pair_list_backward(Workspace&, const Sides&, Options, const PairList&, const float* upstream,
                        const float* row_upstream, const Rows& d_query, const Rows& d_key);

}  // namespace medcl::cuda
