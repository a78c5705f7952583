#define MEDCL_ISA avx2
#include "cpu/kernels_impl.h"
#include "cpu/patch_kernels_impl.h"
