// Stores past the caches, for large results that nobody reads again soon: the lines they overwrite are not read.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ke {

// to[0..n) = from[0..n). `from` is aligned to 64 bytes.
template <class T>
inline void write_past_caches(T* __restrict to, const T* __restrict from, int64_t n) {
#if defined(__SSE2__)
  int64_t i = 0;
  const int64_t head = (-(intptr_t)to & 63) / (int64_t)sizeof(T);
  for (; i < head && i < n; ++i) to[i] = from[i];
  constexpr int64_t line = 64 / sizeof(T);
  for (; i + line <= n; i += line) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
    for (int part = 0; part < 2; ++part) {
      _mm256_stream_si256((__m256i*)(to + i) + part, _mm256_loadu_si256((const __m256i*)(from + i) + part));
    }
#else
    for (int part = 0; part < 4; ++part) {
      _mm_stream_si128((__m128i*)(to + i) + part, _mm_loadu_si128((const __m128i*)(from + i) + part));
    }
#endif
  }
  for (; i < n; ++i) to[i] = from[i];
  _mm_sfence();
#else
  std::memcpy(to, from, n * sizeof(T));
#endif
}

}  // namespace ke
