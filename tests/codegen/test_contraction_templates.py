"""The templates under ke/ against fp64 over random sizes, strides and layouts; each compiles once."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from .contraction_build import call, compile_library, relative_error, strided

SOURCE = r"""
#include "ke/attention.h"
#include "ke/conv.h"
constexpr int L = ke::lanes<float>, MR = L == 16 ? 6 : 3;

extern "C" void gemm(void* const* t, const int64_t* s) {
  const auto *x = static_cast<const float*>(t[0]), *w = static_cast<const float*>(t[1]);
  auto* y = static_cast<float*>(t[2]);
  const ke::GemmSize size{s[0], s[1], s[2], s[3]};
  const auto a = ke::matrix(x, s[4], s[5], [=](int64_t b) { return b * s[6]; });
  const auto b = ke::matrix(w, s[7], s[8], [=](int64_t b) { return b * s[9]; });
  const auto finish = [&](int64_t b, int64_t i, int64_t j, int64_t n, const float* acc) {
    for (int64_t c = 0; c < n; ++c) y[(b * size.m + i) * size.n + j + c] += acc[c];
  };
  const bool a_same = s[6] == 0, b_same = s[9] == 0;
  if (s[10] == 0) ke::gemm<ke::Tile<float, MR, 2 * L, 32, 2 * MR, 0>>(size, a, b, finish, a_same, b_same);
  if (s[10] == 1) ke::gemm<ke::Tile<float, MR, 2 * L, 32, 0, 2 * L>>(size, a, b, finish, a_same, b_same);
  if (s[10] == 2) ke::gemm<ke::Tile<float, MR, 2 * L, 32, MR, 4 * L>>(size, a, b, finish, a_same, b_same);
  if (s[10] == 3) ke::gemm_dot<float, 3, 4>(size, a, b, finish, a_same);
  if (s[10] == 4) ke::gemm_stream<float, 3, 2 * L, 16>(size, a, b, finish, a_same);
}

template <int R>
void conv(void* const* t, const int64_t* s) {
  ke::ConvShape<R> shape;
  __builtin_memcpy(&shape, s, sizeof shape);
  auto* y = static_cast<float*>(t[2]);
  const int64_t each = s[sizeof shape / 8];
  ke::conv<ke::Tile<float, MR, 2 * L, 32, 0, 0>, R>(
      shape, static_cast<const float*>(t[0]), static_cast<const float*>(t[1]),
      [&](int64_t n, int64_t c, int64_t p, int64_t count, const float* acc) {
        for (int64_t i = 0; i < count; ++i) y[(n * shape.out_channels + c) * each + p + i] += acc[i];
      });
}
extern "C" void conv1(void* const* t, const int64_t* s) { conv<1>(t, s); }
extern "C" void conv2(void* const* t, const int64_t* s) { conv<2>(t, s); }

extern "C" void attention(void* const* t, const int64_t* s) {
  const ke::AttentionShape shape{s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
  const auto heads = [](void* data, const int64_t* d) {
    return ke::heads(static_cast<const float*>(data), d[0], d[1], d[2], d[3]);
  };
  auto* y = static_cast<float*>(t[4]);
  const auto finish = [&](int64_t b, int64_t h, int64_t i, int64_t n, const float* acc) {
    for (int64_t c = 0; c < n; ++c) y[((b * shape.heads + h) * shape.queries + i) * n + c] += acc[c];
  };
  const auto q = heads(t[0], s + 7), k = heads(t[1], s + 11), v = heads(t[2], s + 15);
  const bool causal = s[23];
  const float empty = __builtin_nanf("");
  if (t[3]) {
    ke::attention<MR, 2, 4 * L>(shape, q, k, v, heads(t[3], s + 19), 0.3f, causal, empty, s[24], true, finish);
  } else {
    ke::attention<MR, 2, 4 * L>(shape, q, k, v, ke::NoMask(), 0.3f, causal, empty, s[24], true, finish);
  }
}
"""


@cache
def library(*flags: str) -> ctypes.CDLL:
    return compile_library(SOURCE, *flags)


def flag_sets() -> list[tuple[str, ...]]:
    avx2 = "avx2" in Path("/proc/cpuinfo").read_text()
    return [("-march=native",), ("-mavx2", "-mfma")] if avx2 else [("-march=native",)]


settings.register_profile("contractions", max_examples=60, deadline=None, derandomize=True)
quick = settings(settings.get_profile("contractions"))


@pytest.mark.parametrize("flags", flag_sets())
@quick
@given(st.data())
def test_gemm(flags, data):
    form = data.draw(st.integers(0, 4), "form")
    draw = lambda low, high, name: data.draw(st.integers(low, high), name)
    batch, m, k = draw(1, 3, "batch"), draw(1, 40, "m"), draw(1, 100, "k")
    n = draw(32 if form == 4 else 1, 150, "n")
    a_order = data.draw(st.permutations([0, 1, 2]), "a layout")
    b_order = {3: [0, 2, 1], 4: [0, 1, 2]}.get(form) or data.draw(st.permutations([0, 1, 2]), "b layout")
    a = strided([batch, m, k], a_order, pad=draw(0, 2, "a pad"))
    b = strided([batch, k, n], b_order, pad=draw(0, 2, "b pad"))
    a_batch, b_batch = [0 if data.draw(st.booleans()) else t.stride(0) for t in (a, b)]
    out = torch.zeros(batch, m, n)
    numbers = [batch, m, n, k, a.stride(1), a.stride(2), a_batch, b.stride(1), b.stride(2), b_batch, form]
    call(library(*flags).gemm, [a, b, out], numbers)
    left = a[:1].expand_as(a) if a_batch == 0 else a
    right = b[:1].expand_as(b) if b_batch == 0 else b
    assert relative_error(out, left.double() @ right.double()) < 2e-6


@pytest.mark.parametrize("flags", flag_sets())
@quick
@given(st.data())
def test_conv(flags, data):
    rank = data.draw(st.integers(1, 2), "rank")
    per_dimension = lambda low, high, name: data.draw(
        st.lists(st.integers(low, high), min_size=rank, max_size=rank), name
    )
    groups = data.draw(st.integers(1, 3), "groups")
    batch, cin, cout = (data.draw(st.integers(1, 3)), *(groups * data.draw(st.integers(1, 6)) for _ in "io"))
    kernel, stride = per_dimension(1, 4, "kernel"), per_dimension(1, 3, "stride")
    padding, dilation = per_dimension(0, 3, "padding"), per_dimension(1, 2, "dilation")
    size = [d * (k - 1) + extra for d, k, extra in zip(dilation, kernel, per_dimension(1, 20, "size"))]
    order = data.draw(st.permutations(range(rank + 2)), "layout")
    x, w = strided([batch, cin, *size], order), torch.randn(cout, cin // groups, *kernel)
    function = [F.conv1d, F.conv2d][rank - 1]
    expected = function(x.double(), w.double(), None, stride, padding, dilation, groups)
    out = torch.zeros(expected.shape)
    numbers = [batch, cin, cout, groups, *size, *kernel, *stride, *padding, *dilation, *x.stride()]
    numbers.append(math.prod(expected.shape[2:]))
    call(getattr(library(*flags), f"conv{rank}"), [x, w, out], numbers)
    assert relative_error(out, expected) < 2e-6


@pytest.mark.parametrize("flags", flag_sets())
@quick
@given(st.data())
def test_attention(flags, data):
    draw = lambda low, high, name: data.draw(st.integers(low, high), name)
    batch, kv_heads, group = draw(1, 2, "batch"), draw(1, 2, "kv heads"), draw(1, 3, "group")
    queries, keys, d, dv = draw(1, 40, "queries"), draw(1, 200, "keys"), draw(1, 40, "d"), draw(1, 70, "dv")
    heads = kv_heads * group
    q, k, v = (
        strided(shape, data.draw(st.permutations(range(4))))
        for shape in ([batch, heads, queries, d], [batch, kv_heads, keys, d], [batch, kv_heads, keys, dv])
    )
    causal, masked, splits = (
        data.draw(st.booleans(), "causal"),
        data.draw(st.booleans(), "mask"),
        draw(1, 3, "splits"),
    )
    mask = torch.randn(batch, 1, queries, keys)
    mask[torch.rand_like(mask) < 0.3] = -torch.inf
    out = torch.zeros(batch, heads, queries, dv)
    strides = [*q.stride(), *k.stride(), *v.stride(), mask.stride(0), 0, *mask.stride()[2:]]
    numbers = [batch, heads, kv_heads, queries, keys, d, dv, *strides, int(causal), splits]
    call(library(*flags).attention, [q, k, v, mask if masked else None, out], numbers)
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT * 0.3
    if masked:
        scores = scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.softmax(scores, -1) @ v.double().repeat_interleave(group, 1)
    assert relative_error(out, expected) < 5e-6
