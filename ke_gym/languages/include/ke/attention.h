// Attention without a score matrix in memory, by online softmax.
//
// out[b, h, i] = softmax_j(scale * q[b, h, i] . k[b, h', j] + mask) v[b, h', j], h' = h / (heads / kv_heads).
// Blocks of scores live in L1; the running maximum and sum of a row rescale what was summed before (Milakov
// and Gimelshein, 2018; Dao et al., "FlashAttention", 2022). All query heads of a key head are rows of one
// problem, so K and V are packed (or, with few rows, only read) once for all of them.
#pragma once

#include "gemm.h"

namespace ke {

struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys, d, dv;
};

// An operand (batch, head, row, column) with strides in elements.
template <class T>
struct Heads {
  const T* data;
  int64_t batch_stride, head_stride, row_stride, col_stride;
  KE_FORCE_INLINE const T* at(int64_t batch, int64_t head) const {
    return data + batch * batch_stride + head * head_stride;
  }
};
template <class T>
KE_FORCE_INLINE Heads<T> heads(const T* data, int64_t batch_stride, int64_t head_stride, int64_t row_stride,
                               int64_t col_stride) {
  return {data, batch_stride, head_stride, row_stride, col_stride};
}
struct NoMask {};
// In place of a mask, a function may change the products of a query and `count` keys from `key` on, scale and all:
// score(batch, head, row, key, count, products).
template <class Mask>
inline constexpr bool changes_scores =
    std::is_invocable_v<const Mask&, int64_t, int64_t, int64_t, int64_t, int64_t, float*>;

namespace detail {

KE_FORCE_INLINE vec<float> splat(float x) { return vec<float>{} + x; }

// e^x to 2 ulp for x <= 0; exactly 0 below -87.3 and for -inf; NaN stays NaN. Cody-Waite reduction.
KE_FORCE_INLINE vec<float> exp_negative(vec<float> x) {
  const vec<float> shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec<float> shifted = x * 1.44269504f + shifter;
  const vec<float> n = shifted - shifter;
  const vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec<float> p = splat(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.0f;
  const vec<int32_t> exponent = ((vec<int32_t>)shifted << 23) + 0x3f800000;
  return x < -87.3f ? vec<float>{} : p * (vec<float>)exponent;
}

KE_FORCE_INLINE float sum_of(vec<float> v) {
  float total = 0;
  for (int i = 0; i < lanes<float>; ++i) total += v[i];
  return total;
}
KE_FORCE_INLINE float max_of(vec<float> v) {
  float top = v[0];
  for (int i = 1; i < lanes<float>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

constexpr float minus_infinity = -__builtin_inff();

// Scores of one row -> weights relative to the running maximum; returns the factor for earlier sums.
template <int Keys>
KE_FORCE_INLINE float soften(float* scores, float& top, float& total) {
  constexpr int L = lanes<float>;
  vec<float> high = splat(top);
  for (int j = 0; j < Keys; j += L) {
    const vec<float> s = load(scores + j);
    high = s > high ? s : high;
  }
  const float new_top = max_of(high), base = new_top == minus_infinity ? 0 : new_top;
  vec<float> sum = {};
  for (int j = 0; j < Keys; j += L) {
    const vec<float> e = exp_negative(load(scores + j) - base);
    store(scores + j, e);
    sum += e;
  }
  const float factor = top == new_top ? 1 : exp_negative(splat(top - base))[0];
  total = total * factor + sum_of(sum);
  top = new_top;
  return factor;
}

// The running result of some rows: sums [dv_padded], maximum, total weight for each.
struct SoftmaxRow {
  float *sums, *top, *total;
  SoftmaxRow(float* state, int64_t row, int64_t dv_padded)
      : sums(state + row * (dv_padded + 2)), top(sums + dv_padded), total(top + 1) {}
};

// scale * scores + mask (or what the function `mask` makes of them) for `visible` of Keys keys from `key0` on, -inf for the others.
template <int Keys, class Mask>
KE_FORCE_INLINE void mask_scores(float* scores, float scale, int64_t visible, const Mask& mask, int64_t batch,
                                 int64_t head, int64_t row, int64_t key0) {
  if constexpr (std::is_same_v<Mask, NoMask>) {
    for (int j = 0; j < Keys; j += lanes<float>) store(scores + j, load(scores + j) * scale);
  } else if constexpr (changes_scores<Mask>) {
    mask(batch, head, row, key0, visible, scores);
  } else {
    const auto* m = mask.at(batch, head) + row * mask.row_stride + key0 * mask.col_stride;
    for (int64_t j = 0; j < visible; ++j) {
      const auto value = m[j * mask.col_stride];
      if constexpr (std::is_same_v<std::decay_t<decltype(value)>, bool>) {
        scores[j] = value ? scores[j] * scale : minus_infinity;
      } else {
        scores[j] = scores[j] * scale + float(value);
      }
    }
  }
  for (int64_t j = visible; j < Keys; ++j) scores[j] = minus_infinity;
}

}  // namespace detail

// MR: rows of the register tile; QueryTiles * MR rows and Keys columns make a block of scores. `splits` cuts the
// keys into parts that run in parallel (few rows). `empty` is the output of rows that may see no key.
// `causal`: query i sees keys 0..i. epilogue(batch, head, row, dv, acc) gets each output row once.
template <int MR, int QueryTiles, int Keys, class Q, class K, class V, class Mask, class Epilogue>
inline void attention(const AttentionShape& shape, const Heads<Q>& q, const Heads<K>& k, const Heads<V>& v,
                      const Mask& mask, float scale, bool causal, float empty, int64_t splits, bool parallel,
                      Epilogue&& epilogue) {
  constexpr int L = lanes<float>, NV = 2, NR = NV * L, Rows = MR * QueryTiles;
  static_assert(Keys % NR == 0, "blocks must be made of whole tiles");
  const int64_t group = shape.heads / shape.kv_heads, rows = group * shape.queries, d = shape.d, dv = shape.dv;
  const int64_t row_blocks = ceil_div(rows, Rows), key_blocks = ceil_div(shape.keys, Keys);
  const int64_t products = shape.batch * shape.kv_heads, dv_padded = ceil_div(dv, NR) * NR;
  if (rows <= 0 || products <= 0 || dv <= 0) return;
  const bool keep = row_blocks > 1;  // pack K and V whole, for all blocks of rows
  const bool v_in_place = !keep && std::is_same_v<V, float> && v.col_stride == 1 && dv % NR == 0;
  splits = most(1, least(splits, key_blocks));
  const int64_t threads = parallel ? omp_get_max_threads() : 1;
  const int64_t chunks = least(row_blocks, ceil_div(4 * threads, products * splits));
  const int64_t block_state = Rows * (dv_padded + 2);
  float* partial =
      splits > 1 ? scratch<0>().template reserve<float>(products * row_blocks * splits * block_state) : nullptr;

  // Rows are the queries of all heads of a group, head by head.
  const auto head_of = [&](int64_t product, int64_t row) {
    return product % shape.kv_heads * group + row / shape.queries;
  };
  const auto finish_row = [&](int64_t product, int64_t row, detail::SoftmaxRow result) {
    const float inverse = 1 / *result.total;
    for (int64_t c = 0; c < dv; ++c) result.sums[c] = *result.total == 0 ? empty : result.sums[c] * inverse;
    epilogue(product / shape.kv_heads, head_of(product, row), row % shape.queries, dv,
             static_cast<const float*>(result.sums));
  };
  const auto pack_keys = [&](int64_t product, int64_t block, float* out) {
    const K* from = k.at(product / shape.kv_heads, product % shape.kv_heads);
    for (int64_t j = block * Keys; j < least(shape.keys, (block + 1) * Keys); j += NR, out += NR * d) {
      detail::pack_strided<float, NR>(from + j * k.row_stride, k.row_stride, k.col_stride, least(NR, shape.keys - j),
                                      d, out);
    }
  };
  const auto pack_values = [&](int64_t product, int64_t block, float* out) {
    const V* from = v.at(product / shape.kv_heads, product % shape.kv_heads) + block * Keys * v.row_stride;
    for (int64_t c = 0; c < dv; c += NR, out += NR * Keys) {
      detail::pack_strided<float, NR>(from + c * v.col_stride, v.col_stride, v.row_stride, least(NR, dv - c),
                                      least(Keys, shape.keys - block * Keys), out);
    }
  };

#pragma omp parallel if (parallel)
  {
    const int64_t kept = keep ? key_blocks : 1;
    float* packed_k = scratch<1>().template reserve<float>(kept * Keys * d);
    float* packed_v = scratch<2>().template reserve<float>(kept * Keys * dv_padded);
    float* packed_q = scratch<3>().template reserve<float>(Rows * d);
    float* scores = scratch<4>().template reserve<float>(Rows * Keys);
    float* own_state = scratch<5>().template reserve<float>(block_state);
    int64_t packed = -1;  // whose keys this thread has packed
    bool finite = false;  // whether its values are: 0 * inf is NaN, so that no weight of 0 may be left out

#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < products * splits * chunks; ++task) {
      const int64_t product = task / chunks / splits, split = task / chunks % splits, chunk = task % chunks;
      const int64_t batch = product / shape.kv_heads, kv_head = product % shape.kv_heads;
      const int64_t first_block = split * key_blocks / splits, end_block = (split + 1) * key_blocks / splits;
      if (keep && packed != task / chunks) {
        packed = task / chunks;
        vec<float> nothing = {};
        for (int64_t b = first_block; b < end_block; ++b) {
          pack_keys(product, b, packed_k + (b - first_block) * Keys * d);
          float* values = packed_v + (b - first_block) * Keys * dv_padded;
          pack_values(product, b, values);
          for (int64_t i = 0; i < least(Keys, shape.keys - b * Keys) * NR; i += L) {
            for (int64_t c = 0; c < dv_padded; c += NR) nothing += load(values + c * Keys + i) * 0;
          }
        }
        finite = detail::sum_of(nothing) == 0;
      }
      for (int64_t block = chunk * row_blocks / chunks; block < (chunk + 1) * row_blocks / chunks; ++block) {
        const int64_t row0 = block * Rows, count = least(Rows, rows - row0), tiles = ceil_div(count, MR);
        for (int64_t t = 0; t < tiles; ++t) {
          detail::pack_lanes<float, MR>(
              least(MR, count - t * MR), d, packed_q + t * MR * d,
              [&](int64_t lane, int64_t k0, int64_t n, float* buffer) -> const float* {
                const int64_t row = row0 + t * MR + lane;
                const Q* from = q.at(batch, head_of(product, row)) + row % shape.queries * q.row_stride;
                for (int64_t i = 0; i < n; ++i) buffer[i] = float(from[(k0 + i) * q.col_stride]);
                return buffer;
              });
        }
        float* state =
            partial ? partial + ((product * row_blocks + block) * splits + split) * block_state : own_state;
        __builtin_memset(state, 0, size_t(block_state) * sizeof(float));
        for (int64_t r = 0; r < count; ++r) *detail::SoftmaxRow(state, r, dv_padded).top = detail::minus_infinity;

        const bool one_head = row0 / shape.queries == (row0 + count - 1) / shape.queries;
        const int64_t last_query = one_head ? (row0 + count - 1) % shape.queries : shape.queries - 1;
        const int64_t keys = causal && finite ? least(shape.keys, last_query + 1) : shape.keys;
        for (int64_t b = first_block; b < end_block && b * Keys < keys; ++b) {
          const int64_t key0 = b * Keys, seen = least(Keys, keys - key0);
          float* block_k = packed_k + (keep ? b - first_block : 0) * Keys * d;
          float* block_v = packed_v + (keep ? b - first_block : 0) * Keys * dv_padded;
          if (!keep) pack_keys(product, b, block_k);
          if (!keep && !v_in_place) pack_values(product, b, block_v);
          for (int64_t s = 0; s < ceil_div(seen, NR); ++s) {
            const float* panel = block_k + s * NR * d;
            for (int64_t t = 0; t < tiles; ++t) {
              micro_tile<float, MR, NV, 1, MR>(
                  d, packed_q + t * MR * d, [=](int64_t p) { return panel + p * NR; },
                  scores + t * MR * Keys + s * NR, Keys, false);
            }
          }
          for (int64_t r = 0; r < count; ++r) {
            const int64_t query = (row0 + r) % shape.queries;
            const int64_t visible = causal ? most(0, least(seen, query + 1 - key0)) : seen;
            detail::SoftmaxRow row(state, r, dv_padded);
            detail::mask_scores<Keys>(scores + r * Keys, scale, visible, mask, batch, head_of(product, row0 + r),
                                      query, key0);
            const float factor = detail::soften<Keys>(scores + r * Keys, *row.top, *row.total);
            if (factor == 1) continue;
            for (int64_t c = 0; c < dv_padded; c += L) store(row.sums + c, load(row.sums + c) * factor);
          }
          for (int64_t c = 0; c < dv_padded; c += NR) {
            const float* values = block_v + c * Keys;
            int64_t stride = NR;
            if constexpr (std::is_same_v<V, float>) {
              if (v_in_place) {
                values = v.at(batch, kv_head) + key0 * v.row_stride + c;
                stride = v.row_stride;
              }
            }
            for (int64_t t = 0; t < tiles; ++t) {
              micro_tile<float, MR, NV, Keys, 1>(
                  seen, scores + t * MR * Keys, [=](int64_t p) { return values + p * stride; },
                  state + t * MR * (dv_padded + 2) + c, dv_padded + 2, true);
            }
          }
        }
        if (partial) continue;
        for (int64_t r = 0; r < count; ++r) finish_row(product, row0 + r, detail::SoftmaxRow(state, r, dv_padded));
      }
    }
    if (partial) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < products * row_blocks; ++task) {
        const int64_t row0 = task % row_blocks * Rows;
        float* states = partial + task * splits * block_state;
        for (int64_t r = 0; r < least(Rows, rows - row0); ++r) {
          detail::SoftmaxRow all(states, r, dv_padded);
          for (int64_t s = 1; s < splits; ++s) {
            detail::SoftmaxRow part(states + s * block_state, r, dv_padded);
            const float top = *part.top > *all.top ? *part.top : *all.top;
            const float base = top == detail::minus_infinity ? 0 : top;
            const float old_factor = detail::exp_negative(detail::splat(*all.top - base))[0];
            const float new_factor = detail::exp_negative(detail::splat(*part.top - base))[0];
            for (int64_t c = 0; c < dv; ++c) {
              all.sums[c] = all.sums[c] * old_factor + part.sums[c] * new_factor;
            }
            *all.total = *all.total * old_factor + *part.total * new_factor;
            *all.top = top;
          }
          finish_row(task / row_blocks, row0 + r, all);
        }
      }
    }
  }
}

}  // namespace ke
