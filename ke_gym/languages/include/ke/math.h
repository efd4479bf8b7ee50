// Elementary functions that a compiler can vectorize.
//
// Every function is inline and branch-free: choices are selects, table look-ups do not occur, and nothing calls
// libm, so a loop under `#pragma omp simd` becomes vector code with GCC and Clang alike. Infinities, NaN,
// overflow, underflow and subnormal numbers behave as in libm. Polynomials are minimax fits, on the reduced
// ranges given beside them, of W. J. Cody and W. Waite, "Software Manual for the Elementary Functions" (1980).
//
// Largest error in float, in units in the last place: exp, log, sin, cos, erf, sigmoid 2; expm1, log1p, tanh 3;
// pow 1. In double: exp, log, log1p, expm1 2; tanh 3. erf, pow, sin and cos of a double call libm (not vector code).
// sin and cos of a float hold for |x| <= 2^28.
#pragma once
#include <cstdint>

#define KE_INLINE static inline __attribute__((always_inline))

namespace ke {

constexpr float inf = __builtin_inff();
constexpr float nan = __builtin_nanf("");

// --- bits ---------------------------------------------------------------------------------------------------

KE_INLINE uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
KE_INLINE uint64_t bits(double x) { return __builtin_bit_cast(uint64_t, x); }
KE_INLINE float from_bits(uint32_t u) { return __builtin_bit_cast(float, u); }
KE_INLINE double from_bits(uint64_t u) { return __builtin_bit_cast(double, u); }

// 2^n for n in [-126, 127], in double [-1022, 1023]; only the low 9 (12) bits of n count.
KE_INLINE float exp2i(int32_t n) { return from_bits(((uint32_t)n + 127u) << 23); }
KE_INLINE double exp2i(int64_t n) { return from_bits(((uint64_t)n + 1023u) << 52); }

KE_INLINE float abs(float x) { return __builtin_fabsf(x); }
KE_INLINE double abs(double x) { return __builtin_fabs(x); }
KE_INLINE float copysign(float x, float sign) { return __builtin_copysignf(x, sign); }
KE_INLINE double copysign(double x, double sign) { return __builtin_copysign(x, sign); }

// As torch.maximum and torch.minimum: NaN if either is NaN.
template <typename T>
KE_INLINE T max(T a, T b) {
  T larger = a > b ? a : b;
  return a != a ? a : larger;
}
template <typename T>
KE_INLINE T min(T a, T b) {
  T smaller = a < b ? a : b;
  return a != a ? a : smaller;
}

// A bool in memory as 0 or 1: GCC vectorizes the load of a byte, but not that of a bool.
KE_INLINE uint8_t flag(const bool& stored) { return __builtin_bit_cast(uint8_t, stored); }

// Take a value into a running extreme, and note it if it is NaN: so a reduction is one instruction and a mask.
template <typename T, typename Flag>
KE_INLINE void take_max(T& extreme, Flag& nan, T value) {
  extreme = value > extreme ? value : extreme;
  nan |= value != value;
}
template <typename T, typename Flag>
KE_INLINE void take_min(T& extreme, Flag& nan, T value) {
  extreme = value < extreme ? value : extreme;
  nan |= value != value;
}
// The same of a value and a bound that is not NaN: one instruction.
template <typename T>
KE_INLINE T max_of(T value, T bound) { return bound > value ? bound : value; }
template <typename T>
KE_INLINE T min_of(T value, T bound) { return bound < value ? bound : value; }

KE_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
KE_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
KE_INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
KE_INLINE double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }

// --- exp ----------------------------------------------------------------------------------------------------

// e^r - 1 - r for |r| <= ln(2) / 2.
KE_INLINE float exp_tail(float r) {
  float p = 1.3950848e-3f;
  p = p * r + 8.3690965e-3f;
  p = p * r + 4.1666202e-2f;
  p = p * r + 1.66665167e-1f;
  p = p * r + 0.5f;
  return p * r * r;
}

KE_INLINE double exp_tail(double r) {
  double p = 1.3897152412901428e-09;
  p = p * r + 2.5049897823193913e-08;
  p = p * r + 2.758523731375769e-07;
  p = p * r + 2.7557446559037143e-06;
  p = p * r + 2.4801544745946816e-05;
  p = p * r + 1.984126963601884e-04;
  p = p * r + 1.3888888919438805e-03;
  p = p * r + 8.3333333334532095e-03;
  p = p * r + 4.1666666666565773e-02;
  p = p * r + 1.666666666666643e-01;
  p = p * r + 0.50000000000000111;
  return p * r * r;
}

// x = n ln(2) + r; ln(2) in two parts, the first short enough for n times it to be exact.
struct exp_parts_f { float n, r; };
struct exp_parts_d { double n, r; };

KE_INLINE exp_parts_f exp_reduce(float x) {
  float n = __builtin_rintf(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  return {n, r + n * 2.12194440e-4f};
}

KE_INLINE exp_parts_d exp_reduce(double x) {
  double n = __builtin_rint(x * 1.4426950408889634);
  double r = x - n * 6.93147180369123816490e-01;
  return {n, r - n * 1.90821492927058770002e-10};
}

// 2^n for n = rint(e) as it lies in the low bits of e + 1.5 * 2^23 (in double 2^52), in two factors: the product
// may be subnormal. No conversion to an integer: that of NaN or of a large value is undefined.
KE_INLINE float scaled(float y, float n) {
  int32_t low = (int32_t)bits(n + 12582912.0f), half = low >> 1;
  return y * exp2i(half) * exp2i(low - half);
}

KE_INLINE double scaled(double y, double n) {
  int64_t low = (int64_t)bits(n + 6755399441055744.0), half = low >> 1;
  return y * exp2i(half) * exp2i(low - half);
}

// Out of range the scale is nonsense, replaced at the end: a clamp at the start is torn apart by GCC's jump
// threading, these selects become masks.
KE_INLINE float exp(float x) {
  exp_parts_f e = exp_reduce(x);
  float y = scaled(1.0f + (e.r + exp_tail(e.r)), e.n);
  y = x < -104.0f ? 0.0f : y;
  return x > 88.72283f ? inf : y;
}

KE_INLINE double exp(double x) {
  exp_parts_d e = exp_reduce(x);
  double y = scaled(1.0 + (e.r + exp_tail(e.r)), e.n);
  y = x < -746.0 ? 0.0 : y;
  return x > 709.782712893384 ? (double)inf : y;
}

// e^x - 1 where 2^n is a normal number: for x in [-87, 88], in double [-708, 709].
KE_INLINE float expm1_normal(float x) {
  exp_parts_f e = exp_reduce(x);
  float scale = exp2i((int32_t)bits(e.n + 12582912.0f) - 1);  // half of 2^n, which overflows before e^x does
  float y = scale * (e.r + exp_tail(e.r)) + (scale - 0.5f);
  return y + y;
}

KE_INLINE double expm1_normal(double x) {
  exp_parts_d e = exp_reduce(x);
  double scale = exp2i((int64_t)bits(e.n + 6755399441055744.0) - 1);
  double y = scale * (e.r + exp_tail(e.r)) + (scale - 0.5);
  return y + y;
}

KE_INLINE float expm1(float x) {
  float y = expm1_normal(x);
  y = x < -20.0f ? -1.0f : y;
  y = x > 88.72283f ? inf : y;
  return x == 0.0f ? x : y;
}

KE_INLINE double expm1(double x) {
  double y = expm1_normal(x);
  y = x < -40.0 ? -1.0 : y;
  y = x > 709.782712893384 ? (double)inf : y;
  return x == 0.0 ? x : y;
}

// --- log ----------------------------------------------------------------------------------------------------

KE_INLINE float log(float x) {
  bool subnormal = x < 1.17549435e-38f;
  float y = subnormal ? x * 8388608.0f : x;
  int32_t e = (int32_t)(bits(y) - 0x3f3504f3u) >> 23;  // y = 2^e m, sqrt(1/2) <= m < sqrt(2)
  float f = from_bits(bits(y) - ((uint32_t)e << 23)) - 1.0f;
  float n = (float)(e - (subnormal ? 23 : 0));
  float p = 6.7466013e-2f;
  p = p * f - 1.16756409e-1f;
  p = p * f + 1.18881747e-1f;
  p = p * f - 1.24055915e-1f;
  p = p * f + 1.42195508e-1f;
  p = p * f - 1.66679963e-1f;
  p = p * f + 2.00021192e-1f;
  p = p * f - 2.50000089e-1f;
  p = p * f + 3.33333135e-1f;
  float square = f * f;
  float tail = p * (square * f) - n * 2.12194440e-4f;
  float value = (f - (0.5f * square - tail)) + n * 0.693359375f;
  value = x < inf ? value : x;  // infinity and NaN
  value = x < 0.0f ? nan : value;
  return x == 0.0f ? -inf : value;
}

KE_INLINE double log(double x) {
  bool subnormal = x < 2.2250738585072014e-308;
  double y = subnormal ? x * 4503599627370496.0 : x;
  // The exponent stays a small non-negative integer in the low bits of a double: no 64-bit conversion needed.
  uint64_t biased = (bits(y) - 0x3fe6a09e667f3bcd + (1024ull << 52)) >> 52;
  double f = from_bits(bits(y) - ((biased - 1024) << 52)) - 1.0;
  double n = from_bits(biased | 0x4330000000000000) - 4503599627370496.0 - 1024.0 - (subnormal ? 52.0 : 0.0);
  double s = f / (2.0 + f), z = s * s;  // log(1 + f) = 2 atanh(s)
  double p = 1.3407950066756827e-01;
  p = p * z + 1.3230806298983807e-01;
  p = p * z + 1.538805814966441e-01;
  p = p * z + 1.8181750492874973e-01;
  p = p * z + 2.2222223006760228e-01;
  p = p * z + 2.8571428566352286e-01;
  p = p * z + 4.0000000000015795e-01;
  p = p * z + 6.6666666666666652e-01;
  double square = 0.5 * f * f;
  double tail = s * (square + p * z) + n * 1.90821492927058770002e-10;
  double value = n * 6.93147180369123816490e-01 - ((square - tail) - f);
  value = x < (double)inf ? value : x;
  value = x < 0.0 ? (double)nan : value;
  return x == 0.0 ? -(double)inf : value;
}

// log(1 + x): log(u) with u = fl(1 + x), and what the rounding of u lost.
template <typename T>
KE_INLINE T log1p_of(T x) {
  T u = T(1) + x;
  T lost = (x - (u - T(1))) / u;  // NaN where u is zero or not finite
  T value = log(u) + (lost == lost ? lost : T(0));
  return x == T(0) ? x : value;
}
KE_INLINE float log1p(float x) { return log1p_of(x); }
KE_INLINE double log1p(double x) { return log1p_of(x); }

KE_INLINE float exp2(float x) { return (float)exp((double)x * 0.69314718055994531); }
KE_INLINE float log2(float x) { return (float)(log((double)x) * 1.4426950408889634); }
KE_INLINE float log10(float x) { return (float)(log((double)x) * 0.43429448190325183); }

// --- hyperbolic and error functions -------------------------------------------------------------------------

// (e^2|x| - 1) / (e^2|x| + 1)
KE_INLINE float tanh(float x) {
  float a = abs(x);
  float t = expm1_normal(a + a);
  float y = a > 10.0f ? 1.0f : t / (t + 2.0f);
  return copysign(y, x);
}

KE_INLINE double tanh(double x) {
  double a = abs(x);
  double t = expm1_normal(a + a);
  double y = a > 20.0 ? 1.0 : t / (t + 2.0);
  return copysign(y, x);
}

// 2^x where it is a normal number, for x in [-126, 127].
KE_INLINE float exp2_normal(float x) {
  float n = __builtin_rintf(x), r = x - n;
  float p = 1.535338e-4f;
  p = p * r + 1.3398881e-3f;
  p = p * r + 9.618437e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.931472e-1f;
  p = p * r + 1.0f;
  return p * exp2i((int32_t)bits(n + 12582912.0f));
}

KE_INLINE float erf(float x) {
  float a = abs(x), z = x * x;
  float p = 8.3167724e-5f;  // |x| <= 0.93: x + x P(x^2)
  p = p * z - 8.13001185e-4f;
  p = p * z + 5.19990642e-3f;
  p = p * z - 2.68589407e-2f;
  p = p * z + 1.12836875e-1f;
  p = p * z - 3.76126319e-1f;
  p = p * z + 1.28379166e-1f;
  float q = 2.844764e-4f;  // beyond: 1 - 2^Q(|x|), which is 1 from 3.92 on
  q = q * a - 4.4083423e-3f;
  q = q * a + 3.213917e-2f;
  q = q * a - 1.5009445e-1f;
  q = q * a - 9.1908264e-1f;
  q = q * a - 1.6269989f;
  q = q * a - 2.5602744e-4f;
  float tail = a > 4.0f ? 0.0f : exp2_normal(q);
  return a > 0.93f ? copysign(1.0f - tail, x) : p * x + x;
}

// The normal distribution's Phi(-a) = erfc(a / sqrt(2)) / 2 for a >= 0, to 5e-8: 2^Q(a), below 6e-9 from 5.7 on.
KE_INLINE float normal_tail(float a) {
  float q = -2.7721592e-6f;
  q = q * a + 3.8622085e-5f;
  q = q * a - 1.8255408e-4f;
  q = q * a - 1.4585396e-4f;
  q = q * a + 7.0754495e-3f;
  q = q * a - 5.2505013e-2f;
  q = q * a - 4.592049e-1f;
  q = q * a - 1.1511058f;
  q = q * a - 1.0f;
  return a > 5.7f ? 0.0f : exp2_normal(q);
}

KE_INLINE double erf(double x) { return __builtin_erf(x); }

// --- trigonometry -------------------------------------------------------------------------------------------

// sin(x + quarter pi / 2); the reduction runs in double, so that x up to 2^28 loses nothing.
KE_INLINE float sin_shifted(float x, double quarter) {
  double q = __builtin_rint((double)x * 0.63661977236758134);
  double reduced = ((double)x - q * 1.5707963267948966) - q * 6.1232339957367660e-17;
  q += quarter;
  float quadrant = (float)(q - 4.0 * __builtin_floor(q * 0.25));  // 0, 1, 2 or 3
  float r = (float)reduced, z = r * r;
  float s = 2.71797126e-6f;
  s = s * z - 1.98392969e-4f;
  s = s * z + 8.33332911e-3f;
  s = s * z - 1.66666672e-1f;
  s = s * (z * r) + r;
  float c = 2.4437006e-5f;
  c = c * z - 1.38873549e-3f;
  c = c * z + 4.16666456e-2f;
  c = c * z * z - (0.5f * z - 1.0f);
  float value = quadrant == 1.0f || quadrant == 3.0f ? c : s;
  return quadrant >= 2.0f ? -value : value;
}

KE_INLINE float sin(float x) { return x == 0.0f ? x : sin_shifted(x, 0.0); }
KE_INLINE float cos(float x) { return sin_shifted(x, 1.0); }
KE_INLINE double sin(double x) { return __builtin_sin(x); }
KE_INLINE double cos(double x) { return __builtin_cos(x); }

// --- pow ----------------------------------------------------------------------------------------------------

// |x|^y as exp(y log|x|) in double, then the sign and the cases IEEE 754 names.
KE_INLINE float pow(float x, float y) {
  float a = abs(x);
  float value = (float)exp((double)y * log((double)a));
  float half = 0.5f * y;
  float whole = __builtin_rintf(y) - y;  // zero, or NaN when y is infinite
  float odd = __builtin_rintf(half) - half;
  bool signbit = copysign(1.0f, x) < 0.0f;
  float negative = whole == 0.0f && odd != 0.0f ? -value : value;  // 0.5 * y is whole or not: parity
  negative = whole != 0.0f && a > 0.0f && a < inf && abs(y) < inf ? nan : negative;
  value = signbit ? negative : value;
  value = x != x || y != y ? x + y : value;
  value = a == 1.0f && abs(y) == inf ? 1.0f : value;
  return x == 1.0f || y == 0.0f ? 1.0f : value;
}

KE_INLINE double pow(double x, double y) { return __builtin_pow(x, y); }

// --- activations, as in torch.nn.functional ------------------------------------------------------------------

template <typename T>
KE_INLINE T sigmoid(T x) { return T(1) / (T(1) + exp(-x)); }
template <typename T>
KE_INLINE T silu(T x) { return x / (T(1) + exp(-x)); }
KE_INLINE float gelu(float x) {
  float tail = normal_tail(abs(x));
  return x * (x > 0.0f ? 1.0f - tail : tail);
}
KE_INLINE double gelu(double x) { return 0.5 * x * (1.0 + erf(x * 0.70710678118654752)); }
template <typename T>
KE_INLINE T gelu_tanh(T x) {
  return T(0.5) * x * (T(1) + tanh(T(0.79788456080286536) * (x + T(0.044715) * x * x * x)));
}
template <typename T>
KE_INLINE T softplus(T x) {
  T y = log1p(exp(x));
  return x > T(20) ? x : y;
}

}  // namespace ke
