#include "cuda/device.h"

#include <cuda_runtime.h>

#include <atomic>

namespace medcl::cuda {
namespace {

std::atomic<bool> wgmma_used{false};

}  // namespace

bool wgmma() { return wgmma_used; }
bool use_wgmma(bool use) { return wgmma_used.exchange(use); }

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // a machine without a driver leaves an error behind
    return 0;
  }
  return count;
}

std::string use_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major >= 8) return "";
  return "the CUDA kernels need compute capability 8.0 or newer, device " + std::to_string(device) + " has " +
         std::to_string(major) + "." + std::to_string(minor) + ": use impl=\"reference\"";
}

}  // namespace medcl::cuda
