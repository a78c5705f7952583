// mitigate_rows on the GPU (medcl_kernels/reference/mitigate_rows.py). A block has 32 rows: tiles of their channels in
// shared memory, whichever axis is contiguous, give the Gram matrices; one thread per row turns a matrix into weights;
// the gradients are read once more for the weighted sum.
#include "cuda/packed.cuh"

namespace medcl::cuda {
namespace {

constexpr int kBlockRows = kPackRows, kBlockThreads = kPackThreads, kBlockParts = kPackParts;
constexpr int kMostPairs = kPerspectives * (kPerspectives + 1) / 2;

struct MitigateArguments {
  Stack x;
  Rows out;
  Combination how;
  const int64_t* order;
  double *partial, *weights;  // unit "flat": (blocks, M, M) and (M)
  double plain;               // weight of every gradient where there are no others

  __device__ int count() const { return static_cast<int>(x.count); }
  __host__ __device__ int64_t rows() const { return x.rows.batch * x.rows.length; }
};

struct MitigateMemory {
  double *gram, *weights;  // (rows, M, M), (rows, M)
  int64_t* from;           // (rows): offsets
  Combination* how;
  float (*tile)[kBlockRows + 1];  // (M, channels, rows)
  static size_t bytes(int64_t m) {
    return sizeof(double) * kBlockRows * (m * m + m) + sizeof(int64_t) * kBlockRows + sizeof(Combination) +
           sizeof(float) * m * kBlockRows * (kBlockRows + 1);
  }
  MEDCL_DEVICE MitigateMemory(unsigned char* memory, int m) {
    gram = reinterpret_cast<double*>(memory);
    weights = gram + kBlockRows * m * m;
    from = reinterpret_cast<int64_t*>(weights + kBlockRows * m);
    how = reinterpret_cast<Combination*>(from + kBlockRows);
    tile = reinterpret_cast<float(*)[kBlockRows + 1]>(how + 1);
  }
};

MEDCL_DEVICE int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * kBlockRows; }

// Gram matrices of the block's rows; rows past the end have zeros.
MEDCL_DEVICE void gram_of_rows(const MitigateArguments& a, const MitigateMemory& s) {
  const int m = a.count(), pairs = m * (m + 1) / 2;
  const int own = threadIdx.x % kBlockRows, part = threadIdx.x / kBlockRows;
  if (part == 0) s.from[own] = first_row() + own < a.rows() ? row_offset(a.x.rows, 0, first_row() + own) : -1;
  __syncthreads();
  float sum[(kMostPairs + kBlockParts - 1) / kBlockParts] = {};
  for (int c0 = 0; c0 < a.x.rows.dim; c0 += kBlockRows) {
    for (int i = threadIdx.x; i < m * kBlockRows * kBlockRows; i += kBlockThreads) {
      const TileElement e(i % (kBlockRows * kBlockRows), a.x.rows.stride_d == 1);
      const int g = i / (kBlockRows * kBlockRows), channel = c0 + e.channel;
      const bool in = channel < a.x.rows.dim && s.from[e.row] >= 0;
      s.tile[g * kBlockRows + e.channel][e.row] =
          in ? load_element(a.x.rows, s.from[e.row] + g * a.x.stride_m + channel * a.x.rows.stride_d) : 0.f;
    }
    __syncthreads();
    int first = 0, second = 0;
#pragma unroll
    for (int k = 0; k < kMostPairs; ++k) {  // pairs (first, second), second <= first
      if (k < pairs && k % kBlockParts == part)
        for (int c = 0; c < kBlockRows; ++c)
          sum[k / kBlockParts] =
              fmaf(s.tile[first * kBlockRows + c][own], s.tile[second * kBlockRows + c][own], sum[k / kBlockParts]);
      if (++second > first) {
        ++first;
        second = 0;
      }
    }
    __syncthreads();
  }
  int first = 0, second = 0;
#pragma unroll
  for (int k = 0; k < kMostPairs; ++k) {
    double* gram = s.gram + own * m * m;
    if (k < pairs && k % kBlockParts == part)
      gram[first * m + second] = gram[second * m + first] = sum[k / kBlockParts];
    if (++second > first) {
      ++first;
      second = 0;
    }
  }
  __syncthreads();
}

MEDCL_DEVICE void load_combination(const MitigateArguments& a, Combination* how) {
  *how = a.how;
  const int others = a.count() - 1;
  for (int e = 0; a.order && e < a.count() * others; ++e)
    how->order[e / others][e % others] = static_cast<int8_t>(a.order[e]);
}

// out = f(values of one element of all gradients, its row in the block)
template <class F>
MEDCL_DEVICE void combine(const MitigateArguments& a, F&& f) {
  for (int64_t c0 = 0; c0 < a.x.rows.dim; c0 += kBlockRows)
    for (int i = threadIdx.x; i < kBlockRows * kBlockRows; i += kBlockThreads) {
      const TileElement e(i, a.x.rows.stride_d == 1);
      const int64_t channel = c0 + e.channel, row = first_row() + e.row;
      if (channel >= a.x.rows.dim || row >= a.rows()) continue;
      const int64_t at = row_offset(a.x.rows, 0, row) + channel * a.x.rows.stride_d;
      const auto value = [&](int g) { return load_element(a.x.rows, at + g * a.x.stride_m); };
      store_element(a.out, row_offset(a.out, 0, row) + channel * a.out.stride_d, f(value, e.row));
    }
}

__global__ void __launch_bounds__(kBlockThreads, 1)
    mitigate_rows_kernel(const MEDCL_GRID_CONSTANT MitigateArguments a) {
  MEDCL_SHARED(memory);
  const int m = a.count();
  const MitigateMemory s(memory, m);
  if (threadIdx.x == 0) load_combination(a, s.how);
  gram_of_rows(a, s);
  if (threadIdx.x < kBlockRows) combination_weights(*s.how, s.gram + threadIdx.x * m * m, s.weights + threadIdx.x * m);
  __syncthreads();
  combine(a, [&](auto&& value, int row) {
    float sum = 0.f;
    for (int g = 0; g < m; ++g) sum = fmaf(static_cast<float>(s.weights[row * m + g]), value(g), sum);
    return sum;
  });
}

__global__ void __launch_bounds__(kBlockThreads) flat_gram_kernel(const MEDCL_GRID_CONSTANT MitigateArguments a) {
  MEDCL_SHARED(memory);
  const int m = a.count();
  const MitigateMemory s(memory, m);
  gram_of_rows(a, s);
  if (threadIdx.x >= m * m) return;
  double sum = 0;
  for (int row = 0; row < kBlockRows; ++row) sum += s.gram[row * m * m + threadIdx.x];
  a.partial[static_cast<int64_t>(blockIdx.x) * m * m + threadIdx.x] = sum;
}

// One block: the blocks' matrices, added up in their order, and the weights.
__global__ void __launch_bounds__(kBlockThreads, 1)
    flat_weights_kernel(const MEDCL_GRID_CONSTANT MitigateArguments a, int64_t blocks) {
  MEDCL_SHARED(memory);
  const int m = a.count(), entries = m * m, parts = kBlockThreads / (kPerspectives * kPerspectives);
  const MitigateMemory s(memory, m);
  const int entry = threadIdx.x / parts, part = threadIdx.x % parts;
  double sum = 0;
  if (entry < entries)
    for (int64_t block = part; block < blocks; block += parts) sum += a.partial[block * entries + entry];
#pragma unroll
  for (int step = 1; step < parts; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (entry < entries && part == 0) s.gram[entry] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  load_combination(a, s.how);
  combination_weights(*s.how, s.gram, a.weights);
}

__global__ void __launch_bounds__(kBlockThreads) weighted_sum_kernel(const MEDCL_GRID_CONSTANT MitigateArguments a) {
  combine(a, [&](auto&& value, int) {
    float sum = 0.f;
    for (int g = 0; g < a.count(); ++g)
      sum = fmaf(static_cast<float>(a.weights ? a.weights[g] : a.plain), value(g), sum);
    return sum;
  });
}

// The mean of the M numbers where none has the opposite sign of another.
__global__ void __launch_bounds__(kBlockThreads) consensus_kernel(const MEDCL_GRID_CONSTANT MitigateArguments a) {
  combine(a, [&](auto&& value, int) {
    float sum = 0.f;
    bool above = false, below = false;
    for (int g = 0; g < a.count(); ++g) {
      const float v = value(g);
      sum += v;
      above |= v > 0.f;
      below |= v < 0.f;
    }
    return above && below ? 0.f : sum * static_cast<float>(a.plain);
  });
}

}  // namespace

void mitigate_rows(Workspace& w, const Stack& gradients, const Mitigation& o, const Rows& out) {
  MitigateArguments a{};
  a.x = gradients;
  a.out = out;
  a.how = o.how;
  a.order = o.order;
  const int64_t blocks = (a.rows() + kBlockRows - 1) / kBlockRows, m = gradients.count;
  const auto run = [&](void (*kernel)(MitigateArguments), bool shared) {
    launch(kernel, blocks, kBlockThreads, shared ? MitigateMemory::bytes(m) : 0, w.stream, a);
  };
  a.plain = o.method == Method::sum ? 1.0 : (o.method == Method::mean ? 1.0 : o.how.factor) / static_cast<double>(m);
  if (o.method == Method::consensus) return run(consensus_kernel, false);
  if (o.method == Method::mean || o.method == Method::sum || m == 1) return run(weighted_sum_kernel, false);
  if (!o.flat) return run(mitigate_rows_kernel, true);
  a.partial = w.take<double>(blocks * m * m);
  a.weights = w.take<double>(m);
  run(flat_gram_kernel, true);
  launch(flat_weights_kernel, 1, kBlockThreads, MitigateMemory::bytes(m), w.stream, a, blocks);
  run(weighted_sum_kernel, false);
}

}  // namespace medcl::cuda
