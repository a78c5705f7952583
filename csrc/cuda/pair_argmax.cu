// pair_argmax on the GPU (medcl_kernels/reference/pair_argmax.py).
#include "cuda/sides.cuh"

namespace medcl::cuda {

void pair_argmax(Workspace& w, const Sides& sides, const Options& o, int64_t* index, float* value) {
  const PackedSides s(w, sides, o, false);
  run_statistic<Argmax>(s.query, s.pairs(false, true, nullptr, 0, 1), ArgmaxArguments{index, value}, w.stream);
}

}  // namespace medcl::cuda
