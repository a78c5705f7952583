// What Python asks of the library itself; ops.cpp and, over the emulator, host/library.cpp answer.
#pragma once
#include <string>

namespace medcl {

// From now on; returns what was in force.
std::string configure(std::string capability_name, std::string gemm);
bool use_wgmma(bool use);
std::string build_info();  // name=value;...

}  // namespace medcl
