#pragma once
#include <map>
#include <string>

namespace medcl::host {

// How many elements every function of ptx.cuh gets wrong against an independent statement of what it does.
std::map<std::string, int> wrong_fragments();

}  // namespace medcl::host
