// Races whose values come out right in a friendly order, to see that TSan reports them on the emulator.
//   race KIND ORDER
// KIND: none, warp (a broadcast without __syncwarp), block (one without __syncthreads), shuffle (a shuffle used as if
// it were a memory fence), reuse (a shared buffer without a barrier), global (an accumulation without atomics).
#include <cstdio>

#include "cuda/launch.cuh"

namespace {

enum Kind { kNone, kWarp, kBlock, kShuffle, kReuse, kGlobal };

void kernel(float* out, int kind) {
  MEDCL_SHARED(raw);
  float* s = reinterpret_cast<float*>(raw);
  const int t = threadIdx.x, warp = t / 32;
  if (t % 32 == 0) s[warp] = float(warp + 1);
  if (kind != kWarp && kind != kShuffle) __syncwarp();
  const float zero = kind == kShuffle ? __shfl_xor_sync(0xffffffffu, 0.f, 1) : 0.f;
  const float mine = s[warp] + zero;  // the own warp's value
  if (kind != kBlock) __syncthreads();
  const float first = s[0];  // warp 0's value
  if (kind != kReuse) __syncthreads();
  if (t == 255) s[0] = 7;
  out[t] = mine + first;
  if (kind == kGlobal) out[256] += 1;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string kinds[] = {"none", "warp", "block", "shuffle", "reuse", "global"};
  const std::string name = count > 1 ? arguments[1] : "none", order = count > 2 ? arguments[2] : "forward";
  int kind = 0;
  while (kind < kGlobal && kinds[kind] != name) ++kind;
  emulator::config().order = order == "forward"   ? emulator::Order::forward
                             : order == "reverse" ? emulator::Order::reverse
                                                  : emulator::Order::random;
  emulator::config().stack = 256 << 10;
  float out[257] = {};
  int wrong = 0;
  try {
    medcl::cuda::launch(kernel, 1, 256, 1024, nullptr, static_cast<float*>(out), kind);
  } catch (const std::exception& error) {
    std::printf("STOPPED %s\n", error.what());
    return 3;
  }
  for (int t = 0; t < 256; ++t) wrong += !(out[t] == float(t / 32 + 2));
  std::printf("%s: %d wrong\n", name.c_str(), wrong);
  return wrong ? 2 : 0;
}
