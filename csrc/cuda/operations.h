// The operations on the GPU as plain functions: raw pointers, strides, a workspace; no torch header. Shapes and
// meaning are those of medcl_kernels/reference. Everything runs on the workspace's stream and nothing waits for it.
// They throw std::exception where a launch fails.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "pairs/mitigation.h"
#include "pairs/scores.h"

namespace medcl::cuda {

enum class Type { f32, f16, bf16 };
// How products of rows are made: on tensor cores in one of three formats, or by fp32 multiply-adds.
enum class Product { bf16, fp16, tf32, ieee };
enum Kind : int { kAll, kSame, kDifferent };
constexpr int kMaxSelections = 16;

struct Rows {  // (batch, dim, length), any strides, in elements
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch = 0, dim = 0, length = 0, stride_b = 0, stride_d = 0, stride_l = 0;
};

// Where the device memory of one call comes from; it must stay until the stream has passed the call.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual void* allocate(size_t bytes) = 0;  // aligned to 256 bytes, not initialised
  // Stable sort of each of `lists` lists of n keys: the keys in ascending order, and the positions they had.
  virtual void sort(const int64_t* keys, int64_t lists, int64_t n, const int64_t** sorted, const int64_t** order) = 0;
  void* stream = nullptr;

  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(allocate(sizeof(T) * static_cast<size_t>(n)));
  }
};

// key.data null: the query against itself. Labels: contiguous (selections, batch, length) or null.
struct Sides {
  Rows query, key;
  const int64_t *query_labels = nullptr, *key_labels = nullptr;
};
struct Options {
  Product product = Product::ieee;
  int selections = 1;
  Kind kinds[kMaxSelections] = {};
  int64_t ignore_index = -100;
  float temperature = 1.f;
  bool normalize = true, across = false;
  bool wgmma = false;  // row statistics of 16-bit rows up to 128 channels wide by wgmma (wgmma.cuh)
};

// Pairs of rows by number, b * length + l: entry n is (anchor[n], candidate[n]); a negative anchor: no pair.
struct PairList {
  int64_t length = 0;
  const int64_t *anchor = nullptr, *candidate = nullptr;
};

enum class Scope { global, image, anchor };
struct Filter {  // gradients of all pairs and how they compete: reference/pair_gradients.py, reference/pair_topk.py
  Form form = Form::out;
  bool representation = false;
  Scope scope = Scope::image;
  const int64_t* positives = nullptr;  // (batch, length, several); null: those of the anchor's label
  int64_t several = 0;
  const float* statistics = nullptr;  // (3, batch, length)
  int classes = 1;                    // 2: positives and negatives apart
};
struct SelectedPairs {  // capacity 0: threshold and cut only
  int64_t capacity = 0;
  int64_t *anchor = nullptr, *candidate = nullptr;  // (capacity)
  float* gradient = nullptr;                        // (capacity)
  float* threshold = nullptr;                       // (classes, units)
  int64_t* cut = nullptr;                           // (classes, units)
};

struct Stack {  // (count, batch, dim, length) gradients
  Rows rows;
  int64_t count = 1, stride_m = 0;
};
enum class Method { pcgrad, cagrad, consensus, mean, sum };
struct Mitigation {
  Method method = Method::pcgrad;
  bool flat = false;  // all rows are one vector
  Combination how;
  const int64_t* order = nullptr;  // of the device, (count, count - 1); null: that of `how`
};

// Results are contiguous (selections, batch, length); gradients are written in the layout of their Rows, and not made
// where data is null.
void pair_logsumexp(Workspace&, const Sides&, const Options&, float* lse);
void pair_logsumexp_backward(Workspace&, const Sides&, const Options&, const float* d_lse, const float* lse,
                             const Rows& d_query, const Rows& d_key);
void pair_positive_log(Workspace&, const Sides&, const Options&, const float* lse_negative, float* sum, float* tail);
void pair_positive_log_backward(Workspace&, const Sides&, const Options&, const float* d_sum, const float* lse_negative,
                                const Rows& d_query, const Rows& d_key);
void pair_argmax(Workspace&, const Sides&, const Options&, int64_t* index, float* value);
void positive_mean(Workspace&, const Sides&, const Options&, float* mean, int64_t* count);
void positive_mean_backward(Workspace&, const Sides&, const Options&, const float* d_mean, const Rows& d_query,
                            const Rows& d_key);
// positives: (batch, length, several)
void positive_at(Workspace&, const Sides&, const Options&, const int64_t* positives, int64_t several, float* out);
void positive_at_backward(Workspace&, const Sides&, const Options&, const int64_t* positives, int64_t several,
                          const float* d_out, const Rows& d_query, const Rows& d_key);
void pair_at(Workspace&, const Sides&, const Options&, const PairList&, float* out);
void pair_at_backward(Workspace&, const Sides&, const Options&, const PairList&, const float* d_out,
                      const Rows& d_query, const Rows& d_key);
void pair_topk(Workspace&, const Sides&, const Options&, const Filter&, const int64_t* k, const SelectedPairs&);
void pair_filtered_grad_backward(Workspace&, const Sides&, const Options&, const Filter&, const float* d_value,
                                 const float* threshold, const int64_t* cut, const Rows& d_query, const Rows& d_key);
void listed_grad_backward(Workspace&, const Sides&, const Options&, const PairList&, const float* gradient,
                          const float* d_value, const Rows& d_query, const Rows& d_key);
// out in any layout
void mitigate_rows(Workspace&, const Stack& gradients, const Mitigation&, const Rows& out);

// Patch sizes of pair_affinity: class shares (count, batch, classes, length) of query and key; shift: m, or null.
struct Patches {
  const float *query_ratios = nullptr, *key_ratios = nullptr;
  int64_t count = 1, classes = 1;
  const float* shift = nullptr;
  bool swapped = false;  // form "release2d"
};
// Results, and what comes back for them, are (patch sizes, batch, length); d_shift, one value, may be null.
void pair_affinity(Workspace&, const Sides&, const Options&, const Patches&, float* log_z, float* linear);
void pair_affinity_backward(Workspace&, const Sides&, const Options&, const Patches&, const float* d_log_z,
                            const float* d_linear, const float* log_z, const Rows& d_query, const Rows& d_key,
                            float* d_shift);

// Integer labels (batch, *size), any strides, in elements; a plane is a volume of one slice (size 1, stride 0).
enum class LabelType { u8, i8, i16, i32, i64 };
struct LabelMap {
  const void* data = nullptr;
  LabelType type = LabelType::i64;
  int64_t batch = 0, size[3] = {}, stride_b = 0, stride[3] = {};
};
// centers: (count, dims); bounds, on the host: (windows, dims, 2). out: (windows, batch, num_classes - 1, count),
// double where wide, else float.
void patch_class_ratio(Workspace&, const LabelMap&, const int64_t* centers, int64_t count, int dims,
                       const int64_t* bounds, int64_t windows, int num_classes, bool full, bool wide, void* out);

// features, out: (batch, channels, length); logits: (batch, M, length).
void uncertainty_reweight(Workspace&, const Rows& features, const Rows& logits, const Rows& out);
void uncertainty_reweight_backward(Workspace&, const Rows& d_out, const Rows& features, const Rows& logits,
                                   const Rows& d_features, const Rows& d_logits);

}  // namespace medcl::cuda
