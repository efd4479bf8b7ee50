"""Lowering of scattered sums over few places, and of embedding bags of equal length.

A sum scattered over few places is a reduction with a comparison in it, which vectorizes and needs no atomics.
Over many places that would be wasteful: those stay library calls.
"""

from __future__ import annotations

import math
from typing import Any

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Const,
    Expr,
    Index,
    Op,
    Position,
    Var,
    cast,
    compute_dtype,
    in_range,
    is_float,
    of,
)
from ke_gym.codegen.graph import Node, Tensor
from ke_gym.codegen.lower import Lowering, rule
from ke_gym.codegen.ops_index import indirect
from ke_gym.codegen.ops_reduce import same
from ke_gym.codegen.ops_views import both, guarded
from ke_gym.codegen.tensors import element, literal, op, variables_of

MOST_WORK = 1 << 22  # comparisons; about what a library call costs


def scattered(
    low: Lowering, a: Tensor, dim: int, index: Tensor, source: Tensor, place: int | None = None
) -> Tensor:
    """``a`` plus, at each ``i``, the sum of ``source[.., j, ..]`` over the ``j`` with ``index[.., j, ..] == i``.

    ``place``: the dimension of ``source`` along which a one-dimensional ``index`` runs; None if ``index`` has the
    shape of ``source``, as in ``scatter_add``.
    """
    count = index.shape[0 if place is not None else dim]
    if math.prod(a.shape) * count > MOST_WORK or count < 2:
        raise Illegal("too many comparisons")
    inner = compute_dtype(a.dtype)
    variables, where = variables_of(a.shape)
    step = Var(f"r{dim}", count)
    at = (*where[:dim], of(step), *where[dim + 1 :])
    wanted = cast(element(index, (of(step),) if place is not None else at), "i64")
    hit: Expr = Op("eq", (wanted, cast(Position(where[dim], "i64"), "i64")), "bool")
    inside: Expr = Const(True, "bool")
    for k, (i, n) in enumerate(zip(at, index.shape)) if place is None else ():
        if k != dim:
            inside = both(inside, in_range(i, 0, n))
    value = guarded(
        inside, op("where", hit, cast(element(source, at), inner), literal(0, inner)), literal(0, inner)
    )
    name = low._node_name("sums")
    total = low._add(Node(name, a.shape, inner, variables, value, low.origin, "sum", (step,)))
    return low.compute(a.shape, a.dtype, lambda i: op("add", cast(element(a, i), inner), element(total, i)))


@rule("scatter_add.default")
def scatter_add(low: Lowering, a: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if not a.shape or not is_float(a.dtype):
        raise Illegal("scalars and integers are left to the library")
    return scattered(low, a, dim % len(a.shape), index, source)


@rule("index_put.default")
def index_put(low: Lowering, a: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    """``index_add``: one vector of indices along one dimension, sums in place."""
    used = [k for k, t in enumerate(indices) if t is not None]
    if not accumulate or len(used) != 1 or not is_float(a.dtype):
        raise Illegal("left to the library")
    (dim,) = used
    index = indices[dim]
    shape = (*a.shape[:dim], *index.shape, *a.shape[dim + 1 :])
    if len(index.shape) != 1 or index.dtype not in ("i32", "i64") or values.shape != shape:
        raise Illegal("left to the library")
    wrapped = Tensor(index.shape, "i64", lambda i: _wrapped(element(index, i), a.shape[dim]))
    return scattered(low, a, dim, wrapped, values, place=dim)


def _wrapped(value: Expr, size: int) -> Expr:
    value = cast(value, "i64")
    negative = Op("lt", (value, literal(0, "i64")), "bool")
    return op("where", negative, op("add", value, literal(size, "i64")), value)


@rule("_embedding_bag.default", "_embedding_bag_forward_only.default")
def embedding_bag(
    low: Lowering, weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = 0,
    sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Bags that all hold as many rows: a sum or mean over a dimension."""
    assert low.current is not None
    shape, dtype = low.result(0)
    bags, width = shape
    length = indices.shape[0] // max(bags, 1)
    _, at = variables_of((bags,))
    start = element(offsets, at)
    regular = isinstance(start, Position) and start.index == at[0] * length
    others = any(user.args[1] != 0 for user in low.current.users)
    if (
        not regular
        or others
        or bags * length != indices.shape[0]
        or length < 1
        or padding_idx >= 0
        or include_last_offset
    ):
        raise Illegal("bags of different lengths")
    if mode == 2:
        raise Illegal("what a maximum does with NaN is left to the library")
    inner = compute_dtype(dtype)

    def row(i: tuple[Index, ...]) -> Expr:
        place = (i[0] * length + i[1],)
        value = cast(
            element(weight, (indirect(element(indices, place), weight.shape[0], False), i[2])), inner
        )
        if per_sample_weights is not None:
            value = op("mul", value, cast(element(per_sample_weights, place), inner))
        return value

    rows = Tensor((bags, length, width), inner, row)
    total = low.reduce(rows, (1,), "sum", same, inner, "sum", keepdim=False)
    scale = literal(1.0 / length if mode == 1 else 1.0, inner)
    out = low.compute(
        shape, dtype, lambda i: op("mul", element(total, i), scale) if mode == 1 else element(total, i)
    )
    return out, out, out, out
