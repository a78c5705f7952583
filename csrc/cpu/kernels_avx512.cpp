#define MEDCL_ISA avx512
#include "cpu/kernels_impl.h"
#include "cpu/patch_kernels_impl.h"
