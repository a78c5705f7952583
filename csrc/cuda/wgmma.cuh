// Row statistics of 16-bit rows on Hopper's warpgroup instructions (sm_90a): the loop and the epilogues are those of
// the engine, only tiles lie otherwise and products are made otherwise. Off unless a call asks for it (Options::wgmma).
// What is said of wgmma here is in the PTX ISA (9.0), 9.7.15 "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
#pragma once
#include "cuda/sides.cuh"

#ifdef __CUDACC__
namespace medcl::ptx {

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = false;
#else
constexpr bool kHasWgmma = true;
#endif

// cp.async writes through the generic proxy, wgmma reads through the async proxy (9.7.15.4)
MEDCL_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler may move neither reads nor writes of the accumulators past this point.
MEDCL_DEVICE void pin(float (&d)[16][4]) {
#pragma unroll
  for (int n = 0; n < 16; ++n) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
MEDCL_DEVICE void wgmma_fence(float (&d)[16][4]) {
  pin(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
MEDCL_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Keep>
MEDCL_DEVICE void wgmma_wait(float (&d)[16][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Keep) : "memory");
  pin(d);
}

#define MEDCL_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
// d = a b^T + (add ? d : 0), 64 x 128 x 16, both from shared memory along their channels (transpose flags 0)
#define MEDCL_WGMMA(name, types)                                                                                       \
  MEDCL_DEVICE void name(float(&d)[16][4], uint64_t a, uint64_t b, bool add) {                                         \
    asm volatile(                                                                                                      \
        "{\n"                                                                                                          \
        ".reg .pred add;\n"                                                                                            \
        "setp.ne.b32 add, %66, 0;\n"                                                                                   \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                                           \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"     \
        "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,"     \
        "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, add, 1, 1, 0, 0;\n"                                       \
        "}"                                                                                                            \
        : MEDCL_FOUR(0), MEDCL_FOUR(1), MEDCL_FOUR(2), MEDCL_FOUR(3), MEDCL_FOUR(4), MEDCL_FOUR(5), MEDCL_FOUR(6),     \
          MEDCL_FOUR(7), MEDCL_FOUR(8), MEDCL_FOUR(9), MEDCL_FOUR(10), MEDCL_FOUR(11), MEDCL_FOUR(12), MEDCL_FOUR(13), \
          MEDCL_FOUR(14), MEDCL_FOUR(15)                                                                               \
        : "l"(a), "l"(b), "r"(static_cast<int>(add))                                                                   \
        : "memory");                                                                                                   \
  }
MEDCL_WGMMA(wgmma_bf16, "bf16.bf16")
MEDCL_WGMMA(wgmma_fp16, "f16.f16")
#undef MEDCL_WGMMA
#undef MEDCL_FOUR

}  // namespace medcl::ptx

#else
namespace medcl::ptx {

constexpr bool kHasWgmma = true;

MEDCL_DEVICE void fence_proxy_async() { emulator::fence_proxy_async(); }
MEDCL_DEVICE void wgmma_fence(float (&)[16][4], EMULATOR_SITE) {
  emulator::warp_operation(emulator::Op::wgmma_fence, nullptr, 0xffffffffu, file, line);
}
MEDCL_DEVICE void wgmma_commit(EMULATOR_SITE) {
  emulator::warp_operation(emulator::Op::wgmma_commit, nullptr, 0xffffffffu, file, line);
}
template <int Keep>
MEDCL_DEVICE void wgmma_wait(float (&)[16][4], EMULATOR_SITE) {
  int keep = Keep;
  emulator::warp_operation(emulator::Op::wgmma_wait, &keep, 0xffffffffu, file, line);
}
#define MEDCL_WGMMA(name)                                                                     \
  MEDCL_DEVICE void name(float(&d)[16][4], uint64_t a, uint64_t b, bool add, EMULATOR_SITE) { \
    emulator::WgmmaSlot slot{a, b, d[0], 128, add};                                           \
    emulator::warp_operation(emulator::Op::name, &slot, 0xffffffffu, file, line);             \
  }
MEDCL_WGMMA(wgmma_bf16)
MEDCL_WGMMA(wgmma_fp16)
#undef MEDCL_WGMMA

}  // namespace medcl::ptx
#endif

namespace medcl::cuda {

// Two warpgroups own 64 rows each. The accumulator of m64nNk16 gives a warp 16 rows in the layout of m16n8
// (9.7.15.5.1.1: the same fragment, N / 8 times), so the engine's Lane and Scores are right as they stand. Copies are
// cp.async as in the engine, not TMA, which would need tensor maps made through the driver for every call.
template <class Product_, int Slab_, int Stages_>
struct WgmmaTile : Tile<Product_, Slab_, 8, 1, 128, Stages_, true> {
  using Base = Tile<Product_, Slab_, 8, 1, 128, Stages_, true>;
  using Base::kPitch;
  using typename Base::Product;
  using typename Base::Scores;
  static constexpr bool kWgmma = true;
  static constexpr int kAtom = 1024, kAlign = kAtom;  // 8 rows of 128 bytes: what the 128-byte swizzle repeats after
  static constexpr int kMinBlocks = 2;                // one multiplies while the other counts
  static constexpr int kMostThreads = ptx::kHasWgmma ? Base::kThreads : 1;

  // Canonical K-major layout with 128-byte swizzle (9.7.15.5.1.2.1.3, Swizzle<3, 4, 3>): 16-byte chunk ^ row within an
  // atom. Atoms of the same 8 rows stand together, so that one stride serves tiles of any number of rows.
  static MEDCL_DEVICE uint32_t at(int row, int chunk) {
    return static_cast<uint32_t>((row >> 3) * 8 * kPitch + (chunk >> 3) * kAtom + (row & 7) * 128 +
                                 (((chunk ^ row) & 7) << 4));
  }
  static MEDCL_DEVICE void publish_copies() { ptx::fence_proxy_async(); }

  // 9.7.15.5.1.2.2: start address in bits 0-13, leading offset in 16-29 (1: swizzled layouts do not use it), stride
  // offset, from 8 rows to the next 8, in 32-45, each without its last four bits; base offset 0, since atoms begin at
  // multiples of their size; 128-byte swizzle: 1 in 62-63.
  static MEDCL_DEVICE uint64_t descriptor(uint32_t address) {
    constexpr uint64_t fixed = static_cast<uint64_t>(1) << 62 | static_cast<uint64_t>(8 * kPitch >> 4) << 32 | 1 << 16;
    return fixed | (address & 0x3ffff) >> 4;
  }

  // s = <owned row, streamed row>: depth 16 at a time, four such steps within an atom. Addresses are swizzled after the
  // step has been added, so a step moves the start address only.
  static MEDCL_DEVICE void set_scores(uint32_t owned, uint32_t streamed, const Lane& l, Scores& s) {
    const uint64_t a = descriptor(owned + (l.warp >> 2) * 64 * kPitch), b = descriptor(streamed);  // of the warpgroup
    ptx::wgmma_fence(s[0]);
#pragma unroll
    for (int k = 0; k < Base::kSteps; ++k) {
      const uint64_t step = ((k >> 2) * kAtom + (k & 3) * 32) >> 4;
      if constexpr (std::is_same_v<Product, Bf16Product>)
        ptx::wgmma_bf16(s[0], a + step, b + step, k > 0);
      else
        ptx::wgmma_fp16(s[0], a + step, b + step, k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(s[0]);
  }
};

template <class T, template <class> class Epilogue>
void run_wgmma_tile(const Pairs& p, const typename Epilogue<T>::Arguments& a, void* stream) {
#ifdef __CUDACC__
  cudaFuncAttributes kernel{};
  const cudaError_t error = cudaFuncGetAttributes(&kernel, pair_kernel<T, Epilogue<T>>);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  if (kernel.maxThreadsPerBlock < T::kThreads)
    throw std::runtime_error("wgmma needs compute capability 9.0 and a library built for 90a: unset MEDCL_CUDA_WGMMA");
#endif
  run_pairs<T, Epilogue>(p, a, false, stream);
}

template <class P, template <class> class Epilogue, class Arguments>
void run_wgmma(const Packed& owned, const Pairs& p, const Arguments& a, void* stream) {
  if (owned.pitch == 64)
    run_wgmma_tile<WgmmaTile<P, 64, 3>, Epilogue>(p, a, stream);
  else
    run_wgmma_tile<WgmmaTile<P, 128, 2>, Epilogue>(p, a, stream);
}

// Row statistics of the query's rows, by wgmma where the call asks for it and there is a tile.
template <template <class> class Epilogue, class Arguments>
void run_row_statistic(const PackedSides& s, const Pairs& p, const Arguments& a) {
  const Packed& owned = s.query;
  if (s.o.wgmma && owned.pitch <= 128) {
    if (owned.product == Product::bf16) return run_wgmma<Bf16Product, Epilogue>(owned, p, a, s.w.stream);
    if (owned.product == Product::fp16) return run_wgmma<Fp16Product, Epilogue>(owned, p, a, s.w.stream);
  }
  run_statistic<Epilogue>(owned, p, a, s.w.stream);
}

}  // namespace medcl::cuda
