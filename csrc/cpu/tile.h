// What the tile loops need from one instruction set: rows in, rows out, element-wise epilogues, a portable GEMM.
// Each table is compiled three times (kernels_{base,avx2,avx512}.cpp) and chosen once per process; no torch header
// here.
#pragma once
#include <cstdint>

namespace medcl {

enum class DType : int { f64, f32, f16, bf16 };
enum class Kind : int32_t { all, same, different };  // allowed candidates, relative to the anchor's label

// Rows of a strided tensor: element d of row r is data[offset[r] + d * stride_d].
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_d = 1, n = 0, dim = 0;
  const int64_t* offset = nullptr;
};

struct RowsOut {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_d = 1, n = 0, dim = 0;
  const int64_t* offset = nullptr;
};

// One label test per selection; codes are dense per selection, -1 = neither anchor nor candidate. Null codes: all
// valid.
struct Selection {
  int64_t count = 1;
  const Kind* kind = nullptr;
  const int32_t* row_code = nullptr;  // (count, row_stride), shifted to the tile's first row
  const int32_t* col_code = nullptr;  // (count, col_stride)
  int64_t row_stride = 0, col_stride = 0;
};

// How a tile is stored. GEMM speed depends on it: the right factor of S = A B^T is best channel-major when tiles are
// small, that of a gradient row-major always (docs/performance.md).
enum class Layout { row_major, channel_major };

// The largest block of a product that any instruction set keeps in registers (products_impl.h).
constexpr int64_t kVectorMost = 64, kPanelBytes = 4 * kVectorMost, kRowsMost = 6;

// A packed tile: n rows of dim values, element (r, d) at data[r * row + d * col]; one of the two strides is 1.
template <class T>
struct Tile {
  T* data = nullptr;
  int64_t row = 0, col = 0;
};

// A tile of E_ij = 2^(alpha <a_i, b_j> - shift_i): product and exponential in one pass over registers. Asked for are
// its sums, or E_ij (row_weight_i + col_weight_j).
template <class T>
struct ExpTile {
  int64_t m = 0, n = 0, dim = 0;
  Tile<T> a, b;  // both channel-major
  T alpha = 1;
  bool normal = false;  // no pair has an exponent below that of the smallest normal number
  const T* shift = nullptr;
  int64_t shift_stride = 0;
  int64_t own = kNoPair;  // E is 0 for the pairs (i, i + own)
  const T *row_weight = nullptr, *col_weight = nullptr;
  double *row_sum = nullptr, *col_sum = nullptr;  // added to; col_sum may be null
  T* out = nullptr;                               // null: E is not kept
  int64_t ld = 0;                                 // of out; a row is written to its last whole vector
  T* work = nullptr;                              // work_size(m, dim), aligned to 64 bytes
  static constexpr int64_t kNoPair = -(int64_t{1} << 40);
  // an odd number of cache lines, so that the rows of a tile do not compete for a few sets of L1
  static int64_t padded(int64_t n) { return ((n + 15) / 16 | 1) * 16; }
  static int64_t work_size(int64_t m, int64_t dim) {
    return (dim * kPanelBytes + m * kVectorMost) / int64_t{sizeof(T)} + dim * kRowsMost;
  }
};

template <class T>
struct TileKernels {
  // 1 / max(norm, 1e-12), and 0 for a zero row: its similarities and its gradient are 0
  void (*inverse_norm)(const Rows&, int64_t first, int64_t n, double* inverse);
  // rows [first, first + n), widened to T and times scale (null: 1)
  Tile<T> (*pack)(const Rows&, int64_t first, int64_t n, const double* scale, Layout, T* out);
  void (*unpack)(const T* tile, int64_t ld, const RowsOut&, int64_t first, int64_t n);
  void (*exp_tile)(const ExpTile<T>&);
  // s -> 2^(s - shift[i]); adds the row sums
  void (*exp_rows)(T* s, int64_t ld, int64_t m, int64_t n, const T* shift, double* row_sum);
  // out = E_ij (row_weight_i + col_weight_j)
  void (*weigh)(const T* e, int64_t e_ld, int64_t m, int64_t n, const T* row_weight, const T* col_weight, T* out,
                int64_t ld);
  // running maximum and sum of exp(s - maximum) per selection and row, both (count, stride)
  void (*online_sums)(const T* s, int64_t ld, int64_t m, int64_t n, const Selection&, T* maximum, double* sum,
                      int64_t stride);
  // s -> sum over selections of g_i exp(s - lse_i) + g_j exp(s - lse_j) on allowed pairs; null column terms: rows only
  void (*softmax_weights)(T* s, int64_t ld, int64_t m, int64_t n, const Selection&, const T* row_g, const T* row_lse,
                          const T* col_g, const T* col_lse);
  // adds sum over same-label pairs of log(e^s + e^tail_i) and of sigmoid(tail_i - s), (count, stride)
  void (*positive_log)(const T* s, int64_t ld, int64_t m, int64_t n, const Selection&, const T* negative, double* sum,
                       double* tail, int64_t stride);
  // s -> sum over selections of g_i sigmoid(s - negative_i) (+ the same of j) on same-label pairs
  void (*positive_log_weights)(T* s, int64_t ld, int64_t m, int64_t n, const Selection&, const T* row_g,
                               const T* row_negative, const T* col_g, const T* col_negative);
  T (*row_maximum)(const T* s, int64_t n);
  // y[i] = factor x[i] for i in [first, first + n), both of one dtype
  void (*scale)(const void* x, void* y, DType, int64_t first, int64_t n, T factor);
  // single rows of length n
  double (*dot)(const T* a, const T* b, int64_t n);
  void (*add_to_sum)(double* sum, const T* row, int64_t n, double weight);  // sum += weight row
  void (*add_row)(T* g, const T* a, int64_t n, T weight);                   // g += weight a
  void (*scale_row)(T* g, int64_t n, T factor);                             // g *= factor
  void (*project)(T* g, const T* z, int64_t n, T along, T factor);          // g = factor (g - along z)
  // C = alpha A B + beta C, C row-major (m, n); strides of A (m, k) and B (k, n) are free
  void (*gemm)(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b,
               int64_t b_row, int64_t b_col, T beta, T* c, int64_t ldc);
};

template <class T>
const TileKernels<T>& tile_kernels();

constexpr int64_t kSlim = 8;  // products of at most so many columns are no task for a BLAS

// GEMM through the BLAS that torch already loads, or the portable kernel where that is quicker or torch has none (or as
// MEDCL_GEMM says).
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, T beta, T* c, int64_t ldc);

// Keeps a threaded BLAS to one thread inside a tile loop, and its summation order with it.
class OneBlasThread {
 public:
  OneBlasThread();
  ~OneBlasThread();
  OneBlasThread(const OneBlasThread&) = delete;
  OneBlasThread& operator=(const OneBlasThread&) = delete;

 private:
  int previous_ = 0;
};

// Empty strings choose by what the machine and torch offer. Return what is in force, e.g. "avx512".
const char* set_capability(const char* name);
const char* set_gemm(const char* name);
const char* capability();
const char* gemm_name();

}  // namespace medcl
