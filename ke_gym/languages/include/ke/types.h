// Storage types for bfloat16 and half: kernels load them as float, compute in float, and store with one
// rounding (to nearest, ties to even; NaN stays NaN). The conversions are integer arithmetic without branches
// because GCC 12 has no vector conversion for its own _Float16 without AVX512-FP16, and no __bf16 in C++. The
// assignments are spelled out because GCC does not vectorize the copying of a struct.
#pragma once
#include <cstdint>

namespace ke {

struct bf16 {
  uint16_t bits;

  bf16() = default;
  bf16(const bf16&) = default;
  inline __attribute__((always_inline)) bf16& operator=(const bf16& other) {
    bits = other.bits;
    return *this;
  }
  inline __attribute__((always_inline)) bf16(float x) {
    uint32_t u = __builtin_bit_cast(uint32_t, x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    bits = (uint16_t)(x != x ? 0x7fc0u : rounded);
  }
  inline __attribute__((always_inline)) operator float() const {
    return __builtin_bit_cast(float, (uint32_t)bits << 16);
  }
};

struct half {
  uint16_t bits;

  half() = default;
  half(const half&) = default;
  inline __attribute__((always_inline)) half& operator=(const half& other) {
    bits = other.bits;
    return *this;
  }
  inline __attribute__((always_inline)) half(float x) {
    uint32_t u = __builtin_bit_cast(uint32_t, x), a = u & 0x7fffffffu;
    uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
    // Below 2^-14 the sum with 1/2 has a half's subnormal spacing, 2^-24: the addition rounds.
    uint32_t tiny = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, a) + 0.5f) - 0x3f000000u;
    uint32_t h = a < 0x38800000u ? tiny : normal;
    h = a >= 0x477ff000u ? 0x7c00u : h;  // 65520 and up: infinite
    h = a > 0x7f800000u ? 0x7e00u : h;
    bits = (uint16_t)(h | ((u >> 16) & 0x8000u));
  }
  inline __attribute__((always_inline)) operator float() const {
    uint32_t a = ((uint32_t)bits & 0x7fffu) << 13;
    uint32_t scaled = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, a) * 0x1p112f);
    scaled = a >= 0x0f800000u ? a | 0x7f800000u : scaled;  // infinity and NaN
    return __builtin_bit_cast(float, scaled | ((uint32_t)bits & 0x8000u) << 16);
  }
};

static_assert(sizeof(bf16) == 2 && sizeof(half) == 2);

}  // namespace ke
