#define MEDCL_ISA avx512
#include "cpu/filter_impl.h"
#include "cpu/patch_kernels_impl.h"
