// Counts of labels in boxes of a map. Part of patch_kernels_impl.h: compiled once per instruction set.
#include <algorithm>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/patch_kernels.h"

namespace medcl {
namespace MEDCL_ISA {

#if defined(__AVX512BW__)
constexpr bool kPartialLoads = true;  // a vector may end before its last lane without reading it
constexpr int64_t kByteLanes = 64;
#elif defined(__AVX2__)
constexpr bool kPartialLoads = false;
constexpr int64_t kByteLanes = 32;
#else
constexpr bool kPartialLoads = false;
constexpr int64_t kByteLanes = 16;
#endif
static_assert(kByteLanes <= kLabelPadding && kByteLanes <= 64, "a vector of a row's end stays in its padding");

// Labels as bytes. What is no byte becomes 255, which is no class where there are at most 255 of them; may write up to
// a vector's end.
template <class S>
static inline void narrow_row(const S* p, int64_t stride, int64_t n, uint8_t* out) {
  auto byte = [](S v) {
    const uint64_t wide = static_cast<uint64_t>(static_cast<int64_t>(v));
    return static_cast<uint8_t>(wide < 255 ? wide : 255);
  };
  if (stride == 1)
    for (int64_t z = 0; z < n; ++z) out[z] = byte(p[z]);
  else
    for (int64_t z = 0; z < n; ++z) out[z] = byte(p[z * stride]);
}
#if defined(__AVX512BW__)
static inline void narrow_row(const int64_t* p, int64_t stride, int64_t n, uint8_t* out) {
  if (stride != 1) return narrow_row<int64_t>(p, stride, n, out);
  for (int64_t z = 0; z < n; z += 8) {
    const __mmask8 in = n - z >= 8 ? 0xff : (1 << (n - z)) - 1;
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + z), _mm512_cvtusepi64_epi8(_mm512_maskz_loadu_epi64(in, p + z)));
  }
}
static inline void narrow_row(const int32_t* p, int64_t stride, int64_t n, uint8_t* out) {
  if (stride != 1) return narrow_row<int32_t>(p, stride, n, out);
  for (int64_t z = 0; z < n; z += 16) {
    const __mmask16 in = n - z >= 16 ? 0xffff : (1 << (n - z)) - 1;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + z), _mm512_cvtusepi32_epi8(_mm512_maskz_loadu_epi32(in, p + z)));
  }
}
#endif

// counts[k - 1] += cells that equal k, in rows of bytes; without partial loads these are readable to a vector's end.
static inline void count_bytes(const uint8_t* p, int64_t ld, int64_t rows, int64_t n, int64_t classes,
                               int32_t* counts) {
  for (int64_t k = 1; k < classes; ++k) {
    int64_t found = 0;
#if defined(__AVX512BW__) || defined(__AVX2__)
    for (int64_t z = 0; z < n; z += kByteLanes) {
      const int64_t in = std::min(kByteLanes, n - z);
      const uint64_t mask = ~uint64_t{0} >> (64 - in);
      for (int64_t y = 0; y < rows; ++y) {
        const uint8_t* at = p + y * ld + z;
#if defined(__AVX512BW__)
        const __m512i v = _mm512_maskz_loadu_epi8(mask, at);
        found += __builtin_popcountll(_mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(static_cast<char>(k))));
#else
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const __m256i equal = _mm256_cmpeq_epi8(v, _mm256_set1_epi8(static_cast<char>(k)));
        found += __builtin_popcountll(static_cast<uint32_t>(_mm256_movemask_epi8(equal)) & mask);
#endif
      }
    }
#else
    for (int64_t y = 0; y < rows; ++y) {
      const uint8_t* row = p + y * ld;
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t z = 0; z < n; ++z) sum += row[z] == k;
      found += sum;
    }
#endif
    counts[k - 1] += static_cast<int32_t>(found);
  }
}

#if defined(__AVX512BW__)
// Of int64 labels below 8 every lane keeps a byte per class: 1 << 8 v, which is 0 for all other labels, summed up.
constexpr int64_t kPackedClasses = 8;
static inline void unpack_counts(__m512i sums, int64_t classes, int32_t* counts) {
  for (int64_t k = 1; k < classes; ++k) {
    const __m512i one = _mm512_and_si512(sums, _mm512_set1_epi64(static_cast<int64_t>(uint64_t{255} << (8 * k))));
    counts[k - 1] += static_cast<int32_t>(_mm512_reduce_add_epi64(_mm512_sad_epu8(one, _mm512_setzero_si512())));
  }
}
static inline void count_packed(const int64_t* p, int64_t ld, int64_t rows, int64_t n, int64_t classes, int64_t ahead,
                                int32_t* counts) {
  constexpr int64_t columns = 1024, most = 255;  // columns in one go, additions that a byte can hold
  const __m512i one = _mm512_set1_epi64(1), none = _mm512_set1_epi64(kPackedClasses);
  for (int64_t z0 = 0; z0 < n; z0 += columns) {
    const int64_t w = std::min(columns, n - z0), vectors = (w + 7) / 8;
    const __mmask8 end = static_cast<__mmask8>(0xff >> (8 * vectors - w));
    __m512i sums = _mm512_setzero_si512();
    int64_t added = 0;
    const auto add = [&](__m512i v) {
      const __m512i bit = _mm512_slli_epi64(_mm512_min_epu64(v, none), 3);
      sums = _mm512_add_epi64(sums, _mm512_sllv_epi64(one, bit));
    };
    for (int64_t y = 0; y < rows; ++y) {
      const int64_t* row = p + y * ld + z0;
      if (added + vectors > most) {
        unpack_counts(sums, classes, counts);
        sums = _mm512_setzero_si512();
        added = 0;
      }
      added += vectors;
      for (int64_t z = 0; z < vectors - 1; ++z) {
        __builtin_prefetch(row + ahead + 8 * z, 0, 1);
        add(_mm512_loadu_si512(row + 8 * z));
      }
      __builtin_prefetch(row + ahead + 8 * (vectors - 1), 0, 1);
      __builtin_prefetch(row + ahead + w - 1, 0, 1);
      add(_mm512_maskz_loadu_epi64(end, row + 8 * (vectors - 1)));
    }
    unpack_counts(sums, classes, counts);
  }
}
#endif

// Rows of a box become bytes in L1 and are counted there; what comes next is on its way to L2 meanwhile. Boxes take
// turns plane by plane, so that a page of memory is done with when it is left.
template <class S>
static inline void count_labels(const S* p, const int64_t* stride, const int64_t* size, const int64_t* at,
                                int64_t boxes, int64_t classes, int32_t* counts) {
  constexpr int64_t columns = 1024, bytes = 8 * columns, line = 64 / int64_t{sizeof(S)};
  const int64_t per_box = classes - 1;
  // a comparison per class and row, or an increment per cell
  const int64_t comparisons = per_box * ((size[2] + kByteLanes - 1) / kByteLanes);
  if (classes > kByteClasses || comparisons > 2 * size[2]) {
    for (int64_t b = 0; b < boxes; ++b)
      for (int64_t x = 0; x < size[0]; ++x)
        for (int64_t y = 0; y < size[1]; ++y)
          for (int64_t z = 0; z < size[2]; ++z) {
            const int64_t k = static_cast<int64_t>(p[at[b] + x * stride[0] + y * stride[1] + z * stride[2]]);
            if (k > 0 && k < classes) ++counts[b * per_box + k - 1];
          }
    return;
  }
  if constexpr (kPartialLoads && sizeof(S) == 1)
    if (stride[2] == 1) {
      if (std::is_signed_v<S>) classes = std::min<int64_t>(classes, 128);  // the bytes from 128 on are negative
      for (int64_t x = 0; x < size[0]; ++x)
        for (int64_t b = 0; b < boxes; ++b)
          count_bytes(reinterpret_cast<const uint8_t*>(p) + at[b] + x * stride[0], stride[1], size[1], size[2], classes,
                      counts + b * per_box);
      return;
    }
  const auto ahead_of = [&](int64_t b) { return (b + 1 == boxes ? at[0] + stride[0] : at[b + 1]) - at[b]; };
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<S, int64_t>)
    if (stride[2] == 1 && classes <= kPackedClasses) {
      for (int64_t x = 0; x < size[0]; ++x)
        for (int64_t b = 0; b < boxes; ++b)
          count_packed(p + at[b] + x * stride[0], stride[1], size[1], size[2], classes, ahead_of(b),
                       counts + b * per_box);
      return;
    }
#endif
  alignas(64) uint8_t block[bytes + kLabelPadding];
  for (int64_t x = 0; x < size[0]; ++x)
    for (int64_t b = 0; b < boxes; ++b)
      for (int64_t z0 = 0; z0 < size[2]; z0 += columns) {
        const int64_t w = std::min(columns, size[2] - z0);
        const int64_t ld = (w + kLabelPadding - 1) / kLabelPadding * kLabelPadding, fit = bytes / ld;
        for (int64_t y0 = 0; y0 < size[1]; y0 += fit) {
          const int64_t h = std::min(fit, size[1] - y0);
          for (int64_t y = 0; y < h; ++y) {
            const S* row = p + at[b] + x * stride[0] + (y0 + y) * stride[1] + z0 * stride[2];
            if (stride[2] == 1)
              for (int64_t z = 0; z < w + line - 1; z += line)
                __builtin_prefetch(row + ahead_of(b) + std::min(z, w - 1), 0, 1);
            narrow_row(row, stride[2], w, block + y * ld);
          }
          count_bytes(block, ld, h, w, classes, counts + b * per_box);
        }
      }
}

// f(labels as what they are)
template <class F>
static inline void with_labels(const void* p, IntType type, F&& f) {
  switch (type) {
    case IntType::u8:
      return f(static_cast<const uint8_t*>(p));
    case IntType::i8:
      return f(static_cast<const int8_t*>(p));
    case IntType::i16:
      return f(static_cast<const int16_t*>(p));
    case IntType::i32:
      return f(static_cast<const int32_t*>(p));
    case IntType::i64:
      return f(static_cast<const int64_t*>(p));
  }
}

static inline void count_classes(const void* p, IntType type, const int64_t* stride, const int64_t* size,
                                 const int64_t* at, int64_t boxes, int64_t classes, int32_t* counts) {
  with_labels(p, type, [&](auto labels) { count_labels(labels, stride, size, at, boxes, classes, counts); });
}

static inline void narrow_labels(const void* p, IntType type, int64_t stride, int64_t n, uint8_t* out) {
  with_labels(p, type, [&](auto labels) { narrow_row(labels, stride, n, out); });
}

}  // namespace MEDCL_ISA
}  // namespace medcl
