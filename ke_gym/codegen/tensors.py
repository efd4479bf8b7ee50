"""Tensors as functions of their index: views of them, constants, and their elements as expressions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ke_gym.codegen.expr import Const, Expr, Index, Op, Var, cast, compute_dtype, constant, of
from ke_gym.codegen.graph import Tensor, contiguous_stride


def variables_of(shape: tuple[int, ...]) -> tuple[tuple[Var, ...], tuple[Index, ...]]:
    variables = tuple(Var(f"d{k}", n) for k, n in enumerate(shape))
    return variables, tuple(of(v) if v.size != 1 else constant(0) for v in variables)


def normal_dims(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(rank))
    dims = (dims,) if isinstance(dims, int) else dims
    return tuple(sorted(d % rank for d in dims)) if rank else ()


def element(tensor: Any, index: tuple[Index, ...]) -> Expr:
    """The element as a value to compute with."""
    expr = tensor.at(index)
    return cast(expr, tensor.dtype)


def full(shape: Sequence[int], dtype: str, value: Any) -> Tensor:
    literal = cast(
        Const(value, "bool" if isinstance(value, bool) else "f64" if isinstance(value, float) else "i64"),
        dtype,
    )
    return Tensor(tuple(shape), dtype, lambda _: literal)


def squeeze(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    shape = tuple(n for d, n in enumerate(tensor.shape) if d not in dims)

    def at(index: tuple[Index, ...]) -> Expr:
        rest = iter(index)
        return tensor.at(tuple(constant(0) if d in dims else next(rest) for d in range(len(tensor.shape))))

    return Tensor(shape, tensor.dtype, at)


def broadcast(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    shape = tuple(shape)
    lead = len(shape) - len(tensor.shape)

    def at(index: tuple[Index, ...]) -> Expr:
        return tensor.at(tuple(constant(0) if n == 1 else i for n, i in zip(tensor.shape, index[lead:])))

    return tensor if shape == tensor.shape else Tensor(shape, tensor.dtype, at)


def reshape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    shape = tuple(shape)
    if shape == tensor.shape:
        return tensor

    def at(index: tuple[Index, ...]) -> Expr:
        flat = constant(0)
        for i, stride in zip(index, contiguous_stride(shape)):
            flat = flat + i * stride
        old = []
        for k, (size, stride) in enumerate(zip(tensor.shape, contiguous_stride(tensor.shape))):
            part = flat // stride
            leading = math.prod(tensor.shape[:k]) == 1
            old.append(constant(0) if size == 1 else part if leading else part % size)
        return tensor.at(tuple(old))

    return Tensor(shape, tensor.dtype, at)


def op(name: str, *args: Expr, dtype: str | None = None) -> Expr:
    return Op(name, args, dtype or args[-1].dtype)


def literal(value: float | int | bool, dtype: str) -> Expr:
    kind = "bool" if isinstance(value, bool) else "f64" if isinstance(value, float) else "i64"
    return cast(Const(value, kind), compute_dtype(dtype))
