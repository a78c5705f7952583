// The pair engine: a block owns a tile of rows, streams tiles of the other side past it, and hands every tile of
// scores to an epilogue, which is
//   struct Arguments                         by value, chosen by the host
//   static constexpr bool kTerms             whether it reads Term records of the streamed rows
//   static constexpr bool kMasked            whether scores past the ragged edge and of self pairs come as -inf;
//                                            else the edge comes as 0, and nothing marks it
//   static constexpr int kMinBlocks          blocks that a multiprocessor must have room for; 1: no spill for a
//                                            second one, 0: as ptxas likes
//   static constexpr int kState              floats of its own in shared memory, per thread and selection
//   static constexpr bool kFixedOrder        whether its scores need the same bits in every block of a row
//   Epilogue(arguments, Block, Lane)         reads what it needs of the owned rows
//   tile(scores, View)                       scores may be overwritten
//   finish()                                 writes the owned rows' results
#pragma once
#include "cuda/terms.cuh"
#include "cuda/tile.cuh"

namespace medcl::cuda {

// All pair problems of one launch: `groups` times owned x streamed rows.
struct Pairs {
  const unsigned char *owned, *streamed;  // (groups, padded, row_bytes)
  const Term* terms;                      // of the streamed rows, (selections, groups, streamed_padded)
  int64_t groups, row_bytes;
  int owned_count, owned_padded, streamed_count, streamed_padded;
  int owned_tiles, slabs, outputs;  // outputs: slabs of the result, each a block's own
  int selections;
  bool self;               // the sides are one tensor: pair (i, i) is left out
  const unsigned* needed;  // per 64 owned rows, (groups, owned_padded / 64), whether they have anything to do; or null
};

// Which part of which problem this block has.
struct Block {
  int64_t group;
  int row0, output;
  MEDCL_DEVICE Block(const Pairs& p, int tile_rows) {
    const int64_t block = blockIdx.x, tile = block / p.outputs;
    output = static_cast<int>(block % p.outputs);
    group = tile / p.owned_tiles;
    row0 = static_cast<int>(tile % p.owned_tiles) * tile_rows;
  }
  MEDCL_DEVICE bool needed(const Pairs& p, int tile_rows) const {
    if (!p.needed) return true;
    bool any = false;
    for (int row = row0; row < row0 + tile_rows && row < p.owned_padded; row += 64)
      any |= p.needed[(group * p.owned_padded + row) / 64] != 0;
    return any;
  }
};

// The tile of streamed rows that a tile of scores belongs to.
struct View {
  uint32_t rows, terms;  // addresses; terms: (selections, columns)
  int column0;
};

template <class T, class Epilogue>
constexpr size_t shared_bytes(int selections) {
  const size_t terms = Epilogue::kTerms ? size_t(selections) * T::kColumns * sizeof(Term) : 0;
  return (T::kAlign - 128) + (T::kResident ? T::kOwnedBytes : 0) + T::kStages * (T::kStageBytes + terms) +
         sizeof(float) * Epilogue::kState * selections * T::kThreads;
}

template <class T, class Epilogue>
__global__ void __launch_bounds__(T::kMostThreads, T::kMinBlocks ? T::kMinBlocks : Epilogue::kMinBlocks)
    pair_kernel(const MEDCL_GRID_CONSTANT Pairs p, const MEDCL_GRID_CONSTANT typename Epilogue::Arguments arguments) {
  if constexpr (T::kMostThreads < T::kThreads) return;
  MEDCL_SHARED(memory);
  const Lane l;
  const Block block(p, T::kRows);
  if (!block.needed(p, T::kRows)) return;  // the whole block
  const uint32_t start = ptx::shared_address(memory);
  const uint32_t base = T::kAlign > 128 ? (start + T::kAlign - 1) / T::kAlign * T::kAlign : start;
  const uint32_t stages = base + (T::kResident ? T::kOwnedBytes : 0);
  const uint32_t terms_bytes = Epilogue::kTerms ? p.selections * T::kColumns * sizeof(Term) : 0;
  const uint32_t stage_bytes = T::kStageBytes + terms_bytes;
  const int warp_row = l.warp * 16 * T::kRowTiles;
  const int slabs = T::kResident ? 1 : p.slabs, tiles = (p.streamed_count + T::kColumns - 1) / T::kColumns;
  // Scores are summed up slab by slab. In a fixed order the slab of the result is not the last one: it comes once more.
  constexpr bool kAgain = !T::kResident && Epilogue::kFixedOrder;
  const int turns = slabs + (kAgain ? 1 : 0);
  const int items = tiles * turns, first_slab = Epilogue::kFixedOrder ? 0 : block.output;
  const unsigned char* owned = p.owned + block.group * p.owned_padded * p.row_bytes;
  const unsigned char* streamed = p.streamed + block.group * p.streamed_padded * p.row_bytes;

  const auto load_item = [&](int item, uint32_t stage) {
    const int tile = item / turns, turn = item % turns, column0 = tile * T::kColumns;
    // the slab of the result comes last, so that it is at hand when the scores are complete
    const bool again = kAgain && turn == slabs;
    const int64_t slab = static_cast<int64_t>(again ? block.output : (first_slab + 1 + turn) % slabs) * T::kPitch;
    load_rows<T, T::kColumns>(stage, streamed + slab, p.row_bytes, column0, p.streamed_padded);
    if (!T::kResident && !again)
      load_rows<T, T::kRows>(stage + T::kStreamedBytes, owned + slab, p.row_bytes, block.row0, p.owned_padded);
    if (Epilogue::kTerms && turn == turns - 1)
      for (int i = threadIdx.x; i < p.selections * T::kColumns; i += T::kThreads) {
        const int64_t list = (i / T::kColumns) * p.groups + block.group;
        // rows are padded to 64: of a wider tile the last columns have no terms
        ptx::cp_async_16(stage + T::kStageBytes + i * sizeof(Term),
                         p.terms + list * p.streamed_padded + column0 + i % T::kColumns,
                         T::kColumns <= 64 || column0 + i % T::kColumns < p.streamed_padded);
      }
  };

  if (T::kResident) load_rows<T, T::kRows>(base, owned, p.row_bytes, block.row0, p.owned_padded);
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (s < items) load_item(s, stages + s * stage_bytes);
    ptx::cp_async_commit();
  }
  float* state = reinterpret_cast<float*>(memory + (stages - start) + T::kStages * stage_bytes);
  Epilogue epilogue(arguments, p, block, l, state);

  typename T::Scores s = {};
  for (int item = 0; item < items; ++item) {
    ptx::cp_async_wait<T::kStages - 2>();
    T::publish_copies();
    __syncthreads();
    const int next = item + T::kStages - 1;
    if (next < items) load_item(next, stages + (next % T::kStages) * stage_bytes);
    ptx::cp_async_commit();

    const uint32_t stage = stages + (item % T::kStages) * stage_bytes;
    if constexpr (T::kWgmma)
      T::set_scores(base, stage, l, s);
    else if (!kAgain || item % turns < slabs)
      add_scores<T>(T::kResident ? base : stage + T::kStreamedBytes, warp_row, stage, l, s);
    if (!T::kResident && item % turns != turns - 1) continue;

    const int column0 = item / turns * T::kColumns;
    const bool ragged = column0 + T::kColumns > p.streamed_count;
    const bool diagonal = p.self && block.row0 < column0 + T::kColumns && column0 < block.row0 + T::kRows;
    if (Epilogue::kMasked && (ragged || diagonal)) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int column = column0 + n * 8 + l.t * 2 + (r & 1);
            const int row = block.row0 + warp_row + m * 16 + l.g + (r >> 1) * 8;
            if (column >= p.streamed_count || (p.self && column == row)) s[m][n][r] = -INFINITY;
          }
    }
    epilogue.tile(s, View{stage, stage + T::kStageBytes, column0});
    if constexpr (!T::kWgmma) {  // whose products begin anew
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
          for (int r = 0; r < 4; ++r) s[m][n][r] = 0.f;
    }
  }
  epilogue.finish();
}

template <class T, template <class> class Epilogue>
void run_pairs(Pairs p, const typename Epilogue<T>::Arguments& arguments, bool split_output, void* stream) {
  p.owned_tiles = (p.owned_count + T::kRows - 1) / T::kRows;
  p.slabs = static_cast<int>(p.row_bytes / T::kPitch);
  p.outputs = split_output ? p.slabs : 1;
  launch(pair_kernel<T, Epilogue<T>>, p.groups * p.owned_tiles * p.outputs, T::kThreads,
         shared_bytes<T, Epilogue<T>>(p.selections), stream, p, arguments);
}

}  // namespace medcl::cuda
