// Matrix products with few rows: B is read once, in place, at the speed of memory.
#pragma once

#include "pack.h"
#include <omp.h>

namespace ke {

struct GemmSize {
  int64_t batch, m, n, k;
};

namespace detail {

// A full vector of values converted to float (or double) from any storage type.
template <class acc_t, class T>
KE_FORCE_INLINE vec<acc_t> load_as(const T* p) {
  if constexpr (std::is_same_v<T, acc_t>) {
    return load(p);
  } else {
    alignas(64) acc_t values[lanes<acc_t>];
    for (int i = 0; i < lanes<acc_t>; ++i) values[i] = acc_t(p[i]);
    return load(values);
  }
}

template <class T>
KE_FORCE_INLINE T sum_lanes(vec<T> v) {
  alignas(64) T values[lanes<T>];
  store(values, v);
  KE_UNROLL for (int half = lanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

// MR x NB dot products: rows of `a` (stride k) with the columns b[0..NB), both contiguous in k.
template <class acc_t, int MR, int NB, class T>
KE_FORCE_INLINE void dot_tile(int64_t k, const acc_t* a, const T* const (&b)[NB], acc_t* out, int64_t out_stride) {
  constexpr int L = lanes<acc_t>;
  vec<acc_t> sum[MR][NB] = {};
  int64_t p = 0;
  for (; p + L <= k; p += L) {
    vec<acc_t> column[NB];
    KE_UNROLL for (int n = 0; n < NB; ++n) column[n] = load_as<acc_t>(b[n] + p);
    KE_UNROLL for (int r = 0; r < MR; ++r) {
      const vec<acc_t> x = load(a + r * k + p);
      KE_UNROLL for (int n = 0; n < NB; ++n) sum[r][n] += x * column[n];
    }
  }
  KE_UNROLL for (int r = 0; r < MR; ++r) {
    KE_UNROLL for (int n = 0; n < NB; ++n) {
      acc_t total = sum_lanes<acc_t>(sum[r][n]);
      for (int64_t q = p; q < k; ++q) total += a[r * k + q] * acc_t(b[n][q]);
      out[r * out_stride + n] = total;
    }
  }
}

// C[MR, NV vectors] (+)= A * B over k steps; A packed, row p of B at b + p * b_stride. The same rows of the next
// tile of columns are fetched ahead: each lies in another page, where hardware does not look.
template <class acc_t, int MR, int NV, class T>
KE_FORCE_INLINE void stream_tile(int64_t k, const acc_t* a, const T* b, int64_t b_stride, acc_t* c,
                                 int64_t c_stride, bool accumulate) {
  constexpr int L = lanes<acc_t>;
  vec<acc_t> sum[MR][NV] = {};
  for (int64_t p = 0; p < k; ++p, b += b_stride, a += MR) {
    vec<acc_t> row[NV];
    KE_UNROLL for (int v = 0; v < NV; ++v) {
      row[v] = load_as<acc_t>(b + v * L);
      __builtin_prefetch(b + (NV + v) * L);
    }
    KE_UNROLL for (int r = 0; r < MR; ++r) {
      KE_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] += a[r] * row[v];
    }
  }
  KE_UNROLL for (int r = 0; r < MR; ++r) {
    KE_UNROLL for (int v = 0; v < NV; ++v) {
      acc_t* out = c + r * c_stride + v * L;
      store(out, accumulate ? load(out) + sum[r][v] : sum[r][v]);
    }
  }
}

// One row of A as contiguous values of the accumulator type.
template <class acc_t, class A>
inline void copy_row(const A& a, int64_t b, int64_t row, int64_t k, acc_t* out) {
  if constexpr (is_matrix<A>) {
    const auto* from = a.data + a.offset(b) + row * a.row_stride;
    for (int64_t p = 0; p < k; ++p) out[p] = acc_t(from[p * a.col_stride]);
  } else {
    a(b, row, 0, k, out);
  }
}

}  // namespace detail

// C[b] = A[b] * B[b] where each column of B is contiguous (a weight matrix [n, k]): MR rows by Columns columns of
// dot products at a time. Arguments as for ke::gemm; the strips of a row come from several threads.
template <class acc_t, int MR, int Columns, class A, class T, class Offset, class Epilogue>
inline void gemm_dot(GemmSize size, const A& a, const Matrix<T, Offset>& b, Epilogue&& epilogue,
                     bool a_broadcast = false, bool parallel = true) {
  constexpr int64_t strip = Columns * (Columns < 32 ? 32 / Columns : 1);
  if (size.batch <= 0 || size.m <= 0 || size.n <= 0) return;
  const int64_t copies = a_broadcast ? 1 : size.batch, strips = ceil_div(size.n, strip);
  const int64_t padded = ceil_div(size.m, MR) * MR;  // the last row fills the last tile
  acc_t* rows = scratch<0>().template reserve<acc_t>(copies * padded * size.k);
#pragma omp parallel if (parallel)
  {
    acc_t* sums = scratch<1>().template reserve<acc_t>(padded * strip);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < copies * padded; ++r) {
      detail::copy_row(a, r / padded, least(r % padded, size.m - 1), size.k, rows + r * size.k);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < size.batch * strips; ++task) {
      const int64_t product = task / strips, col0 = task % strips * strip, width = least(strip, size.n - col0);
      const acc_t* from = rows + (a_broadcast ? 0 : product) * padded * size.k;
      const T* columns = b.data + b.offset(product) + col0 * b.col_stride;
      for (int64_t n = 0; n < width; n += Columns) {
        const T* column[Columns];
        for (int i = 0; i < Columns; ++i) column[i] = columns + least(n + i, width - 1) * b.col_stride;
        for (int64_t r = 0; r < size.m; r += MR) {
          detail::dot_tile<acc_t, MR, Columns>(size.k, from + r * size.k, column, sums + r * strip + n, strip);
        }
      }
      for (int64_t r = 0; r < size.m; ++r) {
        epilogue(product, r, col0, width, static_cast<const acc_t*>(sums + r * strip));
      }
    }
  }
}

// C[b] = A[b] * B[b] where each row of B is contiguous and at least NR long: tiles of NR columns, KC rows of B at a
// time, so that memory sees long runs. Arguments as for ke::gemm; strips of a row come from several threads.
template <class acc_t, int MR, int NR, int KC, class A, class T, class Offset, class Epilogue>
inline void gemm_stream(GemmSize size, const A& a, const Matrix<T, Offset>& b, Epilogue&& epilogue,
                        bool a_broadcast = false, bool parallel = true) {
  if (size.batch <= 0 || size.m <= 0 || size.n <= 0) return;
  const int64_t panels = ceil_div(size.m, MR), copies = a_broadcast ? 1 : size.batch;
  const int64_t tiles = ceil_div(size.n, NR), tail = size.n - (tiles - 1) * NR;
  const int64_t threads = parallel ? omp_get_max_threads() : 1, blocks = least(tiles, threads);
  acc_t* rows = scratch<0>().template reserve<acc_t>(copies * panels * MR * size.k);
#pragma omp parallel if (parallel)
  {
    acc_t* sums = scratch<1>().template reserve<acc_t>(panels * MR * (tiles / blocks + 1) * NR);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < copies * panels; ++p) {
      const int64_t row = p % panels * MR;
      detail::pack_a<acc_t, MR>(a, p / panels, row, least(MR, size.m - row), size.k, rows + p * MR * size.k);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < size.batch * blocks; ++task) {
      const int64_t product = task / blocks, block = task % blocks;
      const int64_t t0 = block * tiles / blocks, t1 = (block + 1) * tiles / blocks, stride = (t1 - t0) * NR;
      const acc_t* from = rows + (a_broadcast ? 0 : product) * panels * MR * size.k;
      const T* data = b.data + b.offset(product);
      for (int64_t k = 0; k < size.k; k += KC) {
        for (int64_t t = t0; t < t1; ++t) {
          const T* tile = data + k * b.row_stride + least(t * NR, size.n - NR);  // the last tile ends where B ends
          for (int64_t p = 0; p < panels; ++p) {
            detail::stream_tile<acc_t, MR, NR / lanes<acc_t>>(least(KC, size.k - k), from + (p * size.k + k) * MR, tile,
                                                              b.row_stride, sums + p * MR * stride + (t - t0) * NR,
                                                              stride, k > 0);
          }
        }
      }
      const int64_t whole = (t1 == tiles ? t1 - 1 : t1) - t0;  // tiles before the one that may overlap
      for (int64_t r = 0; r < size.m; ++r) {
        const acc_t* row = sums + r * stride;
        if (whole > 0) epilogue(product, r, t0 * NR, whole * NR, row);
        if (t1 == tiles) epilogue(product, r, size.n - tail, tail, row + whole * NR + NR - tail);
      }
    }
  }
}

}  // namespace ke
