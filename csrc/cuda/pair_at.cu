// pair_at on the GPU (medcl_kernels/reference/pair_at.py).
#include "cuda/listed.cuh"

namespace medcl::cuda {

void pair_at(Workspace& w, const Sides& sides, const Options& o, const PairList& pairs, float* out) {
  pair_list(w, sides, o, pairs, out);
}

void pair_at_backward(Workspace& w, const Sides& sides, const Options& o, const PairList& pairs, const float* d_out,
                      const Rows& d_query, const Rows& d_key) {
  pair_list_backward(w, sides, o, pairs, d_out, nullptr, d_query, d_key);
}

}  // namespace medcl::cuda
