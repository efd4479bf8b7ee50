"""Lowering of windows (pooling, depthwise convolution), guarded where they leave the input.

A small window is one expression over its taps, so that neighbouring outputs fill a vector; a large one is a
reduction.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    BYTES,
    Const,
    Expr,
    Index,
    Rewriter,
    Var,
    cast,
    compute_dtype,
    constant,
    in_range,
    is_float,
    of,
)
from ke_gym.codegen.graph import Node, Tensor
from ke_gym.codegen.lower import Lowering, rule
from ke_gym.codegen.ops_reduce import rounded
from ke_gym.codegen.ops_views import both, guarded
from ke_gym.codegen.tensors import element, literal, op, variables_of

MAX_TAPS = 25  # of a window printed tap by tap


def spread(value: Any, rank: int, default: int | None = None) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    if not value:
        return (default or 1,) * rank
    return tuple(value) * rank if len(value) == 1 else tuple(value)


Sizes = tuple[int, ...]


def least_integer(dtype: str) -> int:
    return 0 if dtype in ("u8", "bool") else -(2 ** (8 * BYTES[dtype] - 1))


def taps(
    kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, place: tuple[Index, ...]
) -> list[tuple[Sizes, tuple[Index, ...]]]:
    """Every position in the window, and where in the input it lies for the output at ``place``."""
    return [
        (k, tuple(i * s + t * d - p for i, s, t, d, p in zip(place, stride, k, dilation, padding)))
        for k in itertools.product(*map(range, kernel))
    ]


def tap(a: Tensor, lead: tuple[Index, ...], at: tuple[Index, ...]) -> tuple[Expr, Expr]:
    """Whether ``at`` is in the input, and ``a[lead, at]``."""
    inside: Expr = Const(True, "bool")
    for i, size in zip(at, a.shape[len(lead) :]):
        inside = both(inside, in_range(i, 0, size))
    return inside, element(a, (*lead, *at))


def window(
    low: Lowering,
    a: Tensor,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    reduction: str,
    outside: float | int,
    suffix: str,
) -> Tensor:
    """``reduction`` over the window at each place of the output; ``outside`` stands for padding."""
    rank = len(kernel)
    dtype = compute_dtype(a.dtype)
    if math.prod(kernel) <= MAX_TAPS:
        combine = {"max": "max", "sum": "add"}[reduction]

        def value(index: tuple[Index, ...]) -> Expr:
            places = taps(kernel, stride, padding, dilation, index[-rank:])
            parts = [guarded(*tap(a, index[:-rank], at), literal(outside, dtype)) for _, at in places]
            return functools.reduce(lambda x, y: op(combine, x, y), parts)

        return low.compute(shape, dtype, value, suffix)
    variables, index = variables_of(shape)
    rvars = tuple(Var(f"r{k}", n) for k, n in enumerate(kernel))
    at = tuple(index[k - rank] * stride[k] + of(rvars[k]) * dilation[k] - padding[k] for k in range(rank))
    expr = guarded(*tap(a, index[:-rank], at), literal(outside, dtype))
    expr = Rewriter({r: constant(0) for r in rvars if r.size == 1}).expr(cast(expr, dtype))
    live = tuple(r for r in rvars if r.size != 1)
    name = low._node_name(suffix)
    return low._add(Node(name, shape, dtype, variables, expr, low.origin, reduction, live))


@rule("max_pool2d_with_indices.default", "max_pool3d_with_indices.default")
def max_pool_with_indices(
    low: Lowering, a: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert low.current is not None
    used = {u.args[1] for u in low.current.users}
    if 1 in used:
        raise Illegal("the indices are used")
    out = max_pool(low, a, kernel, stride, padding, dilation, position=0)
    return out, out


@rule("max_pool2d.default", "max_pool1d.default", "max_pool3d.default")
def max_pool(
    low: Lowering, a: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, position: int | None = None,
) -> Tensor:  # fmt: skip
    assert low.current is not None
    rank = int(str(low.current.target).split("pool")[1][0])
    shape, dtype = low.result(position)
    size = spread(kernel, rank)
    least = -math.inf if is_float(dtype) else least_integer(dtype)
    steps = spread(stride, rank) if stride else size
    found = window(
        low, a, shape, size, steps, spread(padding, rank), spread(dilation, rank), "max", least, ""
    )
    return rounded(low, found, dtype)


@rule("avg_pool2d.default", "avg_pool1d.default", "avg_pool3d.default")
def avg_pool(
    low: Lowering, a: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    assert low.current is not None
    rank = int(str(low.current.target).split("pool")[1][0])
    shape, dtype = low.result()
    size = spread(kernel, rank)
    pad = spread(padding, rank)
    if ceil_mode or (any(pad) and not count_include_pad and divisor_override is None):
        raise Illegal("the divisor varies")
    if not is_float(dtype):
        raise Illegal("integers are divided and rounded")
    total = window(
        low, a, shape, size, spread(stride, rank) if stride else size, pad, (1,) * rank, "sum", 0, "sum"
    )
    scale = literal(1.0 / (divisor_override or math.prod(size)), compute_dtype(dtype))
    return low.compute(shape, dtype, lambda i: op("mul", element(total, i), scale))


@rule("_adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default", "_adaptive_avg_pool3d.default")
def adaptive_avg_pool(low: Lowering, a: Tensor, out: Sequence[int]) -> Tensor:
    rank = len(out)
    places = a.shape[len(a.shape) - rank :]
    if any(n % m for n, m in zip(places, out)):
        raise Illegal("windows of unequal size")
    size = tuple(n // m for n, m in zip(places, out))
    shape, dtype = low.result()
    total = window(low, a, shape, size, size, (0,) * rank, (1,) * rank, "sum", 0, "sum")
    scale = literal(1.0 / math.prod(size), compute_dtype(dtype))
    return low.compute(shape, dtype, lambda i: op("mul", element(total, i), scale))


def depthwise(
    low: Lowering, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """A convolution of every channel on its own with one or more small filters (Howard et al., 2017).

    Halves are summed up, and the bias added, before they are rounded, as the library does.
    """
    shape, dtype = low.result()
    wide = compute_dtype(dtype)
    kernel = weight.shape[2:]
    rank, filters = len(kernel), shape[1] // x.shape[1]
    sizes = (spread(stride, rank), spread(padding, rank, 0), spread(dilation, rank))

    def value(index: tuple[Index, ...]) -> Expr:
        batch, channel, *place = index
        total: Expr | None = None
        for k, at in taps(kernel, *sizes, tuple(place)):
            factor = cast(element(weight, (channel, constant(0), *map(constant, k))), wide)
            inside, source = tap(x, (batch, channel // filters), at)
            product = guarded(inside, op("mul", cast(source, wide), factor), literal(0, wide))
            total = product if total is None else op("add", total, product)
        assert total is not None
        return total if bias is None else op("add", total, cast(element(bias, (channel,)), wide))

    return low.compute(shape, dtype, value)
