// wgmma: what a warp has in flight of its warpgroup's products. Operands are found by their descriptors alone, by the
// rules of the PTX ISA (9.0, section 9.7.15), whatever the kernel meant to lay where. A warp computes its own 16 rows:
// hardware does not wait for the other three, which only have to issue the same products.
#include "host/emulator/machine.h"
#include "pairs/numbers.h"

namespace emulator {
namespace {

constexpr uint32_t kPoison = 0xffffffffu;  // what accumulators hold while products are in flight: NaN
constexpr int kDepth = 16;

// 9.7.15.5.1.2.2: fields without their last four bits, the others must be 0.
struct Descriptor {
  uint32_t start, leading, stride, base, mode;
  Descriptor(uint64_t bits, const char* file, int line)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base(bits >> 49 & 7),
        mode(static_cast<uint32_t>(bits >> 62)) {
    constexpr uint64_t known = 0xc00e3fff3fff3fffull;
    if (bits & ~known) fail("wgmma: reserved bits of a descriptor are set", file, line);
    if (base)
      fail("wgmma: a base offset is not modelled, swizzle patterns must begin at multiples of their size", file, line);
  }
  // Address of the 16 bytes with channels [8 chunk, 8 chunk + 8) of a row: canonical K-major layouts, 9.7.15.5.1.2.1.3.
  uint32_t at(int row, int chunk) const {
    const uint32_t group = static_cast<uint32_t>(row >> 3) * stride;
    if (mode == 0) return start + group + (row & 7) * 16 + chunk * leading;
    const int bits = mode == 1 ? 3 : mode == 2 ? 2 : 1;  // Swizzle<bits, 4, 3> of the address
    const uint32_t linear = start + group + (row & 7) * (16u << bits) + chunk * 16;
    return linear ^ (linear >> 7 & ((1u << bits) - 1)) << 4;
  }
};

struct Operand {
  Descriptor descriptor;
  int first, rows;
};

// Races with copies, and whether what was written before was handed over to the async proxy before a barrier.
void touch_operand(Machine& m, const Operand& x, const char* file, int line) {
  for (int row = x.first; row < x.first + x.rows; ++row)
    for (int chunk = 0; chunk < kDepth / 8; ++chunk) {
      const uint32_t address = x.descriptor.at(row, chunk);
      shared(address, 16, "wgmma", file, line);
      if (!m.config.race) continue;
      touch(address, Touch::read, file, line);
      const Cell& cell = m.shadow[shadow_index(address)];
      if (cell.write.thread < 0) continue;
      const auto& fences = m.fibers[cell.write.thread].proxy_fences;
      if (fences.size() <= cell.fences || fences[cell.fences] >= m.epoch)
        fail("wgmma reads what was written at " + site(cell.write.file, cell.write.line) + " by thread " +
                 std::to_string(cell.write.thread) + " without fence.proxy.async before a barrier",
             file, line);
    }
}

void load_operand(const Operand& x, bool bf16, float* to, int row_stride, int depth_stride, const char* file,
                  int line) {
  for (int row = 0; row < x.rows; ++row)
    for (int chunk = 0; chunk < kDepth / 8; ++chunk) {
      uint16_t bits[8];
      std::memcpy(bits, shared(x.descriptor.at(x.first + row, chunk), 16, "wgmma", file, line), 16);
      for (int k = 0; k < 8; ++k)
        to[row * row_stride + (chunk * 8 + k) * depth_stride] =
            bf16 ? medcl::bf16_to_float(medcl::Bf16{bits[k]}) : medcl::half_to_float(medcl::Half{bits[k]});
    }
}

// The oldest product that has not been made: now its operands are read.
void make(Machine& m, int warp_index) {
  Warpgroup& w = m.warps[warp_index].wgmma;
  const InFlight p = w.products[w.made++];
  const Operand a{Descriptor(p.a, p.file, p.line), 16 * (warp_index % 4), 16};
  const Operand b{Descriptor(p.b, p.file, p.line), 0, w.columns};
  touch_operand(m, a, p.file, p.line);
  touch_operand(m, b, p.file, p.line);
  const bool bf16 = p.op == Op::wgmma_bf16;
  float rows[16 * kDepth];
  float columns[kDepth * kMostColumns];  // (depth, columns)
  load_operand(a, bf16, rows, kDepth, 1, p.file, p.line);
  load_operand(b, bf16, columns, 1, w.columns, p.file, p.line);
  for (int i = 0; i < 16; ++i) {
    float* sum = w.sums + i * w.columns;
    if (!p.add)
      for (int j = 0; j < w.columns; ++j) sum[j] = 0.f;
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < w.columns; ++j) sum[j] += rows[i * kDepth + k] * columns[k * w.columns + j];
  }
}

// f(register, sum) for all accumulators: those of lane (g, t) are rows g and g + 8, columns 2t and 2t + 1 of every 8.
template <class F>
void each_accumulator(Warpgroup& w, F&& f) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < w.columns / 2; ++i) {
      const int row = (lane >> 2) + 8 * (i >> 1 & 1), column = i / 4 * 8 + (lane & 3) * 2 + (i & 1);
      f(w.registers[lane][i], w.sums[row * w.columns + column]);
    }
}

void check_the_others(Machine& m, int warp_index, const InFlight& p) {
  if (m.threads % 128) fail("wgmma needs whole warpgroups of 128 threads", p.file, p.line);
  const int64_t number = ++m.warps[warp_index].wgmma.issued;
  Issued& issued = m.issued[warp_index / 4 * kInFlight + number % kInFlight];
  if (issued.number > number) fail("wgmma: a warp is too far behind the others of its warpgroup", p.file, p.line);
  if (issued.number < number) issued = {number, p};
  const InFlight& first = issued.product;
  if (first.op != p.op || first.a != p.a || first.b != p.b || first.add != p.add || first.line != p.line)
    fail("the warps of a warpgroup issue different wgmma (another one: " + site(first.file, first.line) + ")", p.file,
         p.line);
}

void issue(Machine& m, int warp_index, Op op) {
  Warp& warp = m.warps[warp_index];
  Warpgroup& w = warp.wgmma;
  const auto slot = [&](int lane) { return static_cast<WgmmaSlot*>(warp.slot[lane]); };
  const WgmmaSlot& own = *slot(0);
  for (int lane = 1; lane < 32; ++lane)
    if (slot(lane)->a != own.a || slot(lane)->b != own.b || slot(lane)->add != own.add)
      fail("wgmma: lanes of a warp have different descriptors", warp.file, warp.line);
  const InFlight p{op, own.a, own.b, own.add, w.group, warp.file, warp.line};
  check_the_others(m, warp_index, p);
  if (w.count == kInFlight || own.columns > kMostColumns) fail("wgmma: too many for the model", warp.file, warp.line);
  if (w.count == 0) {
    if (!w.fenced) fail("wgmma without wgmma.fence since its accumulators could last be touched", warp.file, warp.line);
    w.columns = own.columns;
    for (int lane = 0; lane < 32; ++lane) w.registers[lane] = slot(lane)->d;
    each_accumulator(w, [](float& x, float& sum) {
      sum = x;
      x = medcl::bit_copy<float>(kPoison);
    });
  } else {
    for (int lane = 0; lane < 32; ++lane)
      if (w.registers[lane] != slot(lane)->d)
        fail("wgmma: several accumulators in flight are not modelled", warp.file, warp.line);
  }
  w.products[w.count++] = p;
  // operands may be read at any time from here on
  touch_operand(m, {Descriptor(p.a, p.file, p.line), 16 * (warp_index % 4), 16}, p.file, p.line);
  touch_operand(m, {Descriptor(p.b, p.file, p.line), 0, w.columns}, p.file, p.line);
  const bool eager = m.config.copies == CopyMode::eager;
  while (w.made < w.count && (eager || (m.config.order == Order::random && random_number(m) % 4 == 0)))
    make(m, warp_index);
}

void wait(Machine& m, int warp_index) {
  Warp& warp = m.warps[warp_index];
  Warpgroup& w = warp.wgmma;
  const int keep = *static_cast<int*>(warp.slot[0]);
  int done = 0;
  while (done < w.count && w.products[done].group < w.group - keep) ++done;
  while (w.made < done) make(m, warp_index);
  if (w.count == 0 || done < w.count) return;  // the accumulators are still in flight
  each_accumulator(w, [&](float& x, float& sum) {
    if (medcl::bit_copy<uint32_t>(x) != kPoison)
      fail("accumulators were written while a wgmma was in flight", warp.file, warp.line);
    x = sum;
  });
  w.count = w.made = 0;
  w.fenced = false;
}

}  // namespace

void warpgroup_operation(Machine& m, int warp_index, Op op) {
  Warpgroup& w = m.warps[warp_index].wgmma;
  if (op == Op::wgmma_fence) {
    w.fenced = true;
  } else if (op == Op::wgmma_commit) {
    ++w.group;
  } else if (op == Op::wgmma_wait) {
    wait(m, warp_index);
  } else {
    ++m.stats.wgmma;
    issue(m, warp_index, op);
  }
}

void fence_proxy_async() {
  Machine& m = machine();
  m.fibers[m.current].proxy_fences.push_back(m.epoch);
}

}  // namespace emulator
