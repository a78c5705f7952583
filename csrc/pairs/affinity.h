// What the CPU and CUDA kernels of pair_affinity decide alike (medcl_kernels/reference/pair_affinity.py).
#pragma once
#include "pairs/numbers.h"

namespace medcl {

// Whether no exponent Q t leaves the range in which plain sums neither overflow nor vanish. `divergence` bounds D over
// all pairs, `reach` bounds |t|; |Q| is at most D or, where the weights are swapped, |1 - D|. A NaN gives false.
MEDCL_HD bool plain_exponents(double divergence, bool swapped, double reach, double limit) {
  const double weight = !swapped ? divergence : divergence > 2 ? divergence - 1 : 1;
  return weight * reach < limit;
}

}  // namespace medcl
