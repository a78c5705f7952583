// The operations on the GPU as plain functions: raw pointers, strides, a workspace; no torch header. Shapes and
// meaning are those of medcl_kernels/reference. Everything runs on the workspace's stream and nothing waits for it.
// They throw std::exception where a launch fails.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>

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

}  // namespace medcl::cuda
