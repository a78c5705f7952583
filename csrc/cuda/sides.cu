// Packing, label codes and terms: what every operation does before and after the engine.
#include "cuda/sides.cuh"

#include "cuda/packing.cuh"

namespace medcl::cuda {
namespace {

__global__ void fill_kernel(int64_t* to, int64_t value, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) to[i] = value;
}

__global__ void insert_kernel(LabelTable table, const int64_t* labels, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n && labels[i] != table.free) table.insert(labels[i]);
}

struct TermArguments {
  TermSource from;
  LabelTable table;
  int64_t ignore_index, groups;
  int selections, count, padded;
  float shift;
  GradientScale gradient;

  // whether row `at` of (selections, groups, count) takes part, and whether it has a gradient
  MEDCL_DEVICE bool valid(int64_t at) const { return !from.labels || from.labels[at] != ignore_index; }
  MEDCL_DEVICE bool moves(int64_t at) const {
    return from.upstream && valid(at) && !(from.needs_level && from.level[at] == -INFINITY);
  }
};

// The largest |upstream gradient| of the rows that have one. NaN would be larger than all: it is left to the products.
__global__ void peak_kernel(TermArguments a, unsigned* peak) {
  const int64_t n = a.selections * a.groups * a.count;
  unsigned largest = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    if (!a.moves(i)) continue;
    const unsigned bits = bit_copy<uint32_t>(a.from.upstream[i]) & 0x7fffffffu;
    if (bits > largest && bits < 0x7f800000u) largest = bits;
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, largest, step);
    largest = other > largest ? other : largest;
  }
  if (threadIdx.x % 32 == 0) atomicMax(peak, largest);
}

__global__ void terms_kernel(TermArguments a, Term* terms) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.selections * a.groups * a.padded) return;
  const int64_t list = i / a.padded, row = i % a.padded, at = list * a.count + row;
  Term term{-INFINITY, 0.f, INFINITY, -1};
  if (row < a.count && a.valid(at)) {
    term.bias = -a.shift;
    term.code = a.table.slots ? a.table.code(a.from.labels[at]) : 0;
    const double level = a.from.level ? a.from.level[at] * 1.4426950408889634 : 0.0;
    const bool blank = a.from.needs_level && a.from.level[at] == -INFINITY;  // level +inf: probability 0
    if (a.from.level && !blank) term.level = static_cast<float>(level);
    if (a.moves(at)) {
      term.weight = a.from.upstream[at] * power_of_two(a.gradient.exponent());
      if (a.from.weight_by_level) term.weight *= static_cast<float>(::exp2(a.shift - level));
    }
  }
  terms[i] = term;
}

int64_t table_size(int64_t labels) {
  int64_t size = 64;
  while (size < 2 * labels) size *= 2;
  return size;
}

}  // namespace

void fill(int64_t* to, int64_t value, int64_t n, void* stream) { launch_each(fill_kernel, n, stream, to, value, n); }

Packed pack(Workspace& w, const Rows& x, const int64_t* labels, const Options& o) {
  Packed p;
  p.product = o.product;
  p.groups = o.across ? 1 : x.batch;
  p.length = x.length;
  const int64_t count = o.across ? x.batch * x.length : x.length;
  if (count > 0x7fffffc0) throw std::length_error("more than 2^31 rows in one set");
  p.count = static_cast<int>(count);
  p.padded = (p.count + 63) / 64 * 64;
  const int slab = slab_of(o.product, x.dim);
  p.pitch = static_cast<int>((x.dim + slab - 1) / slab * slab);
  const int element = o.product == Product::bf16 || o.product == Product::fp16 ? 2 : 4;
  p.rows = w.take<unsigned char>(p.groups * p.padded * p.pitch * element);
  p.inverse = w.take<float>(p.groups * p.padded);
  const PackArguments a{x, p, labels, o.selections, o.ignore_index, o.normalize};
  launch(pack_kernel, p.groups * p.padded / kPackRows, kPackThreads, PackMemory::kBytes, w.stream, a);
  return p;
}

void unpack(Workspace& w, const Packed& p, const Rows& x, const Rows& d_x, const float* d_z, const Options& o) {
  const UnpackArguments a{x, d_x, p, d_z, o.normalize};
  launch(unpack_kernel, p.groups * p.padded / kPackRows, kPackThreads, PackMemory::kBytes, w.stream, a);
}

PackedSides::PackedSides(Workspace& w, const Sides& sides, const Options& o, bool compares)
    : w(w), sides(sides), o(o), compares(compares) {
  query = pack(w, sides.query, sides.query_labels, o);
  if (!self()) key_rows = pack(w, sides.key, sides.key_labels, o);
  if (!compares) return;
  const int64_t query_labels = o.selections * query.groups * query.count;
  const int64_t key_labels = self() ? 0 : o.selections * key_rows.groups * key_rows.count;
  const int64_t size = table_size(query_labels + key_labels);
  if (size > 0x7fffffff) throw std::length_error("more than 2^29 labels");
  table = {w.take<int64_t>(size), size - 1, o.ignore_index};
  fill(table.slots, o.ignore_index, size, w.stream);
  launch_each(insert_kernel, query_labels, w.stream, table, sides.query_labels, query_labels);
  if (!self()) launch_each(insert_kernel, key_labels, w.stream, table, sides.key_labels, key_labels);
}

namespace {

TermArguments term_arguments(const PackedSides& s, const Packed& p, TermSource from) {
  TermArguments a{};
  a.from = from;
  a.table = s.table;
  a.ignore_index = s.o.ignore_index;
  a.groups = p.groups;
  a.selections = s.o.selections;
  a.count = p.count;
  a.padded = p.padded;
  return a;
}

}  // namespace

GradientScale PackedSides::scale(std::initializer_list<TermSource> anchors) const {
  int64_t* peak = w.take<int64_t>(1);
  fill(peak, 0, 1, w.stream);
  GradientScale gradient{reinterpret_cast<const unsigned*>(peak), 13};
  while (1 << (13 - gradient.room) < o.selections) --gradient.room;
  const int64_t rows = o.selections * query.groups * query.count;
  for (TermSource from : anchors) {
    from.labels = sides.query_labels;
    launch(peak_kernel, rows < 65536 ? (rows + 255) / 256 : 256, 256, 0, w.stream, term_arguments(*this, query, from),
           reinterpret_cast<unsigned*>(peak));
  }
  return gradient;
}

Term* PackedSides::terms(bool of_key, const TermSource& source, float shift, GradientScale gradient) const {
  const Packed& p = of_key ? key() : query;
  TermArguments a = term_arguments(*this, p, source);
  a.from.labels = of_key && !self() ? sides.key_labels : sides.query_labels;
  a.shift = shift;
  a.gradient = gradient;
  const int64_t n = o.selections * p.groups * p.padded;
  Term* terms = w.take<Term>(n);
  launch_each(terms_kernel, n, w.stream, a, terms);
  return terms;
}

Pairs PackedSides::pairs(bool owned_key, bool streamed_key, const Term* streamed_terms, int first, int count) const {
  const Packed &owned = owned_key ? key() : query, &streamed = streamed_key ? key() : query;
  Pairs p{};
  p.owned = owned.rows;
  p.streamed = streamed.rows;
  p.terms = streamed_terms ? streamed_terms + first * streamed.groups * streamed.padded : nullptr;
  p.groups = owned.groups;
  p.row_bytes = owned.pitch * (owned.product == Product::bf16 || owned.product == Product::fp16 ? 2 : 4);
  p.owned_count = owned.count;
  p.owned_padded = owned.padded;
  p.streamed_count = streamed.count;
  p.streamed_padded = streamed.padded;
  p.selections = count;
  p.self = self();
  return p;
}

}  // namespace medcl::cuda
