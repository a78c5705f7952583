// Run-time choices: instruction set and GEMM.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/filter.h"
#include "cpu/patch_kernels.h"
#include "cpu/tile.h"

extern "C" {
// libtorch_cpu exports its BLAS where it is MKL (x86 wheels) or OpenBLAS; weak, because neither is promised.
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
            const float*, const int*, const float*, float*, const int*) __attribute__((weak));
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*) __attribute__((weak));
int MKL_Set_Num_Threads_Local(int) __attribute__((weak));
}

namespace medcl {

#define MEDCL_DECLARE(isa)                       \
  namespace isa {                                \
  const TileKernels<float>& table_f32();         \
  const TileKernels<double>& table_f64();        \
  const FilterKernels<float>& filter_f32();      \
  const FilterKernels<double>& filter_f64();     \
  const PatchKernels<float>& patch_table_f32();  \
  const PatchKernels<double>& patch_table_f64(); \
  }
MEDCL_DECLARE(base)
#ifdef MEDCL_X86
MEDCL_DECLARE(avx2)
MEDCL_DECLARE(avx512)
#endif

namespace {
constexpr const char* names[] = {"base", "avx2", "avx512"};

int best_level() {
#ifdef MEDCL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

bool have_blas() { return &sgemm_ != nullptr && &dgemm_ != nullptr; }

int level = best_level();

// MKL's products of tiles are slower than those of the instruction set's own kernel where the processor is not Intel's
// (docs/performance.md). Of other BLAS libraries nothing is known that speaks against them.
bool blas_is_quicker() {
#ifdef MEDCL_X86
  return level < 2 || __builtin_cpu_is("intel") || &MKL_Set_Num_Threads_Local == nullptr;
#else
  return true;
#endif
}

bool use_blas = have_blas() && blas_is_quicker();

void blas(const char* ta, const char* tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
          int ldb, float beta, float* c, int ldc) {
  sgemm_(ta, tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
void blas(const char* ta, const char* tb, int m, int n, int k, double alpha, const double* a, int lda, const double* b,
          int ldb, double beta, double* c, int ldc) {
  dgemm_(ta, tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
}  // namespace

const char* capability() { return names[level]; }
const char* gemm_name() { return use_blas ? "blas" : "portable"; }

const char* set_capability(const char* name) {
  const int best = best_level();
  level = best;
  for (int i = 0; i <= best; ++i)
    if (!std::strcmp(name, names[i])) level = i;
  return capability();
}

const char* set_gemm(const char* name) {
  use_blas = have_blas() && (*name ? std::strcmp(name, "portable") != 0 : blas_is_quicker());
  return gemm_name();
}

// the table of the instruction set in force
#ifdef MEDCL_X86
#define MEDCL_PICK(table) (level == 2 ? avx512::table() : level == 1 ? avx2::table() : base::table())
#else
#define MEDCL_PICK(table) base::table()
#endif
template <>
const TileKernels<float>& tile_kernels<float>() {
  return MEDCL_PICK(table_f32);
}
template <>
const TileKernels<double>& tile_kernels<double>() {
  return MEDCL_PICK(table_f64);
}
template <>
const FilterKernels<float>& filter_kernels<float>() {
  return MEDCL_PICK(filter_f32);
}
template <>
const FilterKernels<double>& filter_kernels<double>() {
  return MEDCL_PICK(filter_f64);
}
template <>
const PatchKernels<float>& patch_kernels<float>() {
  return MEDCL_PICK(patch_table_f32);
}
template <>
const PatchKernels<double>& patch_kernels<double>() {
  return MEDCL_PICK(patch_table_f64);
}

constexpr int64_t kChain = 64;

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
          int64_t b_col, T beta, T* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
  if (!use_blas || n <= kSlim)
    return tile_kernels<T>().gemm(m, n, k, alpha, a, a_row, a_col, b, b_row, b_col, beta, c, ldc);
  // BLAS is column-major: C^T = B^T A^T, so a row-major factor goes in as it lies
  const bool a_plain = a_col == 1 && a_row >= k, b_plain = b_col == 1 && b_row >= n;
  const auto product = [&](int64_t first, int64_t count, T keep, T* to, int64_t ld) {
    blas(b_plain ? "N" : "T", a_plain ? "N" : "T", static_cast<int>(n), static_cast<int>(m), static_cast<int>(count),
         alpha, b + first * b_row, static_cast<int>(b_plain ? b_row : b_col), a + first * a_col,
         static_cast<int>(a_plain ? a_row : a_col), keep, to, static_cast<int>(ld));
  };
  // float64 is asked for accuracy: a BLAS may add up in one chain that starts at C, so sums are kept short here
  if (sizeof(T) == 4 || (k <= kChain && beta == T(0))) return product(0, k, beta, c, ldc);
  thread_local std::vector<T> part;
  part.resize(m * n);
  for (int64_t first = 0; first < k; first += kChain, beta = T(1)) {
    product(first, std::min(kChain, k - first), T(0), part.data(), n);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = part[i * n + j] + (beta == T(0) ? T(0) : beta * c[i * ldc + j]);
  }
}
template void gemm(int64_t, int64_t, int64_t, float, const float*, int64_t, int64_t, const float*, int64_t, int64_t,
                   float, float*, int64_t);
template void gemm(int64_t, int64_t, int64_t, double, const double*, int64_t, int64_t, const double*, int64_t, int64_t,
                   double, double*, int64_t);

OneBlasThread::OneBlasThread() {
  if (&MKL_Set_Num_Threads_Local) previous_ = MKL_Set_Num_Threads_Local(1);
}
OneBlasThread::~OneBlasThread() {
  if (&MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(previous_);
}

}  // namespace medcl
