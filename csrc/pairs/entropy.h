// Entropy of a few logits z, shared by the CPU and CUDA kernels of uncertainty_reweight
// (medcl_kernels/reference/uncertainty_reweight.py). With top = max z, every logit adds to
// sum = sum e^(z - top) and weighted = sum e^(z - top) (z - top); then log p = z - top - log sum and
// H = log sum - weighted / sum.
#pragma once
#include "pairs/numbers.h"

namespace medcl {

// the larger one; a NaN must not lose a comparison
template <class T>
MEDCL_HD T raised(T top, T z) {
  return z > top || z != z ? z : top;
}

template <class T>
MEDCL_HD void add_logit(T below, T& sum, T& weighted) {
  const T e = exp_poly(below);
  sum += e;
  weighted += e * below;
}

template <class T>
MEDCL_HD T entropy_of(T sum, T log_sum, T weighted) {
  return log_sum - weighted / sum;
}

// (U4), factor being sum_c g_c x_c / log M
template <class T>
MEDCL_HD T logit_gradient(T log_p, T entropy, T factor) {
  return factor * exp_poly(log_p) * (log_p + entropy);
}

}  // namespace medcl
