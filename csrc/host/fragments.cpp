// Every wrapper of ptx.cuh and wgmma.cuh against a statement of its own: mma fragments by the strides of CuTe's
// MMA_Traits (published numbers): lane = 4 g + t, value (v0, v1, v2), linear index = t St + g Sg + v . Sv, column-major
// in (M, K), (N, K) and (M, N).
#include "host/fragments.h"

#include <cstdlib>

#include "cuda/wgmma.cuh"

namespace medcl::host {
namespace {

int A[16][16], B[8][16], wrong;

void draw() {
  for (auto& row : A)
    for (int& x : row) x = std::rand() % 15 - 7;
  for (auto& row : B)
    for (int& x : row) x = std::rand() % 15 - 7;
}

void check(const float (&c)[4], int t, int g, int depth) {
  for (int v = 0; v < 4; ++v) {
    const int linear = t * 32 + g + (v & 1) * 16 + (v >> 1) * 8, m = linear % 16, n = linear / 16;
    int want = 100;
    for (int k = 0; k < depth; ++k) want += A[m][k] * B[n][k];
    wrong += float(want) != c[v];
  }
}

template <bool Bf16>
void half_kernel() {
  const int lane = threadIdx.x, t = lane % 4, g = lane / 4;
  const auto pair = [](int low, int high) {
    return Bf16 ? ptx::pack_bf16(float(low), float(high)) : ptx::pack_fp16(float(low), float(high));
  };
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) {
    int x[2];
    for (int e = 0; e < 2; ++e) {
      const int linear = t * 32 + g + e * 16 + (r & 1) * 8 + (r >> 1) * 128;
      x[e] = A[linear % 16][linear / 16];
    }
    a[r] = pair(x[0], x[1]);
  }
  for (int r = 0; r < 2; ++r) {
    int x[2];
    for (int e = 0; e < 2; ++e) {
      const int linear = t * 16 + g + e * 8 + r * 64;
      x[e] = B[linear % 8][linear / 8];
    }
    b[r] = pair(x[0], x[1]);
  }
  float c[4] = {100, 100, 100, 100};
  Bf16 ? ptx::mma_bf16(c, a, b[0], b[1]) : ptx::mma_fp16(c, a, b[0], b[1]);
  check(c, t, g, 16);
}

void tf32_kernel() {
  const int lane = threadIdx.x, t = lane % 4, g = lane / 4;
  uint32_t a[4], b[2];
  for (int v = 0; v < 4; ++v) {
    const int linear = t * 16 + g + (v & 1) * 8 + (v >> 1) * 64;
    a[v] = ptx::to_tf32(float(A[linear % 16][linear / 16]));
  }
  for (int v = 0; v < 2; ++v) {
    const int linear = t * 8 + g + v * 32;
    b[v] = ptx::to_tf32(float(B[linear % 8][linear / 8]));
  }
  float c[4] = {100, 100, 100, 100};
  ptx::mma_tf32(c, a, b[0], b[1]);
  check(c, t, g, 8);
}

void ldmatrix_kernel() {
  MEDCL_SHARED(s);
  auto* h = reinterpret_cast<uint16_t*>(s);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) h[i] = uint16_t(i);  // matrix i / 64, row i / 8 % 8, column i % 8
  __syncwarp();
  uint32_t r[4], q[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(s) + lane * 16);
  ptx::ldmatrix_x4_trans(q, ptx::shared_address(s) + lane * 16);
  for (int m = 0; m < 4; ++m)
    for (int e = 0; e < 2; ++e) {
      const uint32_t plain = m * 64 + (lane / 4) * 8 + 2 * (lane % 4) + e;
      const uint32_t turned = m * 64 + (2 * (lane % 4) + e) * 8 + lane / 4;
      wrong += (r[m] >> 16 * e & 0xffff) != plain;
      wrong += (q[m] >> 16 * e & 0xffff) != turned;
    }
}

// 16 bytes to shared memory in two groups, of which the newer may be outstanding; zeros where asked for; and back.
void copy_kernel(const float* from) {
  MEDCL_SHARED(s);
  const uint32_t base = ptx::shared_address(s), mine = threadIdx.x * 16;
  ptx::cp_async_16(base + mine, from + threadIdx.x * 4, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(base + 512 + mine, from + threadIdx.x * 4, threadIdx.x % 2);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  const uint32_t other = (threadIdx.x ^ 1) * 16;
  float four[4], two[2];
  ptx::load_shared(four, base + other);
  ptx::load_shared(two, base + other + 8);
  const float one = bit_copy<float>(ptx::load_shared(base + other + 4));
  for (int i = 0; i < 4; ++i) wrong += four[i] != float((threadIdx.x ^ 1) * 4 + i);
  for (int i = 0; i < 2; ++i) wrong += two[i] != four[2 + i];
  wrong += one != four[1];
  ptx::cp_async_wait<0>();
  __syncthreads();
  ptx::load_shared(four, base + 512 + other);
  for (int i = 0; i < 4; ++i) wrong += four[i] != (threadIdx.x % 2 ? 0.f : float((threadIdx.x ^ 1) * 4 + i));
}

// 64 x 128 x 32 in two steps, from rows in 128-byte atoms swizzled by hand, those of B twice as far apart as those of
// A, or in 8 x 16 byte atoms without swizzle. Accumulators by the strides of CuTe's CLayout_64xN: (t, g, warp), (v0,
// v1, n) = (128, 1, 16), (64, 8, 512), column-major in (M, N).
int wide_a[64][32], wide_b[128][32];
template <bool Bf16, bool Swizzled>
void warpgroup_kernel() {
  MEDCL_SHARED(s);
  const uint32_t start = ptx::shared_address(s), first = (1024 - start % 1024) % 1024;
  const uint32_t strides[2] = {Swizzled ? 1024u : 512u, Swizzled ? 2048u : 640u}, at[2] = {first, first + 8192};
  const auto put = [&](int side, int row, int k, int x) {
    const int atom = at[side] + row / 8 * strides[side], line = row % 8, chunk = k / 8;
    const int byte = Swizzled ? line * 128 + ((chunk ^ line) * 16) : chunk * 128 + line * 16;
    const uint32_t bits = Bf16 ? ptx::pack_bf16(float(x), 0.f) : ptx::pack_fp16(float(x), 0.f);
    reinterpret_cast<uint16_t*>(s + atom + byte)[k % 8] = static_cast<uint16_t>(bits);
  };
  for (int i = threadIdx.x; i < 64 * 32; i += 128) put(0, i / 32, i % 32, wide_a[i / 32][i % 32]);
  for (int i = threadIdx.x; i < 128 * 32; i += 128) put(1, i / 32, i % 32, wide_b[i / 32][i % 32]);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[16][4];
  for (auto& four : d)
    for (float& x : four) x = NAN;
  ptx::wgmma_fence(d);
  for (int step = 0; step < 2; ++step) {
    const auto descriptor = [&](int side) {
      const uint64_t address = (start + at[side] + step * (Swizzled ? 32 : 256)) >> 4, mode = Swizzled ? 1 : 0;
      return mode << 62 | uint64_t(strides[side] >> 4) << 32 | (128 >> 4) << 16 | address;
    };
    Bf16 ? ptx::wgmma_bf16(d, descriptor(0), descriptor(1), step > 0)
         : ptx::wgmma_fp16(d, descriptor(0), descriptor(1), step > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  const int t = threadIdx.x % 4, g = threadIdx.x / 4 % 8, warp = threadIdx.x / 32;
  for (int i = 0; i < 64; ++i) {
    const int linear = t * 128 + g + warp * 16 + (i & 1) * 64 + (i >> 1 & 1) * 8 + i / 4 * 512;
    int want = 0;
    for (int k = 0; k < 32; ++k) want += wide_a[linear % 64][k] * wide_b[linear / 64][k];
    wrong += d[i / 4][i % 4] != float(want);
  }
}

void arithmetic_kernel() {
  const float x = (float(threadIdx.x) - 15.5f) * 3.7f;
  const auto off = [](float a, float b) { return !(std::fabs(a - b) <= 4e-7f * std::fabs(b)); };
  wrong += off(ptx::exp2(x), ::exp2f(x)) + off(ptx::reciprocal(x), 1.f / x);
  wrong += off(ptx::log2(x * x), ::log2f(x * x));
  wrong += ptx::exp2(-INFINITY) != 0.f || ptx::exp2(INFINITY) != INFINITY || ptx::reciprocal(INFINITY) != 0.f;
  wrong += ptx::exp2(-130.f) != 0.f;  // subnormal results are flushed
  wrong += (ptx::to_tf32(x) & 0x1fffu) != 0 || std::fabs(bit_copy<float>(ptx::to_tf32(x)) - x) > std::fabs(x) / 2048;
  // 1 + 2^-8 lies half-way between two bf16 numbers: to even; 65520 between the largest fp16 number and infinity
  wrong += ptx::pack_bf16(1.00390625f, -2.f) != 0xc0003f80u || ptx::pack_fp16(1.f, 65519.f) != 0x7bff3c00u;
}

}  // namespace

std::map<std::string, int> wrong_fragments() {
  std::map<std::string, int> result;
  const auto count = [&](const char* name, auto&& f) {
    wrong = 0;
    f();
    result[name] = wrong;
  };
  const auto warp = [](auto kernel, size_t shared, auto... a) { cuda::launch(kernel, 1, 32, shared, nullptr, a...); };
  const auto drawn = [&](auto kernel) {
    return [=] {
      for (int i = 0; i < 100; ++i) {
        draw();
        warp(kernel, 0);
      }
    };
  };
  std::srand(1);
  count("mma_bf16", drawn(half_kernel<true>));
  count("mma_fp16", drawn(half_kernel<false>));
  count("mma_tf32", drawn(tf32_kernel));
  count("ldmatrix", [&] { warp(ldmatrix_kernel, 512); });
  alignas(16) float numbers[128];
  for (int i = 0; i < 128; ++i) numbers[i] = float(i);
  count("cp_async and ld.shared", [&] { warp(copy_kernel, 1024, static_cast<const float*>(numbers)); });
  for (auto& row : wide_a)
    for (int& x : row) x = std::rand() % 15 - 7;
  for (auto& row : wide_b)
    for (int& x : row) x = std::rand() % 15 - 7;
  const auto warpgroup = [](auto kernel) { cuda::launch(kernel, 1, 128, 1024 + 8192 + 16 * 2048, nullptr); };
  count("wgmma_bf16", [&] { warpgroup(warpgroup_kernel<true, true>); });
  count("wgmma_fp16", [&] { warpgroup(warpgroup_kernel<false, true>); });
  count("wgmma without swizzle", [&] { warpgroup(warpgroup_kernel<true, false>); });
  count("arithmetic", [&] { warp(arithmetic_kernel, 0); });
  return result;
}

}  // namespace medcl::host
