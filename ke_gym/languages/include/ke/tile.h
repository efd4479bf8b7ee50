// Register tiles: the parts that gemm.h, conv.h and attention.h are made of.
//
// A product C[M,N] = A[M,K] * B[K,N] is cut into tiles of MR x NR elements that live in vector registers.
// Both operands are first packed into *panels*: MR rows of A (NR columns of B) stored k-major, so that the
// inner loop reads both as one stream (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008). Written with the vector extensions that GCC and Clang share: the same text gives
// AVX-512, AVX2, SSE or NEON code.
#pragma once

#include "types.h"

#include <cstdint>
#include <cstdlib>
#include <utility>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace ke {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif

#define KE_FORCE_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define KE_UNROLL _Pragma("unroll")
#else
#define KE_UNROLL _Pragma("GCC unroll 64")
#endif

// A full vector register of T, and how many T it holds.
template <class T>
struct vector_of {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T>
using vec = typename vector_of<T>::type;
template <class T>
inline constexpr int lanes = vector_bytes / int(sizeof(T));

template <class T>
KE_FORCE_INLINE vec<T> load(const T* p) {
  vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
KE_FORCE_INLINE void store(T* p, vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Two bf16 that neighbour along k in one 32-bit unit: the operand of the bf16 dot-product instruction.
// As the compute type of a tile it asks for that matrix unit (a lower precision: only where allowed).
struct bf16_pair {};

// What a compute type accumulates in, what a packed element is, and how many k it covers.
template <class Compute>
struct arithmetic {
  using acc = Compute;
  using unit = Compute;
  static constexpr int k_per_unit = 1;
};
template <>
struct arithmetic<bf16_pair> {
  using acc = float;
  using unit = uint32_t;
  static constexpr int k_per_unit = 2;
};

KE_FORCE_INLINE uint32_t pair_bits(float low, float high) {
  return uint32_t(bf16(low).bits) | (uint32_t(bf16(high).bits) << 16);
}

// acc += a * b, elementwise; for bf16 pairs acc += a.low * b.low + a.high * b.high.
template <class T>
KE_FORCE_INLINE void multiply_add(vec<T>& acc, T a, vec<T> b) {
  acc += a * b;
}
KE_FORCE_INLINE void multiply_add(vec<float>& acc, uint32_t a, vec<uint32_t> b) {
#if defined(__AVX512BF16__)
  acc = (vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
#else
  const uint32_t high = 0xffff0000u;
  const vec<uint32_t> a_low = a << 16 | vec<uint32_t>{}, a_high = (a & high) | vec<uint32_t>{};
  acc += (vec<float>)a_low * (vec<float>)(b << 16) + (vec<float>)a_high * (vec<float>)(b & high);
#endif
}

// C[MR, NV vectors] (+)= A * B over k units, the sums in registers. Element (r, p) of A is
// a[r * RowStride + p * UnitStride] (packed: 1 and MR); row p of B starts at b_row(p).
template <class Compute, int MR, int NV, int RowStride, int UnitStride, class BRow>
KE_FORCE_INLINE void micro_tile(int64_t k, const typename arithmetic<Compute>::unit* __restrict a, BRow b_row,
                                typename arithmetic<Compute>::acc* __restrict c, int64_t c_stride,
                                bool accumulate) {
  using acc_t = typename arithmetic<Compute>::acc;
  using unit_t = typename arithmetic<Compute>::unit;
  constexpr int L = lanes<acc_t>;
  vec<acc_t> sum[MR][NV] = {};
  for (int64_t p = 0; p < k; ++p) {
    const unit_t* b = b_row(p);
    vec<unit_t> row[NV];
    KE_UNROLL for (int v = 0; v < NV; ++v) row[v] = load(b + v * L);
    KE_UNROLL for (int r = 0; r < MR; ++r) {
      const unit_t x = a[r * RowStride];
      KE_UNROLL for (int v = 0; v < NV; ++v) multiply_add(sum[r][v], x, row[v]);
    }
    a += UnitStride;
  }
  KE_UNROLL for (int r = 0; r < MR; ++r) {
    KE_UNROLL for (int v = 0; v < NV; ++v) {
      acc_t* out = c + r * c_stride + v * L;
      store(out, accumulate ? load(out) + sum[r][v] : sum[r][v]);
    }
  }
}

namespace detail {
// One butterfly step of a square transpose in registers: swap the off-diagonal blocks of size S.
template <int S, class V, int... I>
KE_FORCE_INLINE void swap_blocks(V& x, V& y, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  const V low = __builtin_shufflevector(x, y, ((I & S) ? L + I - S : I)...);
  y = __builtin_shufflevector(x, y, ((I & S) ? L + I : I + S)...);
  x = low;
}
template <int S, class T>
KE_FORCE_INLINE void transpose_step(vec<T> (&rows)[lanes<T>]) {
  if constexpr (S < lanes<T>) {
    KE_UNROLL for (int i = 0; i < lanes<T>; ++i) {
      if (!(i & S)) swap_blocks<S>(rows[i], rows[i + S], std::make_integer_sequence<int, lanes<T>>());
    }
    transpose_step<S * 2, T>(rows);
  }
}
}  // namespace detail

// Transposes a square block (lanes x lanes) held in registers.
template <class T>
KE_FORCE_INLINE void transpose(vec<T> (&rows)[lanes<T>]) {
  detail::transpose_step<1, T>(rows);
}

// Memory that a thread keeps between calls: no allocation and no page fault once it has grown.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  template <class T>
  T* reserve(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + 256 + 4095) / 4096 * 4096;
    if (bytes > bytes_) {
      std::free(data_);
      data_ = std::aligned_alloc(4096, size_t(bytes));
      if (!data_) std::abort();
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// The scratch number `Slot` of this thread (the caller's may be shared with the threads of its region).
template <int Slot>
inline Scratch& scratch() {
  static thread_local Scratch buffer;
  return buffer;
}

KE_FORCE_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KE_FORCE_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
KE_FORCE_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace ke
