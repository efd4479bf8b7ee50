// Moving rows between memory and caches.
#pragma once
#include <cstdint>

namespace ke {

// Ask for `count` elements from `start` on, which may lie beyond the end.
template <typename T>
static inline __attribute__((always_inline)) void prefetch(const T* start, int64_t count) {
  for (int64_t k = 0; k < count; k += 64 / (int64_t)sizeof(T)) __builtin_prefetch(start + k);
}

// Copy a piece of a result that nobody reads soon: past the caches, so that memory is written without being read.
// There is no fence: other threads read it after a parallel region or a lock, whose locked instruction orders these
// stores too. Code that hands data on by plain stores needs `_mm_sfence()` first.
template <typename T>
static inline void stream_out(T* to, const T* from, int64_t count) {
  typedef long long line __attribute__((vector_size(64)));
  constexpr int64_t lanes = 64 / sizeof(T);
  int64_t k = 0;
  for (; k < count && (uintptr_t)(to + k) % 64; ++k) to[k] = from[k];
  for (; k + lanes <= count; k += lanes) {
    line values;
    __builtin_memcpy(&values, from + k, sizeof values);
#if defined(__clang__)
    __builtin_nontemporal_store(values, (line*)(to + k));
#elif defined(__AVX512F__)
    __builtin_ia32_movntdq512((line*)(to + k), values);
#elif defined(__AVX__)
    typedef long long part __attribute__((vector_size(32)));
    part parts[2];
    __builtin_memcpy(parts, &values, sizeof parts);
    __builtin_ia32_movntdq256((part*)(to + k), parts[0]);
    __builtin_ia32_movntdq256((part*)(to + k) + 1, parts[1]);
#else
    __builtin_memcpy(to + k, &values, sizeof values);
#endif
  }
  for (; k < count; ++k) to[k] = from[k];
}

}  // namespace ke
