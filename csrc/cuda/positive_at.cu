// positive_at on the GPU (medcl_kernels/reference/positive_at.py): a list of `several` pairs per row.
#include "cuda/listed.cuh"

namespace medcl::cuda {
namespace {

Listed listed(const PackedSides& s, const int64_t* positives, int64_t several) {
  Listed list;
  list.length = s.query.count * several;
  list.several = several;
  list.candidate = positives;
  return list;
}

}  // namespace

void positive_at(Workspace& w, const Sides& sides, const Options& o, const int64_t* positives, int64_t several,
                 float* out) {
  const PackedSides s(w, sides, o, false);
  listed_similarities(s, listed(s, positives, several), out);
}

void positive_at_backward(Workspace& w, const Sides& sides, const Options& o, const int64_t* positives, int64_t several,
                          const float* d_out, const Rows& d_query, const Rows& d_key) {
  const PackedSides s(w, sides, o, false);
  Listed list = listed(s, positives, several);
  list.upstream = d_out;
  listed_gradients(s, list, d_query, d_key);
}

}  // namespace medcl::cuda
