// What CPU and CUDA share of scores of pairs.
#pragma once
#include <cstdint>

#include "pairs/numbers.h"

namespace medcl {

enum class Form : int { out, in, pixel };  // of a loss: (G1), (G2), (G3) of reference/pair_gradients.py

// Bits of a non-negative score: they are ordered as the scores are.
MEDCL_HD uint64_t bits_of(float x) { return bit_copy<uint32_t>(x); }
MEDCL_HD uint64_t bits_of(double x) { return bit_copy<uint64_t>(x); }
MEDCL_HD float score_of(uint64_t bits, float) { return bit_copy<float>(static_cast<uint32_t>(bits)); }
MEDCL_HD double score_of(uint64_t bits, double) { return bit_copy<double>(bits); }

}  // namespace medcl
