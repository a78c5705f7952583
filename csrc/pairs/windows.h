// Windows of a label map, shared by the CPU and CUDA kernels of patch_class_ratio
// (medcl_kernels/reference/patch_class_ratio.py). A plane is a volume of one slice.
#pragma once
#include <cstdint>

#include "pairs/numbers.h"

namespace medcl {

struct Box {  // [low, high) per axis
  int64_t low[3], high[3];
};

// [center + from, center + to) of one axis as far as it is inside [0, size); empty where it is not
MEDCL_HD void clip_window(Box& box, int64_t axis, int64_t center, int64_t from, int64_t to, int64_t size) {
  const int64_t low = center + from, high = center + to;
  box.low[axis] = low < 0 ? 0 : low > size ? size : low;
  box.high[axis] = high < box.low[axis] ? box.low[axis] : high > size ? size : high;
}

MEDCL_HD int64_t cells_of(const Box& box) {
  return (box.high[0] - box.low[0]) * (box.high[1] - box.low[1]) * (box.high[2] - box.low[2]);
}

// rounded once; an empty window gives 0
template <class T>
MEDCL_HD T share_of(int64_t count, int64_t cells) {
  return static_cast<T>(static_cast<double>(count) / static_cast<double>(cells > 1 ? cells : 1));
}

}  // namespace medcl
