// Class shares of windows of a label map. Counted directly, each window row by row, from the labels or from a copy of
// the map as bytes, or looked up in a summed-area table per class: whichever reads less.
#include "cpu/patch_kernels.h"
#include "cpu/patches.h"
#include "pairs/windows.h"

namespace medcl {
namespace {

IntType int_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Bool:
      return IntType::u8;
    case ScalarType::Char:
      return IntType::i8;
    case ScalarType::Short:
      return IntType::i16;
    case ScalarType::Int:
      return IntType::i32;
    case ScalarType::Long:
      return IntType::i64;
    default:
      STD_TORCH_CHECK(false, "medcl: labels must be integers");
  }
  return IntType::i64;
}

// A map of up to three axes; a plane is a volume of one slice.
struct LabelMap {
  const char* data;
  IntType type;
  int64_t item, size[3], stride[3], batch, stride_b;

  explicit LabelMap(const Tensor& y) : type(int_type(y)), batch(y.size(0)), stride_b(y.stride(0)) {
    const int64_t dims = y.dim() - 1;
    STD_TORCH_CHECK(dims == 2 || dims == 3, "medcl: labels must be (B, H, W) or (B, D, H, W)");
    data = static_cast<const char*>(y.const_data_ptr());
    item = type == IntType::i64 ? 8 : type == IntType::i32 ? 4 : type == IntType::i16 ? 2 : 1;
    for (int64_t axis = 0; axis < 3; ++axis) {
      const int64_t own = axis - (3 - dims) + 1;  // of the tensor
      size[axis] = own < 1 ? 1 : y.size(own);
      stride[axis] = own < 1 ? 0 : y.stride(own);
    }
    STD_TORCH_CHECK(cells() < int64_t{1} << 31, "medcl: an image of labels must have fewer than 2^31 cells");
  }
  int64_t cells() const { return size[0] * size[1] * size[2]; }
  const void* at(int64_t b, int64_t x, int64_t y, int64_t z) const {
    return data + item * (b * stride_b + x * stride[0] + y * stride[1] + z * stride[2]);
  }
};

struct Windows {
  const LabelMap& map;
  const int64_t* centers;
  const std::vector<int64_t>& bounds;  // (P, dims, 2)
  int64_t dims, patches, count;

  Box clipped(int64_t p, int64_t i) const {
    Box box{{0, 0, 0}, {1, 1, 1}};
    for (int64_t axis = 3 - dims; axis < 3; ++axis) {
      const int64_t own = axis - (3 - dims), c = centers[i * dims + own];
      const int64_t* b = bounds.data() + (p * dims + own) * 2;
      clip_window(box, axis, c, b[0], b[1], map.size[axis]);
    }
    return box;
  }
  int64_t length(int64_t p) const {  // along the last axis
    const int64_t* b = bounds.data() + ((p + 1) * dims - 1) * 2;
    return b[1] - b[0];
  }
  int64_t whole(int64_t p) const {
    int64_t n = 1;
    for (int64_t axis = 0; axis < dims; ++axis) {
      const int64_t* b = bounds.data() + (p * dims + axis) * 2;
      n *= b[1] - b[0];
    }
    return n;
  }
};

// count of cells of one class in [0, x) x [0, y) x [0, z)
class AreaTable {
 public:
  explicit AreaTable(const LabelMap& map)
      : map_(map), row_(map.size[2] + 1), plane_(row_ * (map.size[1] + 1)), table_(plane_ * (map.size[0] + 1)) {
    std::fill_n(table_.get(), plane_, 0);
    for (int64_t x = 1; x <= map.size[0]; ++x) std::fill_n(table_.get() + x * plane_, row_, 0);
  }

  void build(int64_t b, int32_t k) {
    int32_t* t = table_.get();
    const int64_t X = map_.size[0], Y = map_.size[1];
    constexpr int64_t lines = 16, columns = 1024;
    parallel(ceil_div(X * Y, lines), [&](int64_t part) {
      for (int64_t line = part * lines; line < std::min(X * Y, (part + 1) * lines); ++line) {
        int32_t* out = t + (line / Y + 1) * plane_ + (line % Y + 1) * row_;
        out[0] = 0;
        switch (map_.type) {
          case IntType::u8:
            return_run<uint8_t>(b, line, k, out);
            break;
          case IntType::i8:
            return_run<int8_t>(b, line, k, out);
            break;
          case IntType::i16:
            return_run<int16_t>(b, line, k, out);
            break;
          case IntType::i32:
            return_run<int32_t>(b, line, k, out);
            break;
          case IntType::i64:
            return_run<int64_t>(b, line, k, out);
            break;
        }
      }
    });
    parallel(X * ceil_div(row_, columns), [&](int64_t part) {
      const int64_t x = part % X + 1, z0 = part / X * columns, w = std::min(columns, row_ - z0);
      for (int64_t y = 2; y <= Y; ++y) add(t + x * plane_ + y * row_ + z0, t + x * plane_ + (y - 1) * row_ + z0, w);
    });
    if (X > 1)
      parallel(ceil_div(plane_, columns), [&](int64_t part) {
        const int64_t z0 = part * columns, w = std::min(columns, plane_ - z0);
        for (int64_t x = 2; x <= X; ++x) add(t + x * plane_ + z0, t + (x - 1) * plane_ + z0, w);
      });
  }

  int32_t count(const Box& b) const {
    const int32_t* top = table_.get() + b.high[0] * plane_;
    const int32_t inside = slab(top, b);
    return b.low[0] == 0 ? inside : inside - slab(table_.get() + b.low[0] * plane_, b);
  }

 private:
  template <class S>
  void return_run(int64_t b, int64_t line, int32_t k, int32_t* out) {
    const S* p = static_cast<const S*>(map_.at(b, line / map_.size[1], line % map_.size[1], 0));
    int32_t sum = 0;
    for (int64_t z = 0; z < map_.size[2]; ++z) {
      sum += static_cast<int64_t>(p[z * map_.stride[2]]) == k;
      out[z + 1] = sum;
    }
  }
  static void add(int32_t* to, const int32_t* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }
  int32_t slab(const int32_t* t, const Box& b) const {
    const int32_t *high = t + b.high[1] * row_, *low = t + b.low[1] * row_;
    return high[b.high[2]] - high[b.low[2]] - low[b.high[2]] + low[b.low[2]];
  }

  const LabelMap& map_;
  int64_t row_, plane_;
  Buffer<int32_t> table_;
};

// A copy of one image as bytes: an eighth of the memory of int64 labels.
class Bytes {
 public:
  explicit Bytes(const LabelMap& map)
      : map_(map),
        row_(ceil_div(map.size[2], kLabelPadding) * kLabelPadding),
        data_(map.size[0] * map.size[1] * row_ + kLabelPadding) {}
  void fill(int64_t b) {
    constexpr int64_t lines = 64;
    const int64_t all = map_.size[0] * map_.size[1];
    parallel(ceil_div(all, lines), [&](int64_t part) {
      for (int64_t line = part * lines; line < std::min(all, (part + 1) * lines); ++line)
        patch_kernels<float>().narrow_labels(map_.at(b, line / map_.size[1], line % map_.size[1], 0), map_.type,
                                             map_.stride[2], map_.size[2], data_.get() + line * row_);
    });
  }
  LabelMap view() const {
    LabelMap bytes = map_;
    bytes.data = reinterpret_cast<const char*>(data_.get());
    bytes.type = IntType::u8;
    bytes.item = 1;
    bytes.stride[0] = map_.size[1] * row_;
    bytes.stride[1] = row_;
    bytes.stride[2] = 1;
    bytes.batch = 1;
    return bytes;
  }

 private:
  const LabelMap& map_;
  int64_t row_;
  Buffer<uint8_t> data_;
};

bool beside(const Box& a, const Box& b) {
  return a.low[0] == b.low[0] && a.high[0] == b.high[0] && a.low[1] == b.low[1] && a.high[1] == b.high[1] &&
         a.high[2] - a.low[2] == b.high[2] - b.low[2];
}

// Counts cells window by window; take(p, b, k, i, box, count) gets every result. nanoseconds: of one centre.
template <class Take>
void count_directly(const Windows& w, int64_t num_classes, bool copied, double nanoseconds, Take&& take) {
  const int64_t K = num_classes - 1;
  const auto count_classes = patch_kernels<float>().count_classes;
  const int64_t grain = std::min<int64_t>(64, 1 + static_cast<int64_t>(2e4 / nanoseconds));
  auto count = [&](const LabelMap& map, int64_t image, int64_t b, int64_t part) {
    const int64_t end = std::min(w.count, (part + 1) * grain);
    std::vector<Box> boxes;  // windows that follow each other along the last axis, as those of a grid do
    std::vector<int64_t> at;
    std::vector<int32_t> counts;
    for (int64_t p = 0; p < w.patches; ++p)
      for (int64_t i = part * grain; i < end; i += static_cast<int64_t>(boxes.size())) {
        const Box first = w.clipped(p, i);
        boxes.assign(1, first);
        while (i + static_cast<int64_t>(boxes.size()) < end) {
          const Box next = w.clipped(p, i + static_cast<int64_t>(boxes.size()));
          if (!beside(first, next)) break;
          boxes.push_back(next);
        }
        at.clear();
        for (const Box& box : boxes) at.push_back((box.low[2] - first.low[2]) * map.stride[2]);
        counts.assign(boxes.size() * K, 0);
        const int64_t size[3] = {first.high[0] - first.low[0], first.high[1] - first.low[1],
                                 first.high[2] - first.low[2]};
        count_classes(map.at(image, first.low[0], first.low[1], first.low[2]), map.type, map.stride, size, at.data(),
                      static_cast<int64_t>(boxes.size()), num_classes, counts.data());
        for (size_t n = 0; n < boxes.size(); ++n)
          for (int64_t k = 0; k < K; ++k) take(p, b, k, i + static_cast<int64_t>(n), boxes[n], counts[n * K + k]);
      }
  };
  const int64_t parts = ceil_div(w.count, grain);
  if (!copied) {
    parallel(w.map.batch * parts, [&](int64_t part) { count(w.map, part / parts, part / parts, part % parts); });
    return;
  }
  Bytes bytes(w.map);
  const LabelMap view = bytes.view();
  for (int64_t b = 0; b < w.map.batch; ++b) {
    bytes.fill(b);
    parallel(parts, [&](int64_t part) { count(view, 0, b, part); });
  }
}

// (P, B, K, N)
template <class T>
void ratios(const Windows& w, int64_t num_classes, bool full, T* out) {
  const LabelMap& map = w.map;
  const int64_t K = num_classes - 1, B = map.batch, N = w.count, P = w.patches;
  auto share = [&](int64_t p, const Box& box, int32_t count) {
    return share_of<T>(count, full ? w.whole(p) : cells_of(box));
  };
  // A window reads all of its cells, as they are or from a copy of the map as bytes that is made in one go; a table
  // reads every cell of the map once per class, and then 4 or 8 corners a window. In nanoseconds of one thread,
  // measured (docs/performance.md).
  double reads = 0, rows = 0;
  for (int64_t p = 0; p < P; ++p) {
    const double cells = static_cast<double>(std::min(w.whole(p), map.cells()));
    reads += cells;
    rows += cells / w.length(p) * ceil_div(w.length(p), int64_t{64});
  }
  const double narrow = map.item == 8 ? 0.42 : map.item == 1 ? 0.05 : 0.2;  // of a cell
  const bool ready = map.item == 1 && map.stride[2] == 1;
  const bool copied = !ready && num_classes <= kByteClasses && N * reads > static_cast<double>(map.cells());
  const double counting = rows * (0.5 + 0.7 * K) + 30.0 * P;  // of one centre
  const double direct = B * (N * counting + narrow * (copied ? map.cells() : N * reads));
  const double table = static_cast<double>(B) * K * (2.8 * map.cells() + 18.0 * N * P);
  if (direct <= table) {
    count_directly(w, num_classes, copied, counting,
                   [&](int64_t p, int64_t b, int64_t k, int64_t i, const Box& box, int32_t count) {
                     out[((p * B + b) * K + k) * N + i] = share(p, box, count);
                   });
    return;
  }
  constexpr int64_t grain = 64;
  AreaTable area(map);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k) {
      area.build(b, static_cast<int32_t>(k + 1));
      parallel(ceil_div(N, grain), [&](int64_t part) {
        for (int64_t i = part * grain; i < std::min(N, (part + 1) * grain); ++i)
          for (int64_t p = 0; p < P; ++p) {
            const Box box = w.clipped(p, i);
            out[((p * B + b) * K + k) * N + i] = share(p, box, area.count(box));
          }
      });
    }
}

}  // namespace

Tensor patch_class_ratio_cpu(const Tensor& labels, const Tensor& centers, std::vector<int64_t> windows,
                             int64_t num_classes, bool full, bool double_precision) {
  const LabelMap map(labels);
  const int64_t dims = labels.dim() - 1, per = 2 * dims, N = centers.size(0);
  STD_TORCH_CHECK(centers.dim() == 2 && centers.size(1) == dims && centers.scalar_type() == ScalarType::Long &&
                      centers.is_contiguous(),
                  "medcl: centers must be contiguous int64 (N, dims)");
  STD_TORCH_CHECK(!windows.empty() && static_cast<int64_t>(windows.size()) % per == 0 && num_classes >= 2,
                  "medcl: windows must be (P, dims, 2) bounds and num_classes at least 2");
  for (size_t i = 0; i < windows.size(); i += 2)
    STD_TORCH_CHECK(windows[i] < windows[i + 1], "medcl: a window is empty");
  const Windows w{map,
                  static_cast<const int64_t*>(centers.const_data_ptr()),
                  windows,
                  dims,
                  static_cast<int64_t>(windows.size()) / per,
                  N};
  Tensor out = torch::stable::new_empty(labels, std::vector<int64_t>{w.patches, map.batch, num_classes - 1, N},
                                        double_precision ? ScalarType::Double : ScalarType::Float);
  if (double_precision)
    ratios(w, num_classes, full, static_cast<double*>(out.mutable_data_ptr()));
  else
    ratios(w, num_classes, full, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace medcl
