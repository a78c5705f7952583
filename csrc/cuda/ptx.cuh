// The only file that knows PTX, besides wgmma.cuh. Under nvcc: inline PTX. Under a host compiler: the same functions
// over the emulator (csrc/host/emulator), so that kernels run unchanged on a CPU. Shared addresses are 32 bits in both
// worlds: an offset into the shared window on the device, into the block's dynamic shared memory on the host.
#pragma once
#include <cstdint>

#include "pairs/numbers.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define MEDCL_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define MEDCL_DEVICE __device__ __forceinline__
#define MEDCL_GRID_CONSTANT __grid_constant__  // parameters whose address is taken stay where they are

namespace medcl::ptx {

MEDCL_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes, or 16 zero bytes when !ok (the source is then not read)
MEDCL_DEVICE void cp_async_16(uint32_t to, const void* from, bool ok) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(ok ? 16 : 0)
               : "memory");
}
MEDCL_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Keep>
MEDCL_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Keep) : "memory");
}

MEDCL_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
MEDCL_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
MEDCL_DEVICE uint32_t load_shared(uint32_t a) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(a) : "memory");
  return x;
}
MEDCL_DEVICE void load_shared(float (&r)[2], uint32_t a) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(r[0]), "=f"(r[1]) : "r"(a) : "memory");
}
MEDCL_DEVICE void load_shared(float (&r)[4], uint32_t a) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3])
               : "r"(a)
               : "memory");
}
// by some lanes of a warp only
MEDCL_DEVICE void load_shared_alone(float (&r)[4], uint32_t a) { load_shared(r, a); }

#define MEDCL_MMA(name, instruction)                                                      \
  MEDCL_DEVICE void name(float(&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
  }
MEDCL_MMA(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MEDCL_MMA(mma_fp16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
MEDCL_MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef MEDCL_MMA

// of memory that other threads change by atomics meanwhile
MEDCL_DEVICE int64_t load_relaxed(const int64_t* from) {
  int64_t x;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(x) : "l"(__cvta_generic_to_global(from)) : "memory");
  return x;
}

MEDCL_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
MEDCL_DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
MEDCL_DEVICE uint32_t to_tf32(float x) {  // to nearest, ties away from zero
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
MEDCL_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MEDCL_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MEDCL_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// never joined to one instruction, so that every kernel gets the same bits
MEDCL_DEVICE float add(float x, float y) { return __fadd_rn(x, y); }
MEDCL_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }
MEDCL_DEVICE int count_bits(uint64_t x) { return __popcll(static_cast<long long>(x)); }
MEDCL_DEVICE int highest_bit(uint64_t x) { return 63 - __clzll(static_cast<long long>(x)); }

}  // namespace medcl::ptx

#else
#include "host/emulator/emulator.h"
#define MEDCL_SHARED(name) unsigned char* name = emulator::shared_base()
#define MEDCL_DEVICE inline
#define MEDCL_GRID_CONSTANT

namespace medcl::ptx {

MEDCL_DEVICE uint32_t shared_address(const void* p) {
  return emulator::kWindow + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::shared_base());
}

MEDCL_DEVICE void cp_async_16(uint32_t to, const void* from, bool ok, EMULATOR_SITE) {
  unsigned char* cell = emulator::shared(to, 16, "cp.async", file, line);
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("cp.async: misaligned global address", file, line);
  emulator::Copy* copy = emulator::push_copy();
  copy->destination = to;
  copy->source = from;
  copy->bytes = ok ? 16 : 0;
  copy->file = file;
  copy->line = line;
  emulator::touch(to, emulator::Touch::issue, file, line);
  if (emulator::config().copies == emulator::CopyMode::eager)
    emulator::land(*copy);
  else
    std::memset(cell, 0xff, 16);  // poison until the wait
}
MEDCL_DEVICE void cp_async_commit() { emulator::commit_copies(); }
template <int Keep>
MEDCL_DEVICE void cp_async_wait() {
  for (emulator::Copy copy; emulator::pop_copy(Keep, copy);) {
    emulator::touch(copy.destination, emulator::Touch::land, copy.file, copy.line);
    if (emulator::config().copies == emulator::CopyMode::late) emulator::land(copy);
  }
}

MEDCL_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t a, emulator::Op op, const char* file, int line) {
  emulator::MatrixSlot slot;
  slot.address = a;
  const unsigned char* row = emulator::shared(a, 16, "ldmatrix", file, line);
  emulator::touch(a, emulator::Touch::read, file, line);
  std::memcpy(slot.row, row, 16);  // each lane reads the row that it names
  emulator::warp_operation(op, &slot, 0xffffffffu, file, line);
  std::memcpy(r, slot.result, 16);
}
MEDCL_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t a, EMULATOR_SITE) {
  ldmatrix(r, a, emulator::Op::ldmatrix, file, line);
}
MEDCL_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a, EMULATOR_SITE) {
  ldmatrix(r, a, emulator::Op::ldmatrix_trans, file, line);
}
MEDCL_DEVICE void read_shared(void* to, int bytes, uint32_t a, const char* file, int line) {
  const unsigned char* from = emulator::shared(a, bytes, "ld.shared", file, line);
  emulator::touch(a, emulator::Touch::read, file, line);
  std::memcpy(to, from, bytes);
}
MEDCL_DEVICE void load_shared(void* to, int bytes, uint32_t a, const char* file, int line) {
  emulator::count_load(a, bytes, file, line);
  read_shared(to, bytes, a, file, line);
}
MEDCL_DEVICE uint32_t load_shared(uint32_t a, EMULATOR_SITE) {
  uint32_t x;
  load_shared(&x, 4, a, file, line);
  return x;
}
MEDCL_DEVICE void load_shared(float (&r)[2], uint32_t a, EMULATOR_SITE) { load_shared(r, 8, a, file, line); }
MEDCL_DEVICE void load_shared(float (&r)[4], uint32_t a, EMULATOR_SITE) { load_shared(r, 16, a, file, line); }
MEDCL_DEVICE void load_shared_alone(float (&r)[4], uint32_t a, EMULATOR_SITE) { read_shared(r, 16, a, file, line); }

#define MEDCL_MMA(name)                                                                                  \
  MEDCL_DEVICE void name(float(&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1, EMULATOR_SITE) { \
    const uint32_t b[2] = {b0, b1};                                                                      \
    emulator::MmaSlot slot{a, b, c};                                                                     \
    emulator::warp_operation(emulator::Op::name, &slot, 0xffffffffu, file, line);                        \
  }
MEDCL_MMA(mma_bf16)
MEDCL_MMA(mma_fp16)
MEDCL_MMA(mma_tf32)
#undef MEDCL_MMA

MEDCL_DEVICE int64_t load_relaxed(const int64_t* from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }

MEDCL_DEVICE uint32_t pack_bf16(float low, float high) {
  return float_to_bf16(low).bits | static_cast<uint32_t>(float_to_bf16(high).bits) << 16;
}
MEDCL_DEVICE uint32_t pack_fp16(float low, float high) {
  return float_to_half(low).bits | static_cast<uint32_t>(float_to_half(high).bits) << 16;
}
MEDCL_DEVICE uint32_t to_tf32(float x) { return (bit_copy<uint32_t>(x) + 0x1000u) & 0xffffe000u; }
MEDCL_DEVICE float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.f : x; }  // .ftz
MEDCL_DEVICE float exp2(float x) { return flush(::exp2f(flush(x))); }
MEDCL_DEVICE float log2(float x) { return ::log2f(flush(x)); }
MEDCL_DEVICE float reciprocal(float x) { return flush(1.f / flush(x)); }
MEDCL_DEVICE float add(float x, float y) { return x + y; }
MEDCL_DEVICE float multiply(float x, float y) { return x * y; }
MEDCL_DEVICE int count_bits(uint64_t x) { return __builtin_popcountll(x); }
MEDCL_DEVICE int highest_bit(uint64_t x) { return 63 - __builtin_clzll(x); }

}  // namespace medcl::ptx
#endif
