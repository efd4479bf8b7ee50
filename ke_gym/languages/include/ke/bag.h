// Sums, means and maxima over bags of embedding rows, as torch's EmbeddingBag.
//
// A bag is a run of ids; its rows are read once, a few vectors of columns at a time with the running result in
// registers. Rows lie anywhere, so those of later ids (of this bag or the next) are asked for ahead of use.
#pragma once

#include "tile.h"

#include <omp.h>

namespace ke {

enum class Bag { sum, mean, max };

struct BagShape {
  int64_t bags, total, dim, row_stride;
};

namespace detail {

// acc[0..NV vectors) = the reduction of ids[begin..end) over the columns from `table` on; returns how many counted.
template <Bag Mode, int NV, int Ahead, class T, class Id>
KE_FORCE_INLINE int64_t reduce_rows(const BagShape& shape, const T* table, const Id* ids, const T* weights,
                                    int64_t begin, int64_t end, int64_t padding, T* acc) {
  constexpr int L = lanes<T>, line = 64 / int(sizeof(T));
  vec<T> sum[NV] = {};
  int64_t counted = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (Ahead && i + Ahead < shape.total) {
      const T* later = table + int64_t(ids[i + Ahead]) * shape.row_stride;
      for (int c = 0; c < NV * L; c += line) __builtin_prefetch(later + c);
    }
    if (int64_t(ids[i]) == padding) continue;
    const T* row = table + int64_t(ids[i]) * shape.row_stride;
    const T weight = weights ? weights[i] : T(1);
    KE_UNROLL for (int v = 0; v < NV; ++v) {
      const vec<T> value = load(row + v * L);
      if constexpr (Mode == Bag::max) {
        sum[v] = counted == 0 ? value : value > sum[v] ? value : sum[v];
      } else {
        sum[v] += value * weight;
      }
    }
    ++counted;
  }
  const T scale = Mode == Bag::mean && counted ? T(1) / T(counted) : T(1);
  KE_UNROLL for (int v = 0; v < NV; ++v) store(acc + v * L, sum[v] * scale);
  return counted;
}

// The same for `count` columns, fewer than a vector.
template <Bag Mode, class T, class Id>
inline void reduce_rest(const BagShape& shape, const T* table, const Id* ids, const T* weights, int64_t begin,
                        int64_t end, int64_t padding, int64_t count, T* acc) {
  int64_t counted = 0;
  for (int64_t c = 0; c < count; ++c) acc[c] = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (int64_t(ids[i]) == padding) continue;
    const T* row = table + int64_t(ids[i]) * shape.row_stride;
    for (int64_t c = 0; c < count; ++c) {
      if constexpr (Mode == Bag::max) {
        acc[c] = counted == 0 || row[c] > acc[c] ? row[c] : acc[c];
      } else {
        acc[c] += row[c] * (weights ? weights[i] : T(1));
      }
    }
    ++counted;
  }
  if (Mode == Bag::mean && counted) {
    for (int64_t c = 0; c < count; ++c) acc[c] *= T(1) / T(counted);
  }
}

}  // namespace detail

// epilogue(bag, column, count, acc) gets every stretch of finished columns once. `closed`: offsets[bags] is there.
// `weights` may be null. Threads take `share` bags at a time.
template <Bag Mode, int Ahead, class T, class Id, class Epilogue>
inline void embedding_bag(const BagShape& shape, const T* table, const Id* ids, const Id* offsets, const T* weights,
                          bool closed, int64_t padding, int64_t share, bool parallel, Epilogue&& epilogue) {
  constexpr int L = lanes<T>, NV = 8;
#pragma omp parallel for schedule(dynamic, share) if (parallel)
  for (int64_t bag = 0; bag < shape.bags; ++bag) {
    const int64_t begin = offsets[bag], end = closed || bag + 1 < shape.bags ? offsets[bag + 1] : shape.total;
    alignas(64) T acc[NV * L];
    int64_t c = 0;
    for (; c + NV * L <= shape.dim; c += NV * L) {
      detail::reduce_rows<Mode, NV, Ahead>(shape, table + c, ids, weights, begin, end, padding, acc);
      epilogue(bag, c, NV * L, static_cast<const T*>(acc));
    }
    for (; c + L <= shape.dim; c += L) {
      detail::reduce_rows<Mode, 1, Ahead>(shape, table + c, ids, weights, begin, end, padding, acc);
      epilogue(bag, c, L, static_cast<const T*>(acc));
    }
    if (c < shape.dim) {
      const int64_t rest = shape.dim - c;
      detail::reduce_rest<Mode>(shape, table + c, ids, weights, begin, end, padding, rest, acc);
      epilogue(bag, c, rest, static_cast<const T*>(acc));
    }
  }
}

}  // namespace ke
