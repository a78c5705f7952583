#define MEDCL_ISA base
#include "cpu/kernels_impl.h"
