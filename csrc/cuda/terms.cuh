// Per-row records that the pair engine reads beside the rows: who takes part, its label, its gradient.
#pragma once
#include "cuda/launch.cuh"

namespace medcl::cuda {

// What a pair needs to know of one of its rows, for one selection.
struct alignas(16) Term {
  float bias;    // added to the scaled score: minus the shift of the exponential; -inf: the row is left out
  float weight;  // upstream gradient, scaled; 0 where the row is no anchor
  float level;   // log-sum-exp in units of log 2
  int32_t code;  // labels are equal where codes are; negative: left out
};

MEDCL_DEVICE float power_of_two(int exponent) { return bit_copy<float>(static_cast<uint32_t>(exponent + 127) << 23); }

// Upstream gradients are scaled by a power of two before they meet the probabilities in 16 bits: the largest becomes
// less than 2^(room + 1), so that fp16 neither overflows nor loses the many small ones. The largest is found on the
// device; integer maxima do not depend on the order.
struct GradientScale {
  const unsigned* peak;  // bits of the largest |gradient|
  int room;
  MEDCL_DEVICE int exponent() const {
    const int size = static_cast<int>(*peak >> 23) - 127;
    return *peak == 0 ? 0 : room - (size < -100 ? -100 : size > 100 ? 100 : size);
  }
};

// Equal labels of any 64-bit value get equal codes, the slots of a hash table with open addressing. Which slot it is
// depends on the order of insertion, no result does. The ignored label is never inserted: it marks free slots.
struct LabelTable {
  int64_t* slots;
  int64_t mask;  // number of slots - 1
  int64_t free;

  MEDCL_DEVICE int64_t start(int64_t label) const {
    uint64_t x = static_cast<uint64_t>(label) * 0x9E3779B97F4A7C15ull;
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93ull;
    return static_cast<int64_t>(x >> 20) & mask;
  }
  MEDCL_DEVICE void insert(int64_t label) const {
    for (int64_t at = start(label);; at = (at + 1) & mask) {
      if (ptx::load_relaxed(slots + at) == label) return;  // few labels: no queue of atomics at their slots
      auto* slot = reinterpret_cast<unsigned long long*>(slots + at);
      const auto found = static_cast<int64_t>(
          atomicCAS(slot, static_cast<unsigned long long>(free), static_cast<unsigned long long>(label)));
      if (found == free || found == label) return;
    }
  }
  MEDCL_DEVICE int32_t code(int64_t label) const {
    int64_t at = start(label);
    while (slots[at] != label) at = (at + 1) & mask;
    return static_cast<int32_t>(at);
  }
};

}  // namespace medcl::cuda
