// pair_topk on the GPU (medcl_kernels/reference/pair_topk.py), exactly, in O(N + k) memory. Every sweep makes all
// scores again, with the same bits:
//
//   1. Histograms of the next 11 bits of the scores that agree with what is known of their cell's k-th score, in shared
//      memory, with integer atomics; a warp per cell finds the bits of the k-th. Three times: its 31 bits are known,
//      and how many scores equal to it are kept. Where a tile has many cells (scope "anchor") fewer bits at a time.
//   2. How many scores of each row are above, how many equal. Prefix sums over rows say which equal ones are kept,
//      the first in the order of i * N + j, and where each row's pairs begin in the list.
//   3. Every row writes its pairs in the order of its columns.
//
// Counts decide everything, and integer sums do not depend on the order of threads: the same bits every run.
#include "cuda/pair_select.cuh"

namespace medcl::cuda {
namespace {

constexpr int kScoreBits = 31;  // no sign

struct Cells {
  const int64_t* k;
  int64_t* left;  // how many are still to be found
  uint32_t* prefix;
  float* threshold;
  int64_t count;
};

__global__ void start_kernel(Cells c) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= c.count) return;
  const bool any = c.k[i] > 0;
  c.left[i] = any ? c.k[i] : 0;
  c.prefix[i] = any ? 0 : kDecided;
  c.threshold[i] = any ? 0.f : INFINITY;
}

constexpr int kWarpsPerBlock = 4;

// A warp per cell: the next digit of its k-th score, from the largest down.
__global__ void digit_kernel(Cells c, const unsigned long long* histogram, int digit_bits, bool first, bool last) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + (threadIdx.x >> 5);
  if (cell >= c.count || c.prefix[cell] == kDecided) return;  // a whole warp
  const int lane = threadIdx.x & 31, bins = 1 << digit_bits, each = bins < 32 ? 1 : bins / 32;
  const unsigned long long* own = histogram + cell * bins;
  const int top = bins - lane * each;  // this lane's bins are [top - each, top)
  int64_t sum = 0;
  for (int bin = top - 1; bin >= top - each && bin >= 0; --bin) sum += static_cast<int64_t>(own[bin]);
  int64_t up_to = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_sync(0xffffffffu, up_to, lane >= step ? lane - step : lane);
    up_to += lane >= step ? other : 0;
  }
  const int64_t total = __shfl_sync(0xffffffffu, up_to, 31), wanted = c.left[cell];
  const uint32_t prefix = c.prefix[cell];
  __syncwarp();
  if (first && total <= wanted) {  // no more than k: all of them, above a threshold of 0
    if (lane == 0) {
      c.prefix[cell] = kDecided;
      c.left[cell] = 0;
    }
    return;
  }
  int64_t above = up_to - sum;
  if (!(above < wanted && wanted <= up_to)) return;
  int bin = top - 1;
  while (above + static_cast<int64_t>(own[bin]) < wanted) above += static_cast<int64_t>(own[bin--]);
  const uint32_t bits = prefix << digit_bits | static_cast<uint32_t>(bin);
  c.left[cell] = wanted - above;
  c.prefix[cell] = bits;
  if (last) c.threshold[cell] = score_of(bits, float());
}

constexpr int kScanThreads = 256;

// sums[i] = values[0] + ... + values[i - 1] for i = 0 ... n; a block per list of n values
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const int32_t* values, int64_t n, int64_t* sums) {
  MEDCL_SHARED(memory);
  auto* part = reinterpret_cast<int64_t*>(memory);
  values += blockIdx.x * n;
  sums += blockIdx.x * (n + 1);
  const int64_t each = (n + kScanThreads - 1) / kScanThreads, first = threadIdx.x * each;
  const int64_t end = first + each < n ? first + each : n;
  int64_t sum = 0;
  for (int64_t i = first; i < end; ++i) sum += values[i];
  part[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int k = 0; k < static_cast<int>(threadIdx.x); ++k) sum += part[k];
  for (int64_t i = first; i < end; ++i) {
    sums[i] = sum;
    sum += values[i];
  }
  if (threadIdx.x == kScanThreads - 1) sums[n] = sum;
}

struct ShareArguments {
  Units units;
  int64_t rows, count, padded;  // of all groups; of one
  const int32_t *above, *ties;  // (classes, rows)
  const int64_t *ties_before, *left;
  bool list;
  Share* shares;
  int32_t* totals;   // (rows)
  unsigned* needed;  // per 64 padded rows
};

__global__ void share_kernel(ShareArguments a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= a.rows) return;
  int32_t total = 0;
  bool closes = false;
  for (int k = 0; k < a.units.classes; ++k) {
    const int64_t* before = a.ties_before + k * (a.rows + 1);
    const int64_t ties = a.ties[k * a.rows + row], open = a.left[a.units.cell(row, k == 0)] -
                                                          (before[row] - before[a.units.of(row) * a.units.rows_each]);
    const int64_t mine = open < 0 ? 0 : open < ties ? open : ties;
    a.shares[k * a.rows + row] = {static_cast<int32_t>(mine), mine > 0 && mine == open};
    total += a.above[k * a.rows + row] + static_cast<int32_t>(mine);
    closes |= mine > 0 && mine == open;
  }
  a.totals[row] = total;
  if (a.list ? total > 0 : closes) atomicMax(a.needed + (row / a.count * a.padded + row % a.count) / 64, 1u);
}

__global__ void tail_kernel(SelectedPairs to, const int64_t* total) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < *total || i >= to.capacity) return;
  to.anchor[i] = to.candidate[i] = -1;
  to.gradient[i] = 0.f;
}

int tile_units(const PackedSides& s, const Filter& f) {
  if (f.scope == Scope::anchor) return kMostTileRows;
  if (f.scope == Scope::global || !s.o.across) return 1;
  const int64_t most = (kMostTileRows - 2) / s.query.length + 2;
  return static_cast<int>(
      most < s.query.groups * s.query.count / s.query.length ? most : s.query.groups * s.query.count / s.query.length);
}

}  // namespace

void pair_topk(Workspace& w, const Sides& sides, const Options& o, const Filter& f, const int64_t* k,
               const SelectedPairs& to) {
  const PackedSides s(w, sides, o, !f.positives);
  const int64_t rows = s.query.groups * s.query.count;
  if (s.key().count > 1 << 25) throw std::length_error("more than 2^25 candidates of one anchor");
  SelectArguments a{};
  a.scores = pair_scores(s, f);
  a.units = Units(f.scope, s.query, f.classes);
  a.to = to;
  AnchorSource source;
  source.units = a.units;
  a.anchors = anchor_terms(s, f, source);
  Pairs pairs = s.pairs(false, true, s.self() ? a.anchors : candidate_terms(s), 0, 1);
  const auto sweep = [&](Stage stage) {
    a.stage = stage;
    run_product<FilterTiles, PairSelect>(s.query, pairs, a, false, w.stream);
  };

  const int64_t cells = a.units.cells();
  const Cells state{k, w.take<int64_t>(cells), w.take<uint32_t>(cells), to.threshold, cells};
  launch_each(start_kernel, cells, w.stream, state);
  a.prefix = state.prefix;
  a.threshold = state.threshold;
  a.tile_units = tile_units(s, f);
  int most = 11;
  while (a.units.classes * a.tile_units << most > kHistogramWords) --most;
  a.histogram = w.take<unsigned long long>(cells << most);
  for (int known = 0; known < kScoreBits; known += a.digit_bits) {
    a.digit_bits = most < kScoreBits - known ? most : kScoreBits - known;
    a.known_shift = kScoreBits - known;
    a.digit_shift = kScoreBits - known - a.digit_bits;
    fill(reinterpret_cast<int64_t*>(a.histogram), 0, cells << a.digit_bits, w.stream);
    sweep(Stage::histogram);
    launch(digit_kernel, (cells + kWarpsPerBlock - 1) / kWarpsPerBlock, 32 * kWarpsPerBlock, 0, w.stream, state,
           static_cast<const unsigned long long*>(a.histogram), a.digit_bits, known == 0, a.digit_shift == 0);
  }

  a.above = w.take<int32_t>(a.units.classes * rows);
  a.ties = w.take<int32_t>(a.units.classes * rows);
  sweep(Stage::count);
  auto* before = w.take<int64_t>(a.units.classes * (rows + 1));
  launch(scan_kernel, a.units.classes, kScanThreads, sizeof(int64_t) * kScanThreads, w.stream, a.ties, rows, before);
  auto* shares = w.take<Share>(a.units.classes * rows);
  auto* totals = w.take<int32_t>(rows);
  const int64_t strips = s.query.groups * s.query.padded / 64;
  auto* needed = w.take<int64_t>(strips);  // as many unsigned, and some room
  fill(needed, 0, strips, w.stream);
  launch_each(share_kernel, rows, w.stream,
              ShareArguments{a.units, rows, s.query.count, s.query.padded, a.above, a.ties, before, state.left,
                             to.capacity > 0, shares, totals, reinterpret_cast<unsigned*>(needed)});
  auto* begins = w.take<int64_t>(rows + 1);
  launch(scan_kernel, 1, kScanThreads, sizeof(int64_t) * kScanThreads, w.stream, totals, rows, begins);
  a.shares = shares;
  a.begins = begins;
  pairs.needed = reinterpret_cast<const unsigned*>(needed);
  fill(to.cut, -1, cells, w.stream);
  launch_each(tail_kernel, to.capacity, w.stream, to, static_cast<const int64_t*>(begins + rows));
  sweep(Stage::collect);
}

}  // namespace medcl::cuda
