#define MEDCL_ISA base
#include "cpu/kernels_impl.h"
#include "cpu/patch_kernels_impl.h"
