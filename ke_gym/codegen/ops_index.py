"""Lowering of indirect accesses: gathers, embeddings, searches. Indices come from tensors at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Expr, Index, Indirect, Load, Op, Position, Search, cast, constant, of
from ke_gym.codegen.graph import Tensor
from ke_gym.codegen.lower import Lowering, rule
from ke_gym.codegen.tensors import broadcast, element, literal, op


def indirect(value: Expr, size: int, wrap: bool) -> Index:
    """``value`` as an index below ``size``; with ``wrap`` negative ones count from the end."""
    if isinstance(value, Position):
        return value.index
    value = cast(value, "i64")
    if wrap:
        negative = Op("lt", (value, literal(0, "i64")), "bool")
        value = op("where", negative, op("add", value, literal(size, "i64")), value)
    return of(Indirect(value, size))


@rule("embedding.default")
def embedding(low: Lowering, weight: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    shape, dtype = low.result()
    rank = len(indices.shape)
    return low.compute(
        shape,
        dtype,
        lambda i: element(weight, (indirect(element(indices, i[:rank]), weight.shape[0], False), i[rank])),
    )


@rule("index_select.default")
def index_select(low: Lowering, a: Tensor, dim: int, index: Tensor) -> Tensor:
    shape, dtype = low.result()
    if not a.shape:
        raise Illegal("scalar")
    dim %= len(a.shape)

    def value(i: tuple[Index, ...]) -> Expr:
        at = (i[dim],) if index.shape else ()
        chosen = indirect(element(index, at), a.shape[dim], False)
        return element(a, (*i[:dim], chosen, *i[dim + 1 :]))

    return low.compute(shape, dtype, value)


@rule("gather.default")
def gather(low: Lowering, a: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    shape, dtype = low.result()
    if not a.shape:
        raise Illegal("scalar")
    dim %= len(a.shape)

    def value(i: tuple[Index, ...]) -> Expr:
        chosen = indirect(element(index, i), a.shape[dim], False)
        return element(a, (*i[:dim], chosen, *i[dim + 1 :]))

    return low.compute(shape, dtype, value)


@rule("index.Tensor", "_unsafe_index.Tensor")
def index_(low: Lowering, a: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    shape, dtype = low.result()
    indices = (*indices, *([None] * (len(a.shape) - len(indices))))
    used = [k for k, t in enumerate(indices) if t is not None]
    if not used or any(t is not None and t.dtype in ("bool", "u8") for t in indices):
        raise Illegal("masks have data-dependent shapes")
    tensors = [t for t in indices if t is not None]
    rank = max(len(t.shape) for t in tensors)
    common = tuple(
        max(([1] * (rank - len(t.shape)) + list(t.shape))[k] for t in tensors) for k in range(rank)
    )
    if any(0 in t.shape for t in tensors):
        raise Illegal("nothing is indexed")
    together = used == list(range(used[0], used[-1] + 1))
    start = used[0] if together else 0

    def value(i: tuple[Index, ...]) -> Expr:
        inner = i[start : start + rank]
        rest = iter((*i[:start], *i[start + rank :]))
        source: list[Index] = []
        for k, t in enumerate(indices):
            if t is None:
                source.append(next(rest))
            else:
                chosen = element(broadcast(t, common), inner)
                source.append(indirect(chosen, a.shape[k], True))
        return element(a, tuple(source))

    return low.compute(shape, dtype, value)


def _search(low: Lowering, values: Any, boundaries: Tensor, right: bool) -> Tensor:
    shape, dtype = low.result()
    last = len(boundaries.shape) - 1
    sorted_values = low.argument(boundaries)
    size = boundaries.shape[last]
    natural = sorted_values.stride == tuple(
        low.graph.buffers[sorted_values.buffer].stride[
            len(low.graph.buffers[sorted_values.buffer].stride) - len(sorted_values.stride) :
        ]
    )
    if not natural or sorted_values.stride[last : last + 1] != (1,) or size == 0 or sorted_values.offset:
        raise Illegal("boundaries are not one contiguous row")

    def value(i: tuple[Index, ...]) -> Expr:
        row = (*i[:last], constant(0)) if last else (constant(0),)
        wanted = element(values, i) if isinstance(values, Tensor) else literal(values, boundaries.dtype)
        inner = "f32" if boundaries.dtype in ("bf16", "f16") else boundaries.dtype
        if isinstance(values, Tensor) and values.dtype != boundaries.dtype:
            raise Illegal("values and boundaries differ in dtype")
        return Search(sorted_values.buffer, row, size, cast(wanted, inner), right, "i64")

    return low.compute(shape, dtype, value)


@rule("bucketize.Tensor", "bucketize.Scalar")
def bucketize(
    low: Lowering, values: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    return _search(low, values, boundaries, right)


@rule("searchsorted.Tensor", "searchsorted.Scalar")
def searchsorted(
    low: Lowering,
    boundaries: Tensor,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Tensor:
    if sorter is not None:
        raise Illegal("sorter")
    if len(boundaries.shape) > 1 and (
        not isinstance(values, Tensor) or values.shape[:-1] != boundaries.shape[:-1]
    ):
        raise Illegal("rows differ")
    return _search(low, values, boundaries, right or side == "right")


__all__ = ["Load", "indirect"]
