// Packing: operands of any layout and type become k-major panels of W lanes (rows of A, columns of B).
#pragma once

#include "tile.h"

namespace ke {

// A strided matrix operand, element (b, row, col) at data[offset(b) + row * row_stride + col * col_stride].
// `Offset` maps the batch index to elements; use ke::matrix(...) to make one.
template <class T, class Offset>
struct Matrix {
  const T* data;
  int64_t row_stride, col_stride;
  Offset offset;
};
struct NoBatch {
  KE_FORCE_INLINE int64_t operator()(int64_t) const { return 0; }
};
template <class T, class Offset = NoBatch>
KE_FORCE_INLINE Matrix<T, Offset> matrix(const T* data, int64_t row_stride, int64_t col_stride, Offset offset = {}) {
  return {data, row_stride, col_stride, offset};
}

namespace detail {

// `count` packed units of one lane from `k0` on: k values in a row become units (pairs for bf16).
template <class Compute, class acc_t, class unit_t>
KE_FORCE_INLINE void to_units(const acc_t* values, int64_t count, unit_t* out) {
  if constexpr (arithmetic<Compute>::k_per_unit == 2) {
    for (int64_t i = 0; i + 1 < count; i += 2) out[i / 2] = pair_bits(values[i], values[i + 1]);
    if (count & 1) out[count / 2] = pair_bits(values[count - 1], 0);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = values[i];
  }
}

constexpr int pack_block = 64;  // units of k that a transposing pack stages at once

// Packs up to W lanes whose k values are contiguous: row(lane, k0, count, buffer) gives a pointer to
// `count` values, filling the buffer if they are not in memory as such.
template <class Compute, int W, class Row>
__attribute__((noinline)) void pack_lanes(int64_t valid, int64_t k, typename arithmetic<Compute>::unit* out, Row&& row) {
  using acc_t = typename arithmetic<Compute>::acc;
  using unit_t = typename arithmetic<Compute>::unit;
  constexpr int P = arithmetic<Compute>::k_per_unit, L = lanes<unit_t>, Padded = (W + L - 1) / L * L;
  acc_t values[pack_block * P];
  alignas(64) unit_t staged[Padded][pack_block];
  __builtin_memset(staged, 0, sizeof staged);
  for (int64_t k0 = 0; k0 < k; k0 += pack_block * P) {
    const int64_t count = least(pack_block * P, k - k0), units = ceil_div(count, P);
    const unit_t* lane[Padded];
    for (int i = 0; i < Padded; ++i) {
      lane[i] = staged[i];
      if (i >= valid) continue;
      const acc_t* source = row(i, k0, count, values);
      if constexpr (P == 1) {
        if (source != values && count == pack_block) {
          lane[i] = source;
          continue;
        }
      }
      to_units<Compute>(source, count, staged[i]);
    }
    for (int64_t u = 0; u < units; u += L) {
      unit_t* block = out + (k0 / P + u) * W;
      const int64_t steps = least(L, units - u);
      KE_UNROLL for (int g = 0; g < Padded / L; ++g) {
        vec<unit_t> square[L];
        KE_UNROLL for (int i = 0; i < L; ++i) square[i] = load(lane[g * L + i] + u);
        transpose<unit_t>(square);
        constexpr int Last = W - (Padded - L);
        const int width = g == Padded / L - 1 ? Last : L;
        if (steps == L) {
          KE_UNROLL for (int i = 0; i < L; ++i)
            __builtin_memcpy(block + i * W + g * L, &square[i], size_t(width) * sizeof(unit_t));
        } else {
          for (int64_t i = 0; i < steps; ++i)
            __builtin_memcpy(block + i * W + g * L, &square[i], size_t(width) * sizeof(unit_t));
        }
      }
    }
  }
}

// Packs up to W lanes that are contiguous for each k: fill(k, count, buffer) gives a pointer to `count`
// lanes of that k, filling the buffer if they are not in memory as such.
template <class Compute, int W, class Fill>
inline void pack_steps(int64_t valid, int64_t k, typename arithmetic<Compute>::unit* out, Fill&& fill) {
  using acc_t = typename arithmetic<Compute>::acc;
  constexpr int P = arithmetic<Compute>::k_per_unit;
  acc_t first[W], second[W];
  if constexpr (P == 1) {
    if (valid == W) {
      for (int64_t p = 0; p < k; ++p) {
        const acc_t* source = fill(p, W, first);
        __builtin_memcpy(out + p * W, source, sizeof first);
      }
      return;
    }
  }
  __builtin_memset(second, 0, sizeof second);
  for (int64_t p = 0; p < k; p += P) {
    const acc_t* low = fill(p, valid, first);
    const acc_t* high = P == 2 && p + 1 < k ? fill(p + 1, valid, second) : nullptr;
    auto* step = out + p / P * W;
    for (int i = 0; i < W; ++i) {
      if constexpr (P == 2) {
        step[i] = i < valid ? pair_bits(low[i], high ? high[i] : 0) : 0;
      } else {
        step[i] = i < valid ? low[i] : 0;
      }
    }
  }
}

// Panel `panel` of a strided operand: lanes have stride `lane_stride`, k has stride `k_stride`.
template <class Compute, int W, class T>
__attribute__((noinline)) void pack_strided(const T* data, int64_t lane_stride, int64_t k_stride, int64_t valid, int64_t k,
                         typename arithmetic<Compute>::unit* out) {
  using acc_t = typename arithmetic<Compute>::acc;
  const auto gather = [](const T* from, int64_t stride, int64_t count, acc_t* to) -> const acc_t* {
    if (stride == 1) {
      if constexpr (std::is_same_v<T, acc_t>) return from;
      for (int64_t i = 0; i < count; ++i) to[i] = acc_t(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = acc_t(from[i * stride]);
    }
    return to;
  };
  if (k_stride == 1 || lane_stride != 1) {
    pack_lanes<Compute, W>(valid, k, out, [&](int64_t lane, int64_t k0, int64_t count, acc_t* buffer) {
      return gather(data + lane * lane_stride + k0 * k_stride, k_stride, count, buffer);
    });
  } else {
    pack_steps<Compute, W>(valid, k, out, [&](int64_t p, int64_t count, acc_t* buffer) {
      return gather(data + p * k_stride, lane_stride, count, buffer);
    });
  }
}

template <class Operand>
inline constexpr bool is_matrix = false;
template <class T, class Offset>
inline constexpr bool is_matrix<Matrix<T, Offset>> = true;

// A operand: a Matrix, or a loader (b, row, k0, count, out) that writes `count` values of a row.
template <class Compute, int W, class A>
inline void pack_a(const A& a, int64_t b, int64_t row, int64_t valid, int64_t k,
                   typename arithmetic<Compute>::unit* out) {
  using acc_t = typename arithmetic<Compute>::acc;
  if constexpr (is_matrix<A>) {
    pack_strided<Compute, W>(a.data + a.offset(b) + row * a.row_stride, a.row_stride, a.col_stride, valid, k, out);
  } else {
    pack_lanes<Compute, W>(valid, k, out,
                           [&](int64_t lane, int64_t k0, int64_t count, acc_t* buffer) -> const acc_t* {
                             a(b, row + lane, k0, count, buffer);
                             return buffer;
                           });
  }
}

// B operand: a Matrix, or a loader (b, k, col0, count, out) that writes `count` values of row k.
template <class Compute, int W, class B>
inline void pack_b(const B& m, int64_t b, int64_t col, int64_t valid, int64_t k,
                   typename arithmetic<Compute>::unit* out) {
  using acc_t = typename arithmetic<Compute>::acc;
  if constexpr (is_matrix<B>) {
    pack_strided<Compute, W>(m.data + m.offset(b) + col * m.col_stride, m.col_stride, m.row_stride, valid, k, out);
  } else {
    pack_steps<Compute, W>(valid, k, out, [&](int64_t p, int64_t count, acc_t* buffer) -> const acc_t* {
      m(b, p, col, count, buffer);
      return buffer;
    });
  }
}

}  // namespace detail
}  // namespace ke
