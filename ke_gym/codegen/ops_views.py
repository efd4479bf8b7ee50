"""Lowering of views and constants: changes of index, never copies. ``cat`` and ``pad`` choose by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Const, Expr, Index, Op, Position, cast, constant, in_range, is_float
from ke_gym.codegen.graph import Tensor
from ke_gym.codegen.lower import Lowering, rule
from ke_gym.codegen.tensors import broadcast, element, full, literal, normal_dims, op, reshape, squeeze

MAX_CAT = 16


@rule("alias.default", "detach.default", "clone.default", "contiguous.default", "lift_fresh_copy.default",
      "lift_fresh.default", "_unsafe_view.default", "view.default", "reshape.default", "view_copy.default",
      "_reshape_alias.default", "flatten.using_ints", "dropout.default", "alias_copy.default", "detach_copy.default",
      "_reshape_copy.default", "expand_as.default")  # fmt: skip
def view(low: Lowering, a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return reshape(a, low.result()[0])


@rule("unsqueeze.default", "squeeze.dims", "squeeze.dim", "squeeze.default", "unsqueeze_copy.default",
      "squeeze_copy.dims", "squeeze_copy.dim")  # fmt: skip
def unit_dims(low: Lowering, a: Tensor, *args: Any) -> Tensor:
    shape = low.result()[0]
    kept = [d for d, n in enumerate(a.shape) if n != 1]

    def at(index: tuple[Index, ...]) -> Expr:
        rest = iter([i for i, n in zip(index, shape) if n != 1])
        return a.at(tuple(next(rest) if d in kept else constant(0) for d in range(len(a.shape))))

    return Tensor(shape, a.dtype, at)


@rule("expand.default", "expand_copy.default")
def expand(low: Lowering, a: Tensor, size: Any, implicit: bool = False) -> Tensor:
    return broadcast(a, low.result()[0])


@rule("permute.default", "permute_copy.default")
def permute(low: Lowering, a: Tensor, dims: Sequence[int]) -> Tensor:
    order = [d % len(a.shape) for d in dims]

    def at(index: tuple[Index, ...]) -> Expr:
        return a.at(tuple(index[order.index(d)] for d in range(len(order))))

    return Tensor(tuple(a.shape[d] for d in order), a.dtype, at)


@rule("transpose.int", "transpose_copy.int")
def transpose(low: Lowering, a: Tensor, x: int, y: int) -> Tensor:
    order = list(range(len(a.shape)))
    if order:
        order[x], order[y] = order[y], order[x]
    return permute(low, a, order)


@rule("t.default", "t_copy.default", "numpy_T.default")
def t(low: Lowering, a: Tensor) -> Tensor:
    return permute(low, a, list(reversed(range(len(a.shape)))))


def sliced(a: Tensor, dim: int, start: int, length: int, step: int = 1) -> Tensor:
    shape = (*a.shape[:dim], length, *a.shape[dim + 1 :])
    return Tensor(shape, a.dtype, lambda i: a.at((*i[:dim], i[dim] * step + start, *i[dim + 1 :])))


def _range(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    start = 0 if start is None else start
    end = size if end is None else end
    first = min(max(start + size if start < 0 else start, 0), size)
    return first, max(min(max(end + size if end < 0 else end, 0), size), first)


@rule("slice.Tensor", "slice_copy.Tensor")
def slice_(low: Lowering, a: Tensor, dim: int = 0, start: int | None = None, end: int | None = None,
           step: int = 1) -> Tensor:  # fmt: skip
    dim %= len(a.shape)
    first, last = _range(a.shape[dim], start, end)
    return sliced(a, dim, first, -(-(last - first) // step), step)


@rule("narrow.default")
def narrow(low: Lowering, a: Tensor, dim: int, start: int, length: int) -> Tensor:
    return slice_(low, a, dim, start, start + length)


@rule("select.int", "select_copy.int")
def select(low: Lowering, a: Tensor, dim: int, index: int) -> Tensor:
    dim %= len(a.shape)
    return squeeze(sliced(a, dim, index % a.shape[dim], 1), (dim,))


@rule("unbind.int", "unbind_copy.int")
def unbind(low: Lowering, a: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    return tuple(select(low, a, dim, i) for i in range(a.shape[dim % len(a.shape)]))


@rule("split_with_sizes.default", "split_with_sizes_copy.default")
def split_with_sizes(low: Lowering, a: Tensor, sizes: Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    dim %= len(a.shape)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return tuple(sliced(a, dim, s, n) for s, n in zip(starts, sizes))


@rule("split.Tensor", "split_copy.Tensor")
def split(low: Lowering, a: Tensor, size: int, dim: int = 0) -> tuple[Tensor, ...]:
    total = a.shape[dim % len(a.shape)]
    return split_with_sizes(low, a, [min(size, total - s) for s in range(0, max(total, 1), size)], dim)


@rule("chunk.default")
def chunk(low: Lowering, a: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    return split(low, a, -(-a.shape[dim % len(a.shape)] // chunks), dim)


@rule("as_strided.default", "as_strided_copy.default")
def as_strided(
    low: Lowering, a: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    assert low.current is not None
    fake = low.current.args[0].meta["val"]  # type: ignore[union-attr]
    if not fake.is_contiguous() or fake.storage_offset():
        raise Illegal("strides into a view")
    flat = reshape(a, (math.prod(a.shape),))

    def at(index: tuple[Index, ...]) -> Expr:
        place = constant(offset or 0)
        for i, s in zip(index, stride):
            place = place + i * s
        return flat.at((place,))

    return Tensor(tuple(size), a.dtype, at)


@rule("flip.default")
def flip(low: Lowering, a: Tensor, dims: Sequence[int]) -> Tensor:
    turned = normal_dims(dims, len(a.shape)) if dims else ()
    return Tensor(
        a.shape,
        a.dtype,
        lambda i: a.at(tuple(x * -1 + (a.shape[d] - 1) if d in turned else x for d, x in enumerate(i))),
    )


@rule("roll.default")
def roll(low: Lowering, a: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        flat = reshape(a, (math.prod(a.shape),))
        return reshape(roll(low, flat, shifts, (0,)), a.shape)
    turned: dict[int, int] = {}
    for shift, d in zip(shifts, dims):
        turned[d % len(a.shape)] = turned.get(d % len(a.shape), 0) + shift

    def at(index: tuple[Index, ...]) -> Expr:
        return a.at(
            tuple(
                (x + -turned.get(d, 0) % n) % n if n > 1 else x
                for d, (x, n) in enumerate(zip(index, a.shape))
            )
        )

    return Tensor(a.shape, a.dtype, at)


@rule("diagonal.default", "diagonal_copy.default")
def diagonal(low: Lowering, a: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    dim1, dim2 = dim1 % len(a.shape), dim2 % len(a.shape)
    shape = low.result()[0]

    def at(index: tuple[Index, ...]) -> Expr:
        rest = iter(index[:-1])
        moved = {dim1: index[-1] + max(-offset, 0), dim2: index[-1] + max(offset, 0)}
        return a.at(tuple(moved[d] if d in moved else next(rest) for d in range(len(a.shape))))

    return Tensor(shape, a.dtype, at)


@rule("repeat.default")
def repeat(low: Lowering, a: Tensor, repeats: Sequence[int]) -> Tensor:
    shape = low.result()[0]
    lead = len(shape) - len(a.shape)
    return Tensor(
        shape,
        a.dtype,
        lambda i: a.at(tuple(x % n if n != 1 else constant(0) for x, n in zip(i[lead:], a.shape))),
    )


@rule("unfold.default", "unfold_copy.default")
def unfold(low: Lowering, a: Tensor, dim: int, size: int, step: int) -> Tensor:
    dim %= len(a.shape)
    return Tensor(
        low.result()[0], a.dtype, lambda i: a.at((*i[:dim], i[dim] * step + i[-1], *i[dim + 1 : -1]))
    )


# --------------------------------------------------------------------------------------------- constants


@rule("full.default", "full_like.default", "new_full.default")
def full_(low: Lowering, _: Any, value: Any, *args: Any, **kwargs: Any) -> Tensor:
    return full(*low.result(), args[0] if isinstance(value, (tuple, list)) else value)


@rule("zeros.default", "zeros_like.default", "new_zeros.default", "empty.memory_format", "empty_like.default",
      "new_empty.default", "empty_strided.default", "new_empty_strided.default")  # fmt: skip
def zeros(low: Lowering, *args: Any, **kwargs: Any) -> Tensor:
    return full(*low.result(), 0)


@rule("ones.default", "ones_like.default", "new_ones.default")
def ones(low: Lowering, *args: Any, **kwargs: Any) -> Tensor:
    return full(*low.result(), 1)


@rule("fill.Scalar")
def fill(low: Lowering, _: Any, value: Any) -> Tensor:
    return full(*low.result(), value)


@rule("scalar_tensor.default")
def scalar_tensor(low: Lowering, value: Any, **kwargs: Any) -> Tensor:
    return full(*low.result(), value)


@rule("arange.start_step", "arange.start", "arange.default")
def arange(low: Lowering, start: Any, end: Any = None, step: Any = 1, **kwargs: Any) -> Tensor:
    start = 0 if end is None else start
    return _progression(low, start, step)


@rule("iota.default")
def iota(low: Lowering, length: int, start: int = 0, step: int = 1, **kwargs: Any) -> Tensor:
    return _progression(low, start, step)


def _progression(low: Lowering, start: Any, step: Any) -> Tensor:
    shape, dtype = low.result()

    def at(index: tuple[Index, ...]) -> Expr:
        if isinstance(start, int) and isinstance(step, int):
            return cast(Position(index[0] * step + start, "i64"), dtype)
        position = cast(Position(index[0], "i64"), dtype)
        return op("add", op("mul", position, literal(step, dtype)), literal(start, dtype))

    return Tensor(shape, dtype, at)


# ----------------------------------------------------------------------------------- chosen by position


@rule("cat.default", "concat.default")
def cat(low: Lowering, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape, dtype = low.result()
    dim %= len(shape)
    parts = [p for p in tensors if p.shape != (0,)]
    if len(parts) > MAX_CAT:
        raise Illegal("too many parts to choose between")

    def value(index: tuple[Index, ...]) -> Expr:
        end = shape[dim]
        result: Expr | None = None
        for part in reversed(parts):
            start = end - part.shape[dim]
            here = cast(element(part, (*index[:dim], index[dim] - start, *index[dim + 1 :])), dtype)
            result = here if result is None else op("where", in_range(index[dim], 0, end), here, result)
            end = start
        assert result is not None
        return result

    return low.compute(shape, dtype, value)


@rule("stack.default")
def stack(low: Lowering, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dim %= len(low.result()[0])
    widened = [
        Tensor(
            (*p.shape[:dim], 1, *p.shape[dim:]),
            p.dtype,
            (lambda q: lambda i: q.at((*i[:dim], *i[dim + 1 :])))(p),
        )
        for p in tensors
    ]
    return cat(low, widened, dim)


@rule("constant_pad_nd.default", "pad.default")
def constant_pad(low: Lowering, a: Tensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    mode = args[0] if args and isinstance(args[0], str) else kwargs.get("mode", "constant")
    numbers = [x for x in (*args, kwargs.get("value")) if isinstance(x, (int, float))]
    if mode != "constant":
        raise Illegal("not a constant pad")
    shape, dtype = low.result()
    before = [0] * len(shape)
    for k in range(len(pad) // 2):
        before[len(shape) - 1 - k] = pad[2 * k]
    fill_value = literal(numbers[0] if numbers else 0, dtype)

    def value(index: tuple[Index, ...]) -> Expr:
        inside: Expr = Const(True, "bool")
        for i, b, n in zip(index, before, a.shape):
            inside = both(inside, in_range(i - b, 0, n))
        source = tuple(i - b for i, b in zip(index, before))
        return guarded(inside, element(a, source), fill_value)

    return low.compute(shape, dtype, value)


def both(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const):
        return b if a.value else a
    if isinstance(b, Const):
        return a if b.value else b
    return Op("and", (a, b), "bool")


def guarded(condition: Expr, value: Expr, otherwise: Expr) -> Expr:
    if isinstance(condition, Const):
        return value if condition.value else otherwise
    return op("where", condition, value, otherwise)


@rule("tril.default", "triu.default")
def triangle(low: Lowering, a: Tensor, diagonal: int = 0) -> Tensor:
    assert low.current is not None
    lower = "tril" in str(low.current.target)
    shape, dtype = low.result()

    def value(index: tuple[Index, ...]) -> Expr:
        ahead = index[-1] - index[-2] - diagonal
        inside = in_range(ahead, -(2**40), 1) if lower else in_range(ahead, 0, 2**40)
        return guarded(inside, element(a, index), literal(0, dtype))

    return low.compute(shape, dtype, value)


@rule("slice_scatter.default")
def slice_scatter(low: Lowering, a: Tensor, source: Tensor, dim: int = 0, start: int | None = None,
                  end: int | None = None, step: int = 1) -> Tensor:  # fmt: skip
    dim %= len(a.shape)
    first, last = _range(a.shape[dim], start, end)
    if step != 1:
        raise Illegal("strided slice_scatter")

    def value(index: tuple[Index, ...]) -> Expr:
        moved = (*index[:dim], index[dim] - first, *index[dim + 1 :])
        inside = in_range(index[dim], first, last)
        return guarded(inside, cast(element(source, moved), a.dtype), element(a, index))

    return low.compute(a.shape, a.dtype, value)


@rule("select_scatter.default")
def select_scatter(low: Lowering, a: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    dim %= len(a.shape)
    index %= a.shape[dim]
    wide = Tensor(
        (*a.shape[:dim], 1, *a.shape[dim + 1 :]), source.dtype, lambda i: source.at((*i[:dim], *i[dim + 1 :]))
    )
    return slice_scatter(low, a, wide, dim, index, index + 1)


__all__ = ["both", "guarded", "is_float"]
