// What the library asks the CUDA runtime about a device.
#pragma once
#include <string>

namespace medcl::cuda {

int runtime_version();
int device_count();  // 0 where there is no driver
// Makes the device current for the library's own (static) runtime; the reason if its kernels cannot run there, else "".
std::string use_device(int device);
bool wgmma();              // whether row statistics take the kernels of wgmma.cuh
bool use_wgmma(bool use);  // from now on; returns what was in force

}  // namespace medcl::cuda
