#define MEDCL_ISA base
#include "cpu/filter_impl.h"
#include "cpu/patch_kernels_impl.h"
