// The emulator's inner state: fibers, warps, and the shadow of shared memory. Compile what includes this without
// -fsanitize=thread and with -fno-tree-loop-distribute-patterns (so no loop becomes an intercepted memcpy or memset).
#pragma once
#include <memory>
#include <vector>

#include "host/emulator/emulator.h"
#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#define EMULATOR_USES_UCONTEXT 1
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#define EMULATOR_ACQUIRE(p) __tsan_acquire(p)
#define EMULATOR_RELEASE(p) __tsan_release(p)
#else
#define EMULATOR_ACQUIRE(p) (void)0
#define EMULATOR_RELEASE(p) (void)0
#endif

namespace emulator {

enum class State : uint8_t { ready, in_warp, in_block, done };

struct Fiber {
#ifdef EMULATOR_USES_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  std::unique_ptr<char[]> stack;
  State state = State::done;
  dim3 thread;
  std::vector<Copy> copies;
  size_t head = 0;
  int group = 0;
  unsigned loads = 0;                  // ld.shared so far
  std::vector<uint64_t> proxy_fences;  // barrier intervals of its fence.proxy.async
  const char* file = "";
  int line = 0;
  void *fake_stack = nullptr, *tsan = nullptr;
};

// One ld.shared of a warp, complete when all 32 lanes have come to it. Lanes may be this many loads apart.
constexpr unsigned kLoadWindow = 4096;
struct Load {
  unsigned number = 0;
  int lanes = 0, bytes = 0, line = 0;
  uint32_t address[32];
};

struct InFlight {  // a wgmma
  Op op;
  uint64_t a, b;
  bool add;
  int group;
  const char* file;
  int line;
};
// One warp's share of a warpgroup. Its memory is the launch's: whatever a fiber allocates, TSan sees.
constexpr int kInFlight = 64, kMostColumns = 256;
struct Warpgroup {
  InFlight* products = nullptr;  // [kInFlight], issued and not waited for
  float* sums = nullptr;         // (16, columns)
  int count = 0, made = 0;       // of the products, and of those the ones that have been computed
  int64_t issued = 0;
  float* registers[32];  // the lanes' accumulators
  int columns = 0, group = 0;
  bool fenced = false;
};
struct Issued {  // what the warp that came first issued as its number-th wgmma
  int64_t number = 0;
  InFlight product;
};

struct Warp {
  unsigned ready = 0, arrived = 0, mask = 0, live = 0;
  Op op = Op::syncwarp;
  const char* file = "";
  int line = 0;
  void* slot[32];
  unsigned priority = 0;
  char order = 0;  // happens-before cell for __syncwarp
  uint32_t syncs = 0;
  Warpgroup wgmma;
};

struct Access {
  uint32_t epoch = 0, syncs = 0;
  int thread = -1, line = 0;
  const char* file = "";
};
struct Cell {  // reads: of this barrier interval, one reader and a reader of another warp
  Access write, read[2];
  int pending = -1;   // the thread whose cp.async has not been waited for
  size_t fences = 0;  // the writer's fence.proxy.async before it wrote
};

struct Machine {
  Config config;
  Stats stats{};
  Here here;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Cell> shadow;
  std::vector<InFlight> in_flight;  // (warps, kInFlight)
  std::vector<float> sums;          // (warps, 16, kMostColumns)
  std::vector<Issued> issued;       // (warpgroups, kInFlight), a ring each
  std::vector<Load> loads;          // (warps, kLoadWindow), a ring each
  int open_loads = 0;               // begun and not complete
  unsigned char* shared = nullptr;
  size_t shared_size = 0;
  const std::function<void()>* body = nullptr;
  int threads = 0, current = -1, at_barrier = 0, done = 0;
  uint64_t epoch = 0, random = 1;
  std::string error;
  char order_start = 0, order_end = 0, order_barrier[2] = {0, 0};
#ifdef EMULATOR_USES_UCONTEXT
  ucontext_t main;
#else
  void* main = nullptr;
#endif
  void *main_fake_stack = nullptr, *main_tsan = nullptr;
  const void* main_low = nullptr;
  size_t main_size = 0;
};

Machine& machine();
unsigned random_number(Machine& m);
inline size_t shadow_index(uint32_t address) { return (address - kWindow) >> 4; }
void warpgroup_operation(Machine& m, int warp_index, Op op);
std::string site(const char* file, int line);
void set_ready(Machine& m, int fiber);
void set_state(Machine& m, int fiber, State state);
void jump(Machine& m, int to, bool dying = false);  // to: a fiber, or -1 for the launcher
void schedule(Machine& m, bool dying = false);

}  // namespace emulator
