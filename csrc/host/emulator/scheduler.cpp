// Fibers: the switch, who runs next, block barriers, and the launch loop.
#include <cstdlib>

#include "host/emulator/machine.h"

#ifndef EMULATOR_USES_UCONTEXT
// Saves the callee-saved registers and swaps stacks. swapcontext would cost a signal-mask system call each time.
asm(R"(
.text
.weak emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulator_switch(void** save, void* to);
#endif

namespace emulator {

Machine& machine() {
  static thread_local Machine m;
  return m;
}
Config& config() { return machine().config; }
Stats& stats() { return machine().stats; }
const Here& here() { return machine().here; }
unsigned char* shared_base() { return machine().shared; }
size_t shared_size() { return machine().shared_size; }

unsigned random_number(Machine& m) {
  m.random ^= m.random << 13;
  m.random ^= m.random >> 7;
  m.random ^= m.random << 17;
  return unsigned(m.random >> 20);
}

std::string site(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

void jump(Machine& m, int to, [[maybe_unused]] bool dying) {
  const int from = m.current;
  if (from == to) return;
  ++m.stats.switches;
  m.current = to;
  if (to >= 0) m.here.thread = m.fibers[to].thread;
#ifdef EMULATOR_ASAN
  void** save = dying ? nullptr : from >= 0 ? &m.fibers[from].fake_stack : &m.main_fake_stack;
  __sanitizer_start_switch_fiber(save, to >= 0 ? m.fibers[to].stack.get() : m.main_low,
                                 to >= 0 ? m.config.stack : m.main_size);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(to >= 0 ? m.fibers[to].tsan : m.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_USES_UCONTEXT
  swapcontext(from >= 0 ? &m.fibers[from].context : &m.main, to >= 0 ? &m.fibers[to].context : &m.main);
#else
  emulator_switch(from >= 0 ? &m.fibers[from].stack_pointer : &m.main, to >= 0 ? m.fibers[to].stack_pointer : m.main);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from >= 0 ? m.fibers[from].fake_stack : m.main_fake_stack, nullptr, nullptr);
#endif
}

void set_ready(Machine& m, int fiber) {
  m.fibers[fiber].state = State::ready;
  m.warps[fiber >> 5].ready |= 1u << (fiber & 31);
}
void set_state(Machine& m, int fiber, State state) {
  m.fibers[fiber].state = state;
  m.warps[fiber >> 5].ready &= ~(1u << (fiber & 31));
}

namespace {

int pick_lane(Machine& m, unsigned ready) {
  if (m.config.order == Order::forward) return __builtin_ctz(ready);
  if (m.config.order == Order::reverse) return 31 - __builtin_clz(ready);
  int skip = random_number(m) % __builtin_popcount(ready);
  while (skip--) ready &= ready - 1;
  return __builtin_ctz(ready);
}

// A warp runs until it blocks, then the next one by order. Random: by priorities that are redrawn now and then.
int pick(Machine& m) {
  const int warps = int(m.warps.size());
  int best = -1;
  if (m.config.order == Order::random) {
    if (m.current >= 0 && random_number(m) % 64 == 0) m.warps[m.current >> 5].priority = random_number(m);
    for (int i = 0; i < warps; ++i)
      if (m.warps[i].ready && (best < 0 || m.warps[i].priority > m.warps[best].priority)) best = i;
  } else {
    const int mine = m.current >= 0 ? m.current >> 5 : -1;
    if (mine >= 0 && m.warps[mine].ready) best = mine;
    for (int i = 0; best < 0 && i < warps; ++i) {
      const int k = m.config.order == Order::forward ? i : warps - 1 - i;
      if (m.warps[k].ready) best = k;
    }
  }
  return best < 0 ? -1 : best * 32 + pick_lane(m, m.warps[best].ready);
}

// Everyone who still runs has arrived: checks that it is one barrier for all, and opens it.
void open_barrier(Machine& m) {
  const Fiber* first = nullptr;
  for (int i = 0; i < m.threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.state != State::in_block) continue;
    if (!first) first = &fiber;
    if (fiber.line != first->line)
      m.error = "divergent __syncthreads: " + site(first->file, first->line) + " and " + site(fiber.file, fiber.line);
  }
  if (m.done && first)
    m.error =
        "__syncthreads at " + site(first->file, first->line) + " after " + std::to_string(m.done) + " threads exited";
  if (!m.error.empty()) return;
  for (int i = 0; i < m.threads; ++i)
    if (m.fibers[i].state == State::in_block) set_ready(m, i);
  m.at_barrier = 0;
  ++m.epoch;
  ++m.stats.barriers;
  if (m.config.order == Order::random)
    for (auto& warp : m.warps) warp.priority = random_number(m);
}

void report_deadlock(Machine& m) {
  m.error = "deadlock:";
  for (auto& warp : m.warps)
    if (warp.arrived) {
      m.error += " a warp waits at " + site(warp.file, warp.line) + " for lanes that are elsewhere;";
      break;
    }
  for (int i = 0; i < m.threads; ++i)
    if (m.fibers[i].state == State::in_block) {
      m.error += " threads wait at barrier " + site(m.fibers[i].file, m.fibers[i].line);
      break;
    }
}

void entry() {
  Machine& m = machine();
#ifdef EMULATOR_ASAN
  const void* low;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &low, &size);
  if (!m.main_low) {  // the first fiber is always entered from the launcher
    m.main_low = low;
    m.main_size = size;
  }
#endif
  const int me = m.current;
  EMULATOR_ACQUIRE(&m.order_start);
  (*m.body)();
  EMULATOR_RELEASE(&m.order_end);
  set_state(m, me, State::done);
  m.warps[me >> 5].live &= ~(1u << (me & 31));
  ++m.done;
  schedule(m, true);
  __builtin_trap();
}

void prepare(Machine& m, int index) {
  Fiber& fiber = m.fibers[index];
  if (!fiber.stack) fiber.stack.reset(new char[m.config.stack]);
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(fiber.stack.get(), m.config.stack);
  fiber.fake_stack = nullptr;
#endif
#ifdef EMULATOR_TSAN
  if (!fiber.tsan) {
    fiber.tsan = __tsan_create_fiber(0);
    __tsan_set_fiber_name(fiber.tsan, ("cuda thread " + std::to_string(index)).c_str());
  }
#endif
#ifdef EMULATOR_USES_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = m.config.stack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  auto* top = reinterpret_cast<void**>((uintptr_t(fiber.stack.get()) + m.config.stack) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
  fiber.copies.clear();
  fiber.head = 0;
  fiber.group = 0;
  fiber.loads = 0;
  fiber.proxy_fences.clear();
  set_ready(m, index);
}

void run_block(Machine& m, dim3 at) {
  const dim3 b = m.here.block_dim;
  m.here.block = at;
  volatile unsigned char* s = m.shared;
  for (size_t i = 0; i < m.shared_size; ++i) s[i] = 0xff;  // NaN as bf16, fp16, tf32, fp32 and fp64
  m.shadow.assign(m.config.race ? (m.shared_size + 15) / 16 : 0, Cell{});
  for (auto& warp : m.warps) {
    warp = Warp{};
    warp.live = 0xffffffffu;
    warp.priority = random_number(m);
    const size_t index = &warp - m.warps.data();
    warp.wgmma.products = m.in_flight.data() + index * kInFlight;
    warp.wgmma.sums = m.sums.data() + index * 16 * kMostColumns;
  }
  for (auto& one : m.issued) one.number = 0;
  if (m.open_loads) {
    for (auto& load : m.loads) load.lanes = 0;
    m.open_loads = 0;
  }
  m.at_barrier = m.done = 0;
  m.epoch = 0;
  m.error.clear();
  m.current = -1;
  for (int i = 0; i < m.threads; ++i) {
    m.fibers[i].thread = dim3(i % b.x, i / b.x % b.y, i / (b.x * b.y));
    prepare(m, i);
  }
  EMULATOR_RELEASE(&m.order_start);
  ++m.stats.blocks;
  schedule(m);
  EMULATOR_ACQUIRE(&m.order_end);
  for (const auto& warp : m.warps)
    if (m.error.empty() && warp.wgmma.count)
      m.error = "wgmma at " + site(warp.wgmma.products[0].file, warp.wgmma.products[0].line) + " was never waited for";
  if (m.error.empty()) return;
  m.shared = nullptr;
  throw std::runtime_error("emulator: block (" + std::to_string(at.x) + "," + std::to_string(at.y) + "): " + m.error);
}

}  // namespace

void schedule(Machine& m, bool dying) {
  int next = pick(m);
  if (next < 0 && m.at_barrier && m.at_barrier + m.done == m.threads) {
    open_barrier(m);
    if (m.error.empty()) next = pick(m);
  }
  if (next < 0 && m.done < m.threads && m.error.empty()) report_deadlock(m);
  jump(m, m.error.empty() ? next : -1, dying);
}

void fail(const std::string& what, const char* file, int line) {
  Machine& m = machine();
  const auto t = m.here.thread;
  m.error = what + " at " + site(file, line) + ", thread (" + std::to_string(t.x) + "," + std::to_string(t.y) + "," +
            std::to_string(t.z) + ")";
  jump(m, -1);
  __builtin_trap();
}

void block_barrier(const char* file, int line) {
  Machine& m = machine();
  Fiber& me = m.fibers[m.current];
  [[maybe_unused]] const uint64_t epoch = m.epoch;
  me.file = file;
  me.line = line;
  EMULATOR_RELEASE(&m.order_barrier[epoch & 1]);
  set_state(m, m.current, State::in_block);
  ++m.at_barrier;
  schedule(m);
  EMULATOR_ACQUIRE(&m.order_barrier[epoch & 1]);
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine();
  m.threads = int(block.x * block.y * block.z);
  if (m.threads % 32 || m.threads > 1024) throw std::runtime_error("emulator: threads per block: 32, 64, ... 1024");
  if (int(m.fibers.size()) < m.threads) m.fibers.resize(m.threads);
  m.warps.assign(m.threads / 32, Warp{});
  if (m.loads.size() < m.warps.size() * kLoadWindow) m.loads.resize(m.warps.size() * kLoadWindow);
  m.in_flight.resize(m.warps.size() * kInFlight);
  m.sums.resize(m.warps.size() * 16 * kMostColumns);
  m.issued.resize(m.warps.size() / 4 * kInFlight);
  m.body = &body;
  m.here.block_dim = block;
  m.here.grid_dim = grid;
  m.random = 0x9E3779B97F4A7C15ull ^ (uint64_t(m.config.seed) * 0xD1B54A32D192ED03ull);
  ++m.stats.launches;
  void* raw = nullptr;  // exact size, so that ASan puts a red zone right behind it
  if (shared_bytes && posix_memalign(&raw, 128, shared_bytes)) throw std::bad_alloc();
  std::unique_ptr<void, void (*)(void*)> hold(raw, std::free);
  m.shared = static_cast<unsigned char*>(raw);
  m.shared_size = shared_bytes;
#ifdef EMULATOR_TSAN
  m.main_tsan = __tsan_get_current_fiber();
#endif
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t first = m.config.order == Order::random ? random_number(m) % blocks : 0;
  for (uint64_t i = 0; i < blocks; ++i) {  // results may not depend on which block comes first
    const uint64_t at = m.config.order == Order::forward ? i : (first + blocks - 1 - i) % blocks;
    run_block(m, dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)));
  }
  m.shared = nullptr;
  m.shared_size = 0;
}

}  // namespace emulator
