#define MEDCL_ISA avx2
#include "cpu/kernels_impl.h"
