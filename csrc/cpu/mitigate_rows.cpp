// One gradient out of M: a Gram matrix per row or for all rows, weights from it (reference/mitigate_rows.py (T2) to
// (T4)), one weighted sum. Each gradient is read twice.
#include "cpu/filter.h"
#include "cpu/pairs.h"
#include "pairs/mitigation.h"

namespace medcl {
namespace {

// f(image, first row, rows, number of the block)
template <class F>
void each_block(int64_t images, int64_t length, int64_t rows, F&& f) {
  const int64_t per_image = ceil_div(length, rows);
  parallel(images * per_image, [&](int64_t k) {
    const int64_t l0 = k % per_image * rows;
    f(k / per_image, l0, std::min(rows, length - l0), k);
  });
}

}  // namespace

Tensor mitigate_rows_cpu(const Tensor& gradients, const Tensor& order, std::string method, std::string unit,
                         std::string reduction, double strength, bool rows_first) {
  STD_TORCH_CHECK(gradients.dim() == 4, "medcl: gradients must be (M, B, D, L)");
  const int64_t M = gradients.size(0), B = gradients.size(1), D = gradients.size(2), L = gradients.size(3);
  STD_TORCH_CHECK(M >= 1 && M <= kPerspectives, "medcl: 1 to ", kPerspectives, " gradients, got ", M);
  STD_TORCH_CHECK(order.is_contiguous() && order.numel() == M * (M - 1) && order.scalar_type() == ScalarType::Long,
                  "medcl: order must be contiguous int64 (M, M - 1)");
  STD_TORCH_CHECK(
      method == "pcgrad" || method == "cagrad" || method == "consensus" || method == "mean" || method == "sum",
      "medcl: unknown method '", method, "'");
  const std::vector<int64_t> shape = rows_first ? std::vector<int64_t>{B, L, D} : std::vector<int64_t>{B, D, L};
  Tensor out = torch::stable::new_empty(gradients, shape);
  const int64_t out_d = rows_first ? 1 : L, out_l = rows_first ? D : 1;
  Stack x;
  x.data = gradients.const_data_ptr();
  x.dtype = dtype_of(gradients);
  x.count = M;
  x.dim = D;
  x.stride_m = gradients.stride(0);
  x.stride_d = D == 1 && rows_first ? 1 : gradients.stride(2);
  x.stride_l = gradients.stride(3);
  const int64_t stride_b = gradients.stride(1), item = x.dtype == DType::f64 ? 8 : x.dtype == DType::f32 ? 4 : 2;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  // blocks whose gradients stay in a 1 MB L2 between the two readings
  int64_t rows = std::max<int64_t>(64, (int64_t{1} << 19) / (M * D * item) / 64 * 64);
  if (D == 1) rows = 16384;
  auto start = [&](int64_t b, int64_t l0) { return to + (b * D * L + l0 * out_l) * item; };
  const double factor = reduction == "sum" ? static_cast<double>(M) : 1.0;

  return in_compute_type(gradients, [&](auto tag) {
    using T = decltype(tag);
    const FilterKernels<T>& kernels = filter_kernels<T>();
    if (method == "consensus") {
      each_block(B, L, rows, [&](int64_t b, int64_t l0, int64_t n, int64_t) {
        kernels.consensus_rows(x, b * stride_b, l0, n, factor, start(b, l0), out_d, out_l);
      });
      return out;
    }
    Combination how;
    how.count = static_cast<int>(M);
    how.pcgrad = method == "pcgrad";
    how.strength = strength;
    how.factor = factor;
    const int64_t* meeting = static_cast<const int64_t*>(order.const_data_ptr());
    for (int64_t e = 0; e < M * (M - 1); ++e) how.order[e / (M - 1)][e % (M - 1)] = static_cast<int8_t>(meeting[e]);
    if (method == "mean" || method == "sum" || M == 1) {
      double w[kPerspectives];
      for (int a = 0; a < M; ++a) w[a] = method == "sum" || (reduction == "sum" && method != "mean") ? 1.0 : 1.0 / M;
      each_block(B, L, rows, [&](int64_t b, int64_t l0, int64_t n, int64_t) {
        kernels.combine_rows(x, b * stride_b, l0, n, w, 0, start(b, l0), out_d, out_l);
      });
      return out;
    }
    if (unit == "row") {
      each_block(B, L, rows, [&](int64_t b, int64_t l0, int64_t n, int64_t) {
        double* gram = scratch<double>(kSums, n * M * M);
        double* weight = scratch<double>(kExtra, n * M);
        kernels.gram_rows(x, b * stride_b, l0, n, gram);
        for (int64_t r = 0; r < n; ++r) combination_weights(how, gram + r * M * M, weight + r * M);
        kernels.combine_rows(x, b * stride_b, l0, n, weight, M, start(b, l0), out_d, out_l);
      });
      return out;
    }
    // one vector of all rows: partial Gram matrices per block, added in their order
    const int64_t blocks = B * ceil_div(L, rows);
    std::vector<double> part(blocks * M * M, 0.0), total(M * M, 0.0), weight(M);
    each_block(B, L, rows, [&](int64_t b, int64_t l0, int64_t n, int64_t k) {
      double* gram = scratch<double>(kSums, n * M * M);
      kernels.gram_rows(x, b * stride_b, l0, n, gram);
      for (int64_t r = 0; r < n; ++r)
        for (int64_t e = 0; e < M * M; ++e) part[k * M * M + e] += gram[r * M * M + e];
    });
    for (int64_t k = 0; k < blocks; ++k)
      for (int64_t e = 0; e < M * M; ++e) total[e] += part[k * M * M + e];
    combination_weights(how, total.data(), weight.data());
    each_block(B, L, rows, [&](int64_t b, int64_t l0, int64_t n, int64_t) {
      kernels.combine_rows(x, b * stride_b, l0, n, weight.data(), 0, start(b, l0), out_d, out_l);
    });
    return out;
  });
}

}  // namespace medcl
