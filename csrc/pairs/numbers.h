// Element-wise arithmetic that the CPU and CUDA kernels share: 16-bit floats, exp, log1p. Inline, no library calls in a
// loop.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEDCL_HD __host__ __device__ __forceinline__
#else
// always inlined: three instruction sets compile this header, and the linker must not merge their copies
#define MEDCL_HD static inline __attribute__((always_inline))
#endif

namespace medcl {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
MEDCL_HD To bit_copy(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

MEDCL_HD float bf16_to_float(Bf16 x) { return bit_copy<float>(static_cast<uint32_t>(x.bits) << 16); }

MEDCL_HD Bf16 float_to_bf16(float x) {  // round to nearest even; a NaN stays a quiet NaN
  const uint32_t u = bit_copy<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return Bf16{static_cast<uint16_t>(nan ? (u >> 16) | 0x40u : rounded)};
}

MEDCL_HD float half_to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t body = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = body & 0x0f800000u;
  // a normal number moves its exponent by 112; inf and NaN by 112 more; a subnormal is renormalised by a subtraction
  const float normal = bit_copy<float>(body + 0x38000000u);
  const float special = bit_copy<float>(body + 0x70000000u);
  const float small = bit_copy<float>(body + 0x38800000u) - bit_copy<float>(0x38800000u);
  float value = exponent == 0x0f800000u ? special : normal;
  value = exponent == 0 ? small : value;
  return bit_copy<float>(bit_copy<uint32_t>(value) | sign);
}

MEDCL_HD Half float_to_half(float x) {  // round to nearest even, overflow to inf
  const uint32_t u = bit_copy<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477ff000u) {
    h = 0x7c00u;
  } else if (a < 0x38800000u) {  // subnormal: let the float adder round
    const float v = bit_copy<float>(a) + 0.5f;
    h = bit_copy<uint32_t>(v) - 0x3f000000u;
  } else {
    h = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13;
  }
  return Half{static_cast<uint16_t>(sign | h)};
}

// e^f for |f| <= ln(2)/2: a minimax polynomial of our own fit (float), Taylor to 1/13! (double).
MEDCL_HD float exp_reduced(float f) {
  float p = 1.381453988e-3f;
  p = p * f + 8.368745127e-3f;
  p = p * f + 4.166839079e-2f;
  p = p * f + 1.666652040e-1f;
  p = p * f + 4.999999343e-1f;
  p = p * f + 1.0f;
  return p * f + 1.0f;
}
MEDCL_HD double exp_reduced(double f) {
  double p = 1.6059043836821613e-10;  // 1/13!
  p = p * f + 2.0876756987868099e-09;
  p = p * f + 2.5052108385441719e-08;
  p = p * f + 2.7557319223985891e-07;
  p = p * f + 2.7557319223985893e-06;
  p = p * f + 2.4801587301587302e-05;
  p = p * f + 1.9841269841269841e-04;
  p = p * f + 1.3888888888888889e-03;
  p = p * f + 8.3333333333333332e-03;
  p = p * f + 4.1666666666666664e-02;
  p = p * f + 1.6666666666666666e-01;
  p = p * f + 0.5;
  p = p * f + 1.0;
  return p * f + 1.0;
}
// the nearest integer, and 2^n for n in the exponent range; one below the smallest exponent gives 0
MEDCL_HD int32_t nearest(float x) { return static_cast<int32_t>(x + __builtin_copysignf(0.5f, x)); }
MEDCL_HD int32_t nearest(double x) { return static_cast<int32_t>(x + __builtin_copysign(0.5, x)); }
MEDCL_HD float power_of_two(int32_t n, float) { return bit_copy<float>((n + 127) << 23); }
MEDCL_HD double power_of_two(int32_t n, double) { return bit_copy<double>(static_cast<int64_t>(n + 1023) << 52); }

// exp(x) and 2^x: 0 below the smallest normal number; arguments beyond the overflow bound are clamped to it; NaN stays
// NaN. No branch and no select on the result: gcc would thread the two tests into control flow, and the loops around
// these would stay scalar.
template <class T>
MEDCL_HD T exp_poly(T x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T bound = single ? T(88) : T(709);
  T y = x < -bound ? -bound : x;
  y = y > bound ? bound : y;
  const int32_t n = nearest(y * T(1.4426950408889634));
  // ln(2) in two parts, so that k ln(2) is exact enough to cancel against y
  constexpr T high = single ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  const T k = static_cast<T>(n);
  return exp_reduced((y - k * high) - k * low) * power_of_two(n, T());
}

template <class T>
MEDCL_HD T exp2_poly(T x) {
  constexpr T bound = sizeof(T) == 4 ? T(127) : T(1023);
  T y = x < -bound ? -bound : x;
  y = y > bound ? bound : y;
  const int32_t n = nearest(y);
  return exp_reduced((y - static_cast<T>(n)) * T(6.93147180559945309417e-01)) * power_of_two(n, T());
}

}  // namespace medcl
