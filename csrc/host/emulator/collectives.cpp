// What a warp does together, computed once by the last lane to arrive: mma, ldmatrix, shuffles; and the shadow of
// shared memory with its race and bank-conflict checks.
#include "host/emulator/machine.h"
#include "pairs/numbers.h"

namespace emulator {
namespace {

typedef float Float8 __attribute__((vector_size(32)));

float low_half(Op op, uint32_t bits) {
  const auto h = static_cast<uint16_t>(bits & 0xffff);
  return op == Op::mma_bf16 ? medcl::bf16_to_float(medcl::Bf16{h}) : medcl::half_to_float(medcl::Half{h});
}
float tf32(uint32_t bits) { return medcl::bit_copy<float>(bits & 0xffffe000u); }  // the unit ignores the low 13 bits

// D = A B + C with the fragment maps of the PTX manual; exact products, fp32 sums in k order.
void mma(Warp& warp, Op op) {
  const bool wide = op == Op::mma_tf32;  // m16n8k8 with one element per register, else m16n8k16 with two
  const int depth = wide ? 8 : 16;
  float a[16][16];
  Float8 b[16], c[16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* slot = static_cast<MmaSlot*>(warp.slot[lane]);
    const int g = lane >> 2, t = lane & 3;
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r & 1), high = r >> 1;
      if (wide) {
        a[row][t + 4 * high] = tf32(slot->a[r]);
      } else {
        a[row][t * 2 + 8 * high] = low_half(op, slot->a[r]);
        a[row][t * 2 + 8 * high + 1] = low_half(op, slot->a[r] >> 16);
      }
      c[row][t * 2 + high] = slot->c[(r & 1) * 2 + high];
    }
    for (int r = 0; r < 2; ++r) {
      if (wide) {
        b[t + 4 * r][g] = tf32(slot->b[r]);
      } else {
        b[t * 2 + 8 * r][g] = low_half(op, slot->b[r]);
        b[t * 2 + 8 * r + 1][g] = low_half(op, slot->b[r] >> 16);
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    Float8 sum = c[i];
    for (int k = 0; k < depth; ++k) sum += a[i][k] * b[k];
    c[i] = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* out = static_cast<MmaSlot*>(warp.slot[lane])->c;
    const int g = lane >> 2, t = lane & 3;
    for (int r = 0; r < 4; ++r) out[r] = c[g + 8 * (r >> 1)][t * 2 + (r & 1)];
  }
}

void ldmatrix(Machine& m, Warp& warp, bool trans) {
  const auto slot = [&](int lane) { return static_cast<MatrixSlot*>(warp.slot[lane]); };
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r) {
      if (!trans) {
        slot(lane)->result[r] = slot(r * 8 + (lane >> 2))->row[lane & 3];
        continue;
      }
      const int column = lane >> 2, row = (lane & 3) * 2;
      const auto element = [&](int i) {
        const uint32_t pair = slot(r * 8 + i)->row[column >> 1];
        return column & 1 ? pair >> 16 : pair & 0xffff;
      };
      slot(lane)->result[r] = element(row) | element(row + 1) << 16;
    }
  for (int r = 0; r < 4; ++r) {  // modelled bank conflicts: 8 rows of 16 bytes against 8 groups of 4 banks
    int hits[8] = {}, worst = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t address = slot(r * 8 + i)->address;
      bool seen = false;
      for (int j = 0; j < i; ++j) seen |= slot(r * 8 + j)->address == address;
      if (!seen) worst = std::max(worst, ++hits[(address >> 4) & 7]);
    }
    m.stats.bank_conflicts += worst - 1;
  }
}

void shuffle(Warp& warp) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(warp.mask >> lane & 1)) continue;
    auto* slot = static_cast<ShuffleSlot*>(warp.slot[lane]);
    const bool named = warp.mask >> slot->source & 1;
    slot->result = named ? static_cast<ShuffleSlot*>(warp.slot[slot->source])->value : ~0ull;
  }
}

// A 4-, 8- or 16-byte load serves 32, 16 or 8 lanes at a time, one word per bank; equal words are broadcast.
int conflicts(const Load& load) {
  const int group = 128 / load.bytes;
  int extra = 0;
  for (int first = 0; first < 32; first += group) {
    int words[32] = {}, worst = 0;
    uint32_t known[32][32];
    for (int lane = first; lane < first + group; ++lane)
      for (int w = 0; w < load.bytes / 4; ++w) {
        const uint32_t word = load.address[lane] / 4 + w, bank = word % 32;
        bool seen = false;
        for (int i = 0; i < words[bank]; ++i) seen |= known[bank][i] == word;
        if (seen) continue;
        known[bank][words[bank]++] = word;
        worst = std::max(worst, words[bank]);
      }
    extra += worst - 1;
  }
  return extra;
}

}  // namespace

void warp_operation(Op op, void* slot, unsigned mask, const char* file, int line) {
  Machine& m = machine();
  const int me = m.current, lane = me & 31;
  Warp& warp = m.warps[me >> 5];
  ++m.stats.warp_operations;
  if (!(mask >> lane & 1)) fail("lane not in its own mask", file, line);
  if (op >= Op::ldmatrix && mask != 0xffffffffu) fail("mma, wgmma and ldmatrix need the full warp", file, line);
  if (warp.arrived && (warp.op != op || warp.mask != mask || warp.line != line))
    fail("divergent warp operation (other lanes are at " + site(warp.file, warp.line) + ")", file, line);
  if (mask & ~warp.live) fail("warp operation names lanes that have exited", file, line);
  if (!warp.arrived) {
    warp.op = op;
    warp.mask = mask;
    warp.file = file;
    warp.line = line;
  }
  if (op == Op::syncwarp) EMULATOR_RELEASE(&warp.order);
  warp.slot[lane] = slot;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    set_state(m, me, State::in_warp);
    schedule(m);
  } else {
    if (op >= Op::wgmma_fence) {
      warpgroup_operation(m, me >> 5, op);
    } else if (op >= Op::mma_bf16) {
      ++m.stats.mma;
      mma(warp, op);
    } else if (op >= Op::ldmatrix) {
      ++m.stats.ldmatrix;
      ldmatrix(m, warp, op == Op::ldmatrix_trans);
    } else if (op == Op::shuffle) {
      shuffle(warp);
    } else {
      ++warp.syncs;
    }
    warp.arrived = 0;
    for (unsigned rest = mask & ~(1u << lane); rest; rest &= rest - 1) set_ready(m, (me & ~31) | __builtin_ctz(rest));
  }
  if (op == Op::syncwarp) EMULATOR_ACQUIRE(&warp.order);
}

void touch(uint32_t address, Touch what, const char* file, int line) {
  Machine& m = machine();
  if (!m.config.race) return;
  const int me = m.current;
  Cell& cell = m.shadow[shadow_index(address)];
  const Access now{uint32_t(m.epoch) + 1, m.warps[me >> 5].syncs, me, line, file};
  const auto clash = [&](const Access& a) {  // same barrier interval, another thread, no __syncwarp between
    return a.thread >= 0 && a.epoch == now.epoch && a.thread != me &&
           !(a.thread >> 5 == me >> 5 && a.syncs < now.syncs);
  };
  const char* mine = what == Touch::read ? "read" : what == Touch::issue ? "cp.async issue" : "cp.async completion";
  const auto report = [&](const char* other, const Access& a) {
    fail(std::string("shared-memory race, no barrier between ") + other + " at " + site(a.file, a.line) +
             " by thread " + std::to_string(a.thread) + " and " + mine,
         file, line);
  };
  if (what != Touch::land && cell.pending >= 0)
    fail(std::string(mine) + " of a 16-byte cell whose cp.async (thread " + std::to_string(cell.pending) + ", " +
             site(cell.write.file, cell.write.line) + ") was never waited for",
         file, line);
  if (clash(cell.write)) report("write", cell.write);
  if (what == Touch::read) {
    const Access& first = cell.read[0];
    const bool free = first.thread < 0 || first.epoch != now.epoch || first.thread >> 5 == me >> 5;
    cell.read[free ? 0 : 1] = now;
    return;
  }
  for (const Access& read : cell.read)
    if (clash(read)) report("read", read);
  cell.write = now;
  cell.fences = m.fibers[me].proxy_fences.size();
  cell.pending = what == Touch::issue ? me : -1;
}

void count_load(uint32_t address, int bytes, const char* file, int line) {
  Machine& m = machine();
  const unsigned number = m.fibers[m.current].loads++;
  Load& load = m.loads[(m.current >> 5) * kLoadWindow + number % kLoadWindow];
  if (load.lanes == 0) {
    load.number = number;
    load.line = line;
    load.bytes = bytes;
    ++m.open_loads;
  }
  if (load.number != number || load.line != line || load.bytes != bytes) fail("divergent shared load", file, line);
  load.address[m.current & 31] = address;
  if (++load.lanes < 32) return;
  load.lanes = 0;
  --m.open_loads;
  ++m.stats.shared_loads;
  m.stats.bank_conflicts += conflicts(load);
}

Copy* push_copy() {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  ++m.stats.copies;
  fiber.copies.push_back(Copy{0, nullptr, 0, fiber.group, "", 0});
  return &fiber.copies.back();
}

void commit_copies() {
  Machine& m = machine();
  ++m.fibers[m.current].group;
}

bool pop_copy(int keep, Copy& out) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  if (fiber.head == fiber.copies.size() || fiber.copies[fiber.head].group >= fiber.group - keep) return false;
  out = fiber.copies[fiber.head++];
  if (fiber.head == fiber.copies.size()) {
    fiber.copies.clear();
    fiber.head = 0;
  }
  return true;
}

}  // namespace emulator
