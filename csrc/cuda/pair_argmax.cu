// pair_argmax on the GPU (medcl_kernels/reference/pair_argmax.py).
#include "cuda/wgmma.cuh"

namespace medcl::cuda {

void pair_argmax(Workspace& w, const Sides& sides, const Options& o, int64_t* index, float* value) {
  const PackedSides s(w, sides, o, false);
  run_row_statistic<Argmax>(s, s.pairs(false, true, nullptr, 0, 1), ArgmaxArguments{index, value});
}

}  // namespace medcl::cuda
