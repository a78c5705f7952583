// y = x (2 - U(z)): one pass over the features forward, one backward; the entropy of a block of pixels stays in cache.
#include "cpu/patch_kernels.h"
#include "cpu/patches.h"

namespace medcl {
namespace {

constexpr int64_t kChunk = 1024;  // pixels to a thread at a time

Field field(const Tensor& x, int64_t b) {
  Field f;
  f.dtype = dtype_of(x);
  const int64_t item = f.dtype == DType::f64 ? 8 : f.dtype == DType::f32 ? 4 : 2;
  f.data = static_cast<const char*>(x.const_data_ptr()) + b * x.stride(0) * item;
  f.stride_c = x.stride(1);
  f.stride_l = x.stride(2);
  f.channels = x.size(1);
  return f;
}

FieldOut field_out(const Tensor& x, int64_t b) {
  const Field f = field(x, b);
  return {const_cast<void*>(f.data), f.dtype, f.stride_c, f.stride_l};
}

void check(const Tensor& x, const Tensor& z) {
  STD_TORCH_CHECK(x.dim() == 3 && z.dim() == 3 && x.size(0) == z.size(0) && x.size(2) == z.size(2) && z.size(1) >= 2,
                  "medcl: features (B, C, L) need logits (B, M, L) with M >= 2");
  STD_TORCH_CHECK(x.scalar_type() == z.scalar_type(), "medcl: features and logits need one dtype");
}

// f(b, first, n)
template <class F>
void each_chunk(const Tensor& x, const F& f) {
  const int64_t B = x.size(0), L = x.size(2), chunks = ceil_div(L, kChunk);
  parallel(B * chunks, [&](int64_t part) {
    const int64_t first = part % chunks * kChunk;
    f(part / chunks, first, std::min(kChunk, L - first));
  });
}

}  // namespace

Tensor uncertainty_reweight_cpu(const Tensor& features, const Tensor& logits) {
  check(features, logits);
  Tensor out = torch::stable::empty_like(features);
  in_compute_type(features, [&](auto tag) {
    const auto reweight = patch_kernels<decltype(tag)>().reweight;
    each_chunk(features, [&](int64_t b, int64_t first, int64_t n) {
      reweight(field(features, b), field(logits, b), field_out(out, b), first, n);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> uncertainty_reweight_backward_cpu(const Tensor& d_out, const Tensor& features,
                                                             const Tensor& logits, bool need_features,
                                                             bool need_logits) {
  check(features, logits);
  STD_TORCH_CHECK(d_out.scalar_type() == features.scalar_type() && d_out.dim() == 3 &&
                      d_out.size(0) == features.size(0) && d_out.size(1) == features.size(1) &&
                      d_out.size(2) == features.size(2),
                  "medcl: the upstream gradient must be like the features");
  const auto like = [](const Tensor& x, bool needed) {
    return needed ? torch::stable::empty_like(x) : torch::stable::new_empty(x, std::vector<int64_t>{0});
  };
  Tensor d_features = like(features, need_features), d_logits = like(logits, need_logits);
  in_compute_type(features, [&](auto tag) {
    const auto backward = patch_kernels<decltype(tag)>().reweight_backward;
    each_chunk(features, [&](int64_t b, int64_t first, int64_t n) {
      backward(field(d_out, b), field(features, b), field(logits, b),
               need_features ? field_out(d_features, b) : FieldOut{}, need_logits ? field_out(d_logits, b) : FieldOut{},
               first, n);
    });
  });
  return {d_features, d_logits};
}

}  // namespace medcl
