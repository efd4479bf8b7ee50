// Convolutions of rank 1 to 3 in torch's layout, with fused loads and stores.
//
// The input of one image and group is copied once, zero-padded, and sorted by phase (coordinate modulo
// stride) in every dimension. Then the input that tap k contributes to consecutive output positions lies
// contiguously at a fixed offset from the position, for every stride and dilation: a convolution is the matrix
// product of the weights with a B whose row k is the copied image, shifted. Nothing is duplicated ("im2col" without
// the columns). Positions in the padding between rows are computed and dropped.
#pragma once

#include "gemm.h"

namespace ke {

// x_strides: elements, over (image, channel, dimensions...). Weights are contiguous
// [out_channels, in_channels / groups, kernel...].
template <int Rank>
struct ConvShape {
  int64_t batch, in_channels, out_channels, groups;
  int64_t size[Rank], kernel[Rank], stride[Rank], padding[Rank], dilation[Rank], x_strides[Rank + 2];
};

// The default prologue: input elements as they are.
struct Unchanged {
  template <class V>
  KE_FORCE_INLINE V operator()(V value, int64_t, int64_t) const {
    return value;
  }
};

namespace detail {

// Geometry of the sorted copy, padded to rank 3 (leading dimensions of size 1).
struct Sorted {
  int64_t in[3], kernel[3], stride[3], pad[3], dilation[3], x_stride[3], out[3];
  int64_t extent[3];  // of one phase
  int64_t plane;      // elements of one phase of one channel, with slack against cache-set conflicts
  int64_t channel;    // elements of one channel: all phases
  int64_t positions;  // from the first to just past the last output position, in the copy's coordinates

  template <int Rank>
  explicit Sorted(const ConvShape<Rank>& shape) {
    for (int d = 0; d < 3; ++d) {
      const int from = d - (3 - Rank);
      in[d] = from < 0 ? 1 : shape.size[from];
      kernel[d] = from < 0 ? 1 : shape.kernel[from];
      stride[d] = from < 0 ? 1 : shape.stride[from];
      pad[d] = from < 0 ? 0 : shape.padding[from];
      dilation[d] = from < 0 ? 1 : shape.dilation[from];
      x_stride[d] = from < 0 ? 0 : shape.x_strides[from + 2];
      out[d] = (in[d] + 2 * pad[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
      extent[d] = out[d] + dilation[d] * (kernel[d] - 1) / stride[d];
    }
    plane = extent[0] * extent[1] * extent[2];
    plane = (plane + 15) / 16 * 16 + (plane / 16 % 2 ? 0 : 16);
    channel = plane * stride[0] * stride[1] * stride[2];
    positions = ((out[0] - 1) * extent[1] + out[1] - 1) * extent[2] + out[2];
  }

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }

  // Where tap (kd, kh, kw) of a channel starts in the copy.
  int64_t offset(int64_t tap) const {
    const int64_t at[3] = {tap / kernel[2] / kernel[1] * dilation[0], tap / kernel[2] % kernel[1] * dilation[1],
                           tap % kernel[2] * dilation[2]};
    const int64_t phase =
        (at[0] % stride[0] * stride[1] + at[1] % stride[1]) * stride[2] + at[2] % stride[2];
    return phase * plane + (at[0] / stride[0] * extent[1] + at[1] / stride[1]) * extent[2] + at[2] / stride[2];
  }

  // Whether any tap reads a coordinate of this phase.
  bool reads(int d, int64_t phase) const {
    for (int64_t k = 0; k < kernel[d]; ++k) {
      if (k * dilation[d] % stride[d] == phase) return true;
    }
    return false;
  }

  // Copies one channel; put(element index, value) stores, with 0 outside the input.
  template <class T, class Put>
  void copy(const T* x, Put&& put) const {
    for (int64_t phase = 0; phase < stride[0] * stride[1] * stride[2]; ++phase) {
      const int64_t p2 = phase % stride[2], p1 = phase / stride[2] % stride[1], p0 = phase / stride[2] / stride[1];
      if (!reads(0, p0) || !reads(1, p1) || !reads(2, p2)) continue;
      // Coordinates q with 0 <= q * stride + phase - pad < in.
      const int64_t s = stride[2], shift = p2 - pad[2];
      const int64_t begin = least(extent[2], most(0, ceil_div(most(0, -shift), s)));
      const int64_t end = most(begin, least(extent[2], shift >= in[2] ? 0 : ceil_div(in[2] - shift, s)));
      for (int64_t d = 0; d < extent[0]; ++d) {
        for (int64_t h = 0; h < extent[1]; ++h) {
          const int64_t id = d * stride[0] + p0 - pad[0], ih = h * stride[1] + p1 - pad[1];
          const int64_t row = phase * plane + (d * extent[1] + h) * extent[2];
          const bool inside = id >= 0 && id < in[0] && ih >= 0 && ih < in[1];
          const int64_t first = inside ? begin : extent[2], last = inside ? end : extent[2];
          const T* source = x + id * x_stride[0] + ih * x_stride[1] + shift * x_stride[2];
          for (int64_t q = 0; q < first; ++q) put.zero(row + q);
          if (s * x_stride[2] == 1) {
            for (int64_t q = first; q < last; ++q) put(row + q, source[q]);
          } else {
            for (int64_t q = first; q < last; ++q) put(row + q, source[q * s * x_stride[2]]);
          }
          for (int64_t q = last; q < extent[2]; ++q) put.zero(row + q);
        }
      }
    }
  }

  // Hands the valid output positions of [begin, begin + width) to emit(flat output position, start, count).
  template <class Emit>
  void segments(int64_t begin, int64_t width, Emit&& emit) const {
    int64_t line = begin / extent[2], q = begin % extent[2], at = 0;
    while (at < width) {
      const int64_t d = line / extent[1], h = line % extent[1];
      if (h < out[1] && q < out[2]) {
        emit((d * out[1] + h) * out[2] + q, at, least(width - at, out[2] - q));
      }
      at += extent[2] - q;
      q = 0;
      ++line;
    }
  }
};

// Writes elements of channel `c` of a group into the copy: as they are, or as one half of a bf16 pair.
template <class Compute, class Prologue>
struct Put {
  typename arithmetic<Compute>::unit* to;
  const Prologue& prologue;
  int64_t image, channel;
  bool high;

  template <class V>
  KE_FORCE_INLINE void operator()(int64_t at, V value) const {
    set(at, prologue(static_cast<typename arithmetic<Compute>::acc>(value), image, channel));
  }
  KE_FORCE_INLINE void zero(int64_t at) const { set(at, 0); }
  KE_FORCE_INLINE void set(int64_t at, typename arithmetic<Compute>::acc value) const {
    if constexpr (arithmetic<Compute>::k_per_unit == 2) {
      to[at] = high ? (to[at] & 0xffffu) | pair_bits(0, value) : pair_bits(value, 0);
    } else {
      to[at] = value;
    }
  }
};

}  // namespace detail

// epilogue(image, out channel, flat output position, count, acc). T::MC and T::NC: see gemm.h (rows are output
// channels of a group, columns positions). prologue(value, image, channel) changes input elements.
template <class T, int Rank, class X, class W, class Epilogue, class Prologue = Unchanged>
inline void conv(const ConvShape<Rank>& shape, const X* x, const W* w, Epilogue&& epilogue, bool parallel = true,
                 const Prologue& prologue = {}) {
  using Compute = typename T::Compute;
  using acc_t = typename T::acc;
  using unit = typename T::unit;
  constexpr int P = arithmetic<Compute>::k_per_unit;
  const detail::Sorted sorted(shape);
  const int64_t channels = shape.in_channels / shape.groups, rows = shape.out_channels / shape.groups;
  const int64_t taps = sorted.taps(), units = ceil_div(channels, P) * taps, slack = T::strip + T::NR;
  const int64_t row_panels = ceil_div(rows, T::MR), products = shape.batch * shape.groups;
  const int64_t image_units = ceil_div(channels, P) * sorted.channel + slack;
  if (products <= 0 || rows <= 0 || sorted.positions <= 0) return;

  unit* weights = scratch<0>().template reserve<unit>(shape.groups * row_panels * T::MR * units);
  int64_t* offsets = scratch<1>().template reserve<int64_t>(units);
  for (int64_t u = 0; u < units; ++u) offsets[u] = u / taps * sorted.channel + sorted.offset(u % taps);
  // Few images: all threads work on one at a time. Many: each thread has its own.
  const int64_t threads = parallel ? omp_get_max_threads() : 1;
  const bool together = threads > 1 && products % threads && products < 4 * threads;
  unit* common = together ? scratch<2>().template reserve<unit>(image_units) : nullptr;
  const int64_t strips = ceil_div(sorted.positions, T::strip);
  const int64_t blocks = together ? least(strips, threads * 4) : 1;

#pragma omp parallel if (parallel)
  {
    unit* image = together ? common : scratch<3>().template reserve<unit>(image_units);
    acc_t* sums = scratch<4>().template reserve<acc_t>(T::block_rows * T::strip);
    const auto copy_channel = [&](int64_t product, int64_t pair) {
      const int64_t n = product / shape.groups, g = product % shape.groups;
      for (int64_t half = 0; half < P; ++half) {
        const int64_t c = pair * P + half;
        if (c >= channels) break;
        const detail::Put<Compute, Prologue> put{image + pair * sorted.channel, prologue, n, g * channels + c,
                                                 half == 1};
        sorted.copy(x + n * shape.x_strides[0] + (g * channels + c) * shape.x_strides[1], put);
      }
      if (pair == 0) {
        for (int64_t i = 0; i < slack; ++i) image[image_units - slack + i] = 0;
      }
    };
    const auto multiply = [&](int64_t product, int64_t begin, int64_t end) {
      const int64_t n = product / shape.groups, g = product % shape.groups;
      detail::multiply_panels<T>(
          weights + g * row_panels * T::MR * units,
          [=](int64_t col, int64_t u) {
            const unit* base = image + begin + col;
            const int64_t* offset = offsets + u;
            return [=](int64_t p) { return base + offset[p]; };
          },
          units, rows, end - begin, sums, [&](int64_t row, int64_t col, int64_t width, const acc_t* acc) {
            sorted.segments(begin + col, width, [&](int64_t position, int64_t at, int64_t count) {
              epilogue(n, g * rows + row, position, count, acc + at);
            });
          });
    };

#pragma omp for schedule(static)
    for (int64_t p = 0; p < shape.groups * row_panels; ++p) {
      const int64_t g = p / row_panels, row = p % row_panels * T::MR, valid = least(T::MR, rows - row);
      unit* panel = weights + p * T::MR * units;
      const W* from = w + (g * rows + row) * channels * taps;
      if constexpr (P == 1) {
        detail::pack_strided<Compute, T::MR>(from, channels * taps, 1, valid, units, panel);
      } else {
        for (int64_t u = 0; u < units; ++u) {
          const int64_t c = u / taps * P, tap = u % taps;
          for (int64_t r = 0; r < T::MR; ++r) {
            const W* row_from = from + r * channels * taps + c * taps + tap;
            const float low = r < valid ? float(row_from[0]) : 0;
            panel[u * T::MR + r] = pair_bits(low, r < valid && c + 1 < channels ? float(row_from[taps]) : 0);
          }
        }
      }
    }
    if (together) {
      for (int64_t product = 0; product < products; ++product) {
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < ceil_div(channels, P); ++pair) copy_channel(product, pair);
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; ++block) {
          multiply(product, block * strips / blocks * T::strip,
                   least(sorted.positions, (block + 1) * strips / blocks * T::strip));
        }
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t product = 0; product < products; ++product) {
        for (int64_t pair = 0; pair < ceil_div(channels, P); ++pair) copy_channel(product, pair);
        multiply(product, 0, sorted.positions);
      }
    }
  }
}

// 1x1 kernels with stride 1 and no padding: the images themselves are the matrices.
template <class T, class X, class W, class Epilogue, class Prologue = Unchanged>
inline void conv_pointwise(int64_t batch, int64_t in_channels, int64_t out_channels, int64_t groups,
                           int64_t positions, const int64_t (&x_strides)[3], const X* x, const W* w,
                           Epilogue&& epilogue, bool parallel = true, const Prologue& prologue = {}) {
  const int64_t channels = in_channels / groups, rows = out_channels / groups;
  const int64_t image_stride = x_strides[0], channel_stride = x_strides[1], stride = x_strides[2];
  const GemmSize size{batch * groups, rows, positions, channels};
  const auto weights = matrix(w, channels, 1, [=](int64_t b) { return b % groups * rows * channels; });
  const auto finish = [&](int64_t b, int64_t row, int64_t pos, int64_t count, const typename T::acc* acc) {
    epilogue(b / groups, b % groups * rows + row, pos, count, acc);
  };
  if constexpr (std::is_same_v<Prologue, Unchanged>) {
    const auto images = matrix(x, channel_stride, stride, [=](int64_t b) {
      return b / groups * image_stride + b % groups * channels * channel_stride;
    });
    gemm<T>(size, weights, images, finish, groups == 1, false, parallel);
  } else {
    const auto rows_of = [&](int64_t b, int64_t k, int64_t col, int64_t count, typename T::acc* out) {
      const int64_t n = b / groups, c = b % groups * channels + k;
      const X* from = x + n * image_stride + c * channel_stride + col * stride;
      for (int64_t i = 0; i < count; ++i) {
        out[i] = prologue(static_cast<typename T::acc>(from[i * stride]), n, c);
      }
    };
    gemm<T>(size, weights, rows_of, finish, groups == 1, false, parallel);
  }
}

}  // namespace ke
