"""Windows, searches, bags of embeddings and attention, on the shapes and values that break them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.codegen.test_rows import INF, NAN, same, source_of


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [5, 21, 47])
def test_windows_at_borders_and_with_nan(width: int) -> None:
    x = drawn(3, 17, 9, width)
    x[0, 1, 4, 2], x[1, 0, 0, 0], x[2, 3, 8, width - 1] = NAN, -INF, INF

    def pooled(x: Tensor) -> Tensor:
        return F.max_pool2d(torch.relu(x), 3, stride=2, padding=1)

    same(pooled, x)
    same(lambda x: F.avg_pool2d(x, (2, 3), stride=(1, 2), padding=(1, 0)), x)
    assert ">= 0" not in source_of(pooled, x)  # the borders are pieces of their own


@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 2, 2), (1, 0, 1)])
def test_depthwise_convolution_with_several_filters(stride: int, padding: int, dilation: int) -> None:
    x, weight, bias = drawn(2, 10, 11, 23), drawn(20, 1, 3, 3, seed=1), drawn(20, seed=2)

    def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.hardtanh(F.conv2d(x, weight, bias, stride, padding, dilation, groups=10), 0.0, 2.0)

    same(convolved, x, weight, bias)
    assert "ke::conv" not in source_of(convolved, x, weight, bias)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("right", [False, True])
def test_searches_probe_where_torch_does(size: int, right: bool) -> None:
    rows = drawn(3, size).sort(dim=1).values
    rows[1, size // 3 :] = NAN
    rows[2] = rows[2].round()
    values = torch.cat([drawn(3, 40, seed=1), rows[:, :1], torch.tensor([[NAN, INF, -INF, 0.0]] * 3)], dim=1)
    same(lambda rows, values: torch.searchsorted(rows, values, right=right), rows, values)
    whole = torch.arange(0, 3 * size, 3)
    same(lambda row, ids: torch.searchsorted(row, ids, right=right), whole, torch.arange(-2, 3 * size + 2))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding, closed", [(None, False), (3, True)])
def test_bags_of_any_length(mode: str, padding: int | None, closed: bool) -> None:
    table, ids = drawn(11, 149), torch.arange(40) % 11
    offsets = torch.tensor([0, 0, 1, 14, 14, 39, 40, 40])

    def pooled(ids: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        return F.embedding_bag(
            ids, table, offsets, mode=mode, padding_idx=padding, include_last_offset=closed
        )

    same(pooled, ids, table, offsets)
    assert "ke::embedding_bag" in source_of(pooled, ids, table, offsets)


def test_weighted_bags_and_what_follows_them() -> None:
    table, ids, weights = drawn(11, 24), torch.arange(40) % 11, drawn(40, seed=1)
    offsets = torch.tensor([0, 0, 7, 7, 31])

    def pooled(ids: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return torch.relu(F.embedding_bag(ids, table, offsets, mode="sum", per_sample_weights=weights)) + 1

    same(pooled, ids, table, offsets, weights)
    assert source_of(pooled, ids, table, offsets, weights).count('extern "C"') == 1


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    future = torch.triu(torch.ones(scores.shape[-2:], dtype=torch.bool), diagonal=1)
    return torch.softmax(scores.masked_fill(future, -INF), dim=-1) @ value


def test_causal_attention_leaves_out_only_what_weighs_nothing() -> None:
    query, key, value = (drawn(2, 3, 150, 20, seed=s) for s in range(3))
    assert "/*causal*/ true" in source_of(causal, query, key, value)
    same(causal, query, key, value, tolerance=1e-4)
    value[0, 1, 149, 7], value[1, 2, 140, 0] = NAN, INF  # 0 * NaN is NaN: rows before see it too
    key[1, 0, 100, 3] = NAN
    same(causal, query, key, value, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.3}, {"enable_gqa": True}, {"dropout_p": 0.0, "is_causal": False}], ids=str
)
def test_the_library_s_attention_is_taken_over(options: dict[str, Any], dtype: torch.dtype) -> None:
    heads = 2 if "enable_gqa" in options else 4
    query, key, value = (drawn(2, n, 70, 24, seed=n).to(dtype) for n in (4, heads, heads))

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)

    source = source_of(attended, query, key, value)
    assert "ke::attention" in source and "torch.ops" not in source
    same(attended, query, key, value, tolerance=1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": torch.ones(40, 40).bool().tril(-1)}], ids=str
)
def test_attention_with_a_mask_stays_the_library_s(options: dict[str, Any]) -> None:
    query, key, value = (drawn(2, 3, 40, 16, seed=s) for s in range(3))

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.relu(F.scaled_dot_product_attention(query, key, value, **options))

    assert "aten.scaled_dot_product_attention" in source_of(attended, query, key, value)
    same(attended, query, key, value)


def test_attention_with_shared_heads_lengths_and_bias() -> None:
    query, key, value = drawn(3, 6, 1, 24), drawn(3, 2, 43, 24, seed=1), drawn(3, 2, 43, 24, seed=2)
    lengths, bias = torch.tensor([0, 17, 43]), drawn(6, 1, 43, seed=3)

    def decoded(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, bias: Tensor) -> Tensor:
        key, value = (t.repeat_interleave(3, dim=1) for t in (key, value))
        scores = torch.tanh(query @ key.transpose(-2, -1)) + bias
        scores = scores.masked_fill(torch.arange(43) >= lengths[:, None, None, None], -INF)
        return torch.softmax(scores, dim=-1) @ value

    source = source_of(decoded, query, key, value, lengths, bias)
    assert "ke::attention" in source and "{3, 6, 2, 1, 43, 24, 24}" in source
    same(decoded, query, key, value, lengths, bias, tolerance=1e-4)


def test_what_only_looks_like_attention_stays_apart() -> None:
    query, key, value = (drawn(2, 33, 16, seed=s) for s in range(3))

    def weighed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.softmax(query @ key.transpose(-2, -1), dim=-2)  # over the queries
        return weights @ value

    assert "ke::attention" not in source_of(weighed, query, key, value)
    same(weighed, query, key, value, tolerance=1e-4)
