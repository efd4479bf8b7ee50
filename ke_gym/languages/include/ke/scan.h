// Running sums of a row, with the accuracy of a sum in double.
//
// Eight elements at a time: prefixes in three shifted additions (Hillis and Steele, "Data Parallel Algorithms",
// 1986), to which the sum of what came before is added. The chain from one block to the next is one addition.
#pragma once
#include <cstdint>

namespace ke {

namespace detail {

typedef double block __attribute__((vector_size(64)));
typedef float narrow_block __attribute__((vector_size(32)));

// value[k] += value[k - Shift].
#define KE_SHIFTED(value, a, b, c, d, e, f, g, h) \
  value += __builtin_shufflevector(value, block{}, a, b, c, d, e, f, g, h)

static inline __attribute__((always_inline)) block prefixes(block value) {
  KE_SHIFTED(value, 8, 0, 1, 2, 3, 4, 5, 6);
  KE_SHIFTED(value, 8, 8, 0, 1, 2, 3, 4, 5);
  KE_SHIFTED(value, 8, 8, 8, 8, 0, 1, 2, 3);
  return value;
}

#undef KE_SHIFTED

}  // namespace detail

// sums[k] = row[0] + ... + row[k] for k in [0, size); of the flipped row if Flipped. `sums` may be `row` if not.
template <bool Flipped = false>
static inline void prefix_sum(float* sums, const float* row, int64_t size) {
  using namespace detail;
  block before = {};
  int64_t k = 0;
  for (; k + 8 <= size; k += 8) {
    narrow_block values;
    __builtin_memcpy(&values, Flipped ? row + (size - 8 - k) : row + k, sizeof values);
    if constexpr (Flipped) values = __builtin_shufflevector(values, values, 7, 6, 5, 4, 3, 2, 1, 0);
    const block inside = prefixes(__builtin_convertvector(values, block));
    values = __builtin_convertvector(before + inside, narrow_block);
    __builtin_memcpy(sums + k, &values, sizeof values);
    before += __builtin_shufflevector(inside, inside, 7, 7, 7, 7, 7, 7, 7, 7);
  }
  double sum = before[0];
  for (const int64_t rest = size % 8, end = k + rest; rest && k < end; ++k) {
    sums[k] = (float)(sum += row[Flipped ? size - 1 - k : k]);
  }
}

}  // namespace ke
