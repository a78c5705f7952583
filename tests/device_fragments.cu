// Every tensor-core and copy instruction of csrc/cuda/ptx.cuh and wgmma.cuh on a real device: whether the fragments lie
// where the kernels, and the host emulator that proves them in CI, take them to lie. Small integers, so that sums are
// exact. Prints "name number-of-wrong-elements" per instruction; exit code 1 if one is wrong, 2 if nothing could run.
#include <cstdio>
#include <cstdlib>

#include "cuda/wgmma.cuh"

using namespace medcl;

constexpr int kRows = 16, kColumns = 8;

// the layouts of the PTX manual: g = lane / 4, t = lane % 4
template <class Pack, class Mma>
__device__ void half_product(const int* a, const int* b, float* c, Pack pack, Mma mma) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int r = 0; r < 4; ++r) {
    const int* at = a + (g + 8 * (r & 1)) * 16 + 2 * t + 8 * (r >> 1);
    fa[r] = pack(float(at[0]), float(at[1]));
  }
  for (int r = 0; r < 2; ++r) {
    const int* at = b + g * 16 + 2 * t + 8 * r;
    fb[r] = pack(float(at[0]), float(at[1]));
  }
  float fc[4] = {100, 100, 100, 100};
  mma(fc, fa, fb[0], fb[1]);
  for (int v = 0; v < 4; ++v) c[(g + 8 * (v >> 1)) * kColumns + 2 * t + (v & 1)] = fc[v];
}

__global__ void bf16_product(const int* a, const int* b, float* c) {
  half_product(a, b, c, [](float x, float y) { return ptx::pack_bf16(x, y); },
               [](auto& d, const auto& p, uint32_t q, uint32_t r) { ptx::mma_bf16(d, p, q, r); });
}
__global__ void fp16_product(const int* a, const int* b, float* c) {
  half_product(a, b, c, [](float x, float y) { return ptx::pack_fp16(x, y); },
               [](auto& d, const auto& p, uint32_t q, uint32_t r) { ptx::mma_fp16(d, p, q, r); });
}
__global__ void tf32_product(const int* a, const int* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int r = 0; r < 4; ++r) fa[r] = ptx::to_tf32(float(a[(g + 8 * (r & 1)) * 8 + t + 4 * (r >> 1)]));
  for (int r = 0; r < 2; ++r) fb[r] = ptx::to_tf32(float(b[g * 8 + t + 4 * r]));
  float fc[4] = {100, 100, 100, 100};
  ptx::mma_tf32(fc, fa, fb[0], fb[1]);
  for (int v = 0; v < 4; ++v) c[(g + 8 * (v >> 1)) * kColumns + 2 * t + (v & 1)] = fc[v];
}

// four 8 x 8 matrices of 16-bit numbers, one after the other; both forms, as [register][lane][half]
__global__ void matrices(const uint16_t* from, uint32_t* plain, uint32_t* turned) {
  MEDCL_SHARED(shared);
  const uint32_t base = ptx::shared_address(shared), mine = threadIdx.x * 16;
  ptx::cp_async_16(base + mine, from + threadIdx.x * 8, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t r[4], q[4];
  ptx::ldmatrix_x4(r, base + mine);
  ptx::ldmatrix_x4_trans(q, base + mine);
  for (int m = 0; m < 4; ++m) {
    plain[m * 32 + threadIdx.x] = r[m];
    turned[m * 32 + threadIdx.x] = q[m];
  }
}

// odd lanes copy nothing and must find zeros; the older of two groups must have landed after a wait for one
__global__ void copies(const float* from, float* first, float* second) {
  MEDCL_SHARED(shared);
  const uint32_t base = ptx::shared_address(shared), mine = threadIdx.x * 16;
  ptx::cp_async_16(base + mine, from + threadIdx.x * 4, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(base + 512 + mine, from + threadIdx.x * 4, threadIdx.x % 2 == 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  float x[4];
  ptx::load_shared(x, base + mine);
  for (int i = 0; i < 4; ++i) first[threadIdx.x * 4 + i] = x[i];
  ptx::cp_async_wait<0>();
  __syncthreads();
  ptx::load_shared(x, base + 512 + mine);
  for (int i = 0; i < 4; ++i) second[threadIdx.x * 4 + i] = x[i];
}

// rows where a tile of wgmma.cuh puts them, and its scores: descriptors, swizzle, accumulators; compute capability 9.0
template <class T>
__global__ void warpgroup_scores(const int* a, const int* b, float* c) {
  MEDCL_SHARED(shared);
  if constexpr (T::kMostThreads == T::kThreads) {
    const uint32_t start = ptx::shared_address(shared), base = (start + T::kAlign - 1) / T::kAlign * T::kAlign;
    const auto put = [&](uint32_t to, int i, const int* from) {
      const int row = i / T::kSlab, channel = i % T::kSlab;
      const uint32_t byte = to - start + T::at(row, channel / 8) + channel % 8 * 2;
      *reinterpret_cast<uint16_t*>(shared + byte) = static_cast<uint16_t>(T::Product::pair(float(from[i]), 0.f));
    };
    for (int i = threadIdx.x; i < T::kRows * T::kSlab; i += T::kThreads) {
      put(base, i, a);
      put(base + T::kOwnedBytes, i, b);
    }
    T::publish_copies();
    __syncthreads();
    const cuda::Lane l;
    typename T::Scores s;
    T::set_scores(base, base + T::kOwnedBytes, l, s);
    for (int n = 0; n < T::kColumnTiles; ++n)
      for (int r = 0; r < 4; ++r)
        c[(l.warp * 16 + l.g + (r >> 1) * 8) * T::kColumns + n * 8 + l.t * 2 + (r & 1)] = s[0][n][r];
  }
}

void need(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(2);
}

template <class T>
T* pinned(int count) {
  T* p = nullptr;
  need(cudaMallocHost(&p, count * sizeof(T)));  // host memory that kernels read and write: it is small
  return p;
}

template <class Kernel>
int product_errors(Kernel kernel, int depth) {
  int *a = pinned<int>(kRows * depth), *b = pinned<int>(kColumns * depth), wrong = 0;
  float* c = pinned<float>(kRows * kColumns);
  for (int repeat = 0; repeat < 100; ++repeat) {
    for (int i = 0; i < kRows * depth; ++i) a[i] = std::rand() % 15 - 7;
    for (int i = 0; i < kColumns * depth; ++i) b[i] = std::rand() % 15 - 7;
    kernel<<<1, 32>>>(a, b, c);
    need(cudaGetLastError());
    need(cudaDeviceSynchronize());
    for (int m = 0; m < kRows; ++m)
      for (int n = 0; n < kColumns; ++n) {
        int want = 100;
        for (int k = 0; k < depth; ++k) want += a[m * depth + k] * b[n * depth + k];
        wrong += c[m * kColumns + n] != float(want);
      }
  }
  return wrong;
}

int matrix_errors() {
  uint16_t* from = pinned<uint16_t>(256);
  uint32_t *plain = pinned<uint32_t>(128), *turned = pinned<uint32_t>(128);
  for (int i = 0; i < 256; ++i) from[i] = static_cast<uint16_t>(i * 37);
  matrices<<<1, 32, 512>>>(from, plain, turned);
  need(cudaGetLastError());
  need(cudaDeviceSynchronize());
  int wrong = 0;
  for (int m = 0; m < 4; ++m)
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4, column = 2 * (lane % 4) + half;
        wrong += (plain[m * 32 + lane] >> (16 * half) & 0xffff) != from[m * 64 + row * 8 + column];
        wrong += (turned[m * 32 + lane] >> (16 * half) & 0xffff) != from[m * 64 + column * 8 + row];
      }
  return wrong;
}

int copy_errors() {
  float *from = pinned<float>(128), *first = pinned<float>(128), *second = pinned<float>(128);
  for (int i = 0; i < 128; ++i) from[i] = float(i + 1);
  copies<<<1, 32, 1024>>>(from, first, second);
  need(cudaGetLastError());
  need(cudaDeviceSynchronize());
  int wrong = 0;
  for (int i = 0; i < 128; ++i) wrong += (first[i] != from[i]) + (second[i] != (i / 4 % 2 ? 0.f : from[i]));
  return wrong;
}

template <class T>
int warpgroup_errors() {
  static_assert(T::kRows == T::kColumns, "a and b have one size");
  const size_t shared = T::kAlign + 2 * T::kOwnedBytes;
  need(cudaFuncSetAttribute(warpgroup_scores<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  int *a = pinned<int>(T::kRows * T::kSlab), *b = pinned<int>(T::kRows * T::kSlab), wrong = 0;
  float* c = pinned<float>(T::kRows * T::kRows);
  for (int i = 0; i < T::kRows * T::kSlab; ++i) {
    a[i] = std::rand() % 15 - 7;
    b[i] = std::rand() % 15 - 7;
  }
  warpgroup_scores<T><<<1, T::kThreads, shared>>>(a, b, c);
  need(cudaGetLastError());
  need(cudaDeviceSynchronize());
  for (int m = 0; m < T::kRows; ++m)
    for (int n = 0; n < T::kRows; ++n) {
      int want = 0;
      for (int k = 0; k < T::kSlab; ++k) want += a[m * T::kSlab + k] * b[n * T::kSlab + k];
      wrong += c[m * T::kRows + n] != float(want);
    }
  return wrong;
}

bool hopper() {
  int major = 0, minor = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && major == 9 &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess && minor == 0;
}

int main() {
  int all = 0;
  const auto report = [&](const char* name, int wrong) {
    std::printf("%s %d\n", name, wrong);
    all += wrong;
  };
  report("mma_bf16", product_errors(bf16_product, 16));
  report("mma_fp16", product_errors(fp16_product, 16));
  report("mma_tf32", product_errors(tf32_product, 8));
  report("ldmatrix", matrix_errors());
  report("cp_async", copy_errors());
  if (hopper()) {
    report("wgmma_bf16", warpgroup_errors<cuda::WgmmaTile<cuda::Bf16Product, 64, 3>>());
    report("wgmma_fp16", warpgroup_errors<cuda::WgmmaTile<cuda::Fp16Product, 128, 2>>());
  }
  return all != 0;
}
