#define MEDCL_ISA base
#include "cpu/filter_impl.h"
