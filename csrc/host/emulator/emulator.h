// Host stand-in for the CUDA language: lets an unchanged kernel compile with g++ and run as fibers, one per thread,
// one block at a time. This header is compiled with the kernel, and so carries whatever sanitizer the kernel carries;
// everything that touches another fiber's data lives in the emulator's own sources, never instrumented for TSan.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// where a kernel stands: default arguments, so that calls are spelled as for nvcc
#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emulator {

enum class Order { forward, reverse, random };  // which ready fiber runs next
enum class CopyMode { eager, late };            // when cp.async data lands: at issue, or at the wait (NaN until then)

struct Config {
  Order order = Order::forward;
  CopyMode copies = CopyMode::late;
  unsigned seed = 0;
  bool race = true;         // exact shadow of the shared memory that cp.async, ldmatrix and ld.shared touch
  size_t stack = 64 << 10;  // bytes per fiber; sanitizers need four times as much
  void* stream = nullptr;   // the only one that may be launched on
};
struct Stats {
  int64_t launches, blocks, barriers, warp_operations, mma, wgmma, ldmatrix, shared_loads, bank_conflicts, copies,
      switches;
};
struct Here {
  dim3 thread, block, block_dim, grid_dim;
};

Config& config();
Stats& stats();
const Here& here();
unsigned char* shared_base();
size_t shared_size();
[[noreturn]] void fail(const std::string& what, const char* file, int line);
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

void block_barrier(const char* file, int line);

enum class Op {
  syncwarp,
  shuffle,
  ldmatrix,
  ldmatrix_trans,
  mma_bf16,
  mma_fp16,
  mma_tf32,
  wgmma_fence,  // from here on those of a warpgroup
  wgmma_commit,
  wgmma_wait,
  wgmma_bf16,
  wgmma_fp16
};
// Deposits the lane's slot and returns once every lane of the mask arrived and the last one computed for all.
void warp_operation(Op op, void* slot, unsigned mask, const char* file, int line);
struct ShuffleSlot {
  uint64_t value, result;
  int source;
};
struct MatrixSlot {
  uint32_t row[4], result[4], address;
};
struct MmaSlot {
  const uint32_t *a, *b;
  float* c;
};
struct WgmmaSlot {
  uint64_t a, b;  // descriptors
  float* d;       // the lane's accumulators, columns / 2 of them
  int columns;
  bool add;
};

struct Copy {
  uint32_t destination;
  const void* source;
  int bytes, group;
  const char* file;
  int line;
};
enum class Touch { read, issue, land };
void touch(uint32_t address, Touch what, const char* file, int line);      // one 16-byte cell of shared memory
void count_load(uint32_t address, int bytes, const char* file, int line);  // ld.shared: models bank conflicts
Copy* push_copy();                                                         // the fiber's queue of outstanding cp.async
void commit_copies();
void fence_proxy_async();
bool pop_copy(int keep, Copy& out);  // the next copy that belongs to a group older than the newest `keep`

// Where dynamic shared memory begins in the shared window: the system keeps 1 KiB, and nobody promises a kernel more
// than the alignment that it declares.
constexpr uint32_t kWindow = 1024 + 128;
inline unsigned char* shared(uint32_t address, int bytes, const char* what, const char* file, int line) {
  if (address % bytes) fail(std::string(what) + ": misaligned shared address", file, line);
  if (address < kWindow || size_t(address - kWindow) + bytes > shared_size())
    fail(std::string(what) + ": outside dynamic shared memory", file, line);
  return shared_base() + (address - kWindow);
}
// Inline, so that ASan checks the source and TSan sees the writer.
inline void land(const Copy& copy) {
  unsigned char value[16] = {};
  std::memcpy(value, copy.source, copy.bytes);
  std::memcpy(shared_base() + (copy.destination - kWindow), value, 16);
}

}  // namespace emulator

#define threadIdx (emulator::here().thread)
#define blockIdx (emulator::here().block)
#define blockDim (emulator::here().block_dim)
#define gridDim (emulator::here().grid_dim)

inline void __syncthreads(EMULATOR_SITE) { emulator::block_barrier(file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
  emulator::warp_operation(emulator::Op::syncwarp, nullptr, mask, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, EMULATOR_SITE) {
  static_assert(sizeof(T) <= 8, "shuffle payload");
  emulator::ShuffleSlot slot{0, 0, source & 31};
  std::memcpy(&slot.value, &value, sizeof value);
  emulator::warp_operation(emulator::Op::shuffle, &slot, mask, file, line);
  std::memcpy(&value, &slot.result, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int = 32, EMULATOR_SITE) {
  return __shfl_sync(mask, value, int(threadIdx.x & 31) ^ other, 32, file, line);
}
// Relaxed, as on the device: they order nothing else.
inline unsigned atomicMax(unsigned* at, unsigned value) {
  unsigned old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long compare, unsigned long long value) {
  __atomic_compare_exchange_n(at, &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}
template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
