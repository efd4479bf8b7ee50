"""Lowering of reductions, scans, softmax and normalisation, each as separate reductions and pointwise nodes.

Statistics are lowered in their numerically safe form (softmax subtracts the maximum, variance is two-pass);
the schedule decides which of these nodes share a pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Const, Expr, Index, Op, Position, cast, compute_dtype, is_float
from ke_gym.codegen.graph import Tensor
from ke_gym.codegen.lower import Lowering, rule
from ke_gym.codegen.tensors import broadcast, element, full, literal, normal_dims, op, reshape, squeeze


def same(value: Expr, index: tuple[Index, ...]) -> Expr:
    return value


def finish(low: Lowering, result: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return result if keepdim else squeeze(result, dims)


def rounded(low: Lowering, a: Tensor, dtype: str, suffix: str = "") -> Tensor:
    """``a``, which was computed in more than half precision, as the result that the model has of it."""
    return a if a.dtype == dtype else low.compute(a.shape, dtype, lambda i: element(a, i), suffix)


def _plain(low: Lowering, a: Tensor, dim: Any, keepdim: bool, kind: str) -> Tensor:
    dims = normal_dims(dim, len(a.shape))
    dtype = low.result()[1]
    if kind not in ("sum", "prod") or compute_dtype(dtype) == dtype:
        return finish(low, low.reduce(a, dims, kind, same, dtype), dims, keepdim)
    # They may be kept in memory as they grow: not in half precision.
    total = low.reduce(a, dims, kind, same, compute_dtype(dtype), kind)
    return finish(low, rounded(low, total, dtype), dims, keepdim)


@rule("sum.dim_IntList", "sum.default")
def sum_(low: Lowering, a: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    return _plain(low, a, dim, keepdim, "sum")


@rule("prod.dim_int", "prod.default")
def prod(low: Lowering, a: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    return _plain(low, a, dim, keepdim, "prod")


@rule("amax.default")
def amax(low: Lowering, a: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _plain(low, a, dim, keepdim, "max")


@rule("amin.default")
def amin(low: Lowering, a: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _plain(low, a, dim, keepdim, "min")


@rule("any.dim", "any.dims", "any.default")
def any_(low: Lowering, a: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _plain(low, a, dim, keepdim, "any")


@rule("all.dim", "all.dims", "all.default")
def all_(low: Lowering, a: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _plain(low, a, dim, keepdim, "all")


@rule("mean.dim", "mean.default")
def mean(low: Lowering, a: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    dims = normal_dims(dim, len(a.shape))
    result = mean_of(low, a, dims, low.result()[1], "")
    return finish(low, result, dims, keepdim)


def count(a: Tensor, dims: Sequence[int]) -> int:
    return math.prod(a.shape[d] for d in dims)


def mean_of(low: Lowering, a: Tensor, dims: Sequence[int], dtype: str, suffix: str) -> Tensor:
    inner = compute_dtype(dtype)
    total = low.reduce(a, dims, "sum", same, inner, f"{suffix}_sum" if suffix else "sum")
    n = count(a, dims)
    scale = literal(1.0 / n if n else math.nan, inner)
    return low.compute(total.shape, dtype, lambda i: op("mul", element(total, i), scale), suffix)


def centred_squares(low: Lowering, a: Tensor, average: Tensor, dims: Sequence[int], dtype: str) -> Tensor:
    """The sum over ``dims`` of squared distances from ``average``."""
    spread = broadcast(average, a.shape)

    def square(value: Expr, index: tuple[Index, ...]) -> Expr:
        centred = op("sub", cast(value, dtype), element(spread, index))
        return op("mul", centred, centred)

    return low.reduce(a, dims, "sum", square, compute_dtype(dtype), "squares")


def variance(
    low: Lowering, a: Tensor, dims: Sequence[int], correction: float, dtype: str
) -> tuple[Tensor, Tensor]:
    inner = compute_dtype(dtype)
    average = mean_of(low, a, dims, inner, "mean")
    squares = centred_squares(low, a, average, dims, inner)
    rest = count(a, dims) - correction
    scale = literal(1.0 / rest if rest > 0 else math.inf, inner)
    spread = low.compute(squares.shape, inner, lambda i: op("mul", element(squares, i), scale), "var")
    return spread, average


@rule("var.correction", "var.dim")
def var(
    low: Lowering, a: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    dims = normal_dims(dim, len(a.shape))
    dtype = low.result()[1]
    spread, _ = variance(low, a, dims, 1 if correction is None else correction, dtype)
    return finish(low, rounded(low, spread, dtype), dims, keepdim)


@rule("std.correction")
def std(
    low: Lowering, a: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    dims = normal_dims(dim, len(a.shape))
    dtype = low.result()[1]
    spread, _ = variance(low, a, dims, 1 if correction is None else correction, dtype)
    root = low.compute(spread.shape, dtype, lambda i: op("sqrt", element(spread, i)))
    return finish(low, root, dims, keepdim)


@rule("var_mean.correction")
def var_mean(
    low: Lowering, a: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = normal_dims(dim, len(a.shape))
    dtype = low.result(0)[1]
    spread, average = variance(low, a, dims, 1 if correction is None else correction, dtype)
    spread, average = rounded(low, spread, dtype), rounded(low, average, dtype, "mean")
    return finish(low, spread, dims, keepdim), finish(low, average, dims, keepdim)


# ---------------------------------------------------------------------------------------- arg reductions


def arg_reduce(low: Lowering, a: Tensor, dim: int | None, kind: str) -> tuple[Tensor, Tensor]:
    """(values, indices) of the first extreme element; a NaN is the extreme, as in torch."""
    if compute_dtype(a.dtype) != a.dtype and not low.given(a):
        raise Illegal("elements that are alike only when they are rounded")
    if dim is None:
        a, dim = reshape(a, (math.prod(a.shape),)), 0
    if not a.shape:
        a = reshape(a, (1,))
    dim %= len(a.shape)
    best = low.reduce(a, (dim,), kind, same, a.dtype, kind)
    size = a.shape[dim]

    def position(value: Expr, index: tuple[Index, ...]) -> Expr:
        top = element(broadcast(best, a.shape), index)
        hit: Expr = Op("eq", (value, top), "bool")
        if is_float(a.dtype):
            hit = Op("or", (hit, Op("ne", (value, value), "bool")), "bool")
        return op("where", hit, cast(Position(index[dim], "i64"), "i32"), literal(size - 1, "i32"))

    return best, low.reduce(a, (dim,), "min", position, "i32", "index")


def _indices(low: Lowering, found: Tensor, dim: int | None, keepdim: bool, rank: int, suffix: str) -> Tensor:
    whole = low.compute(found.shape, "i64", lambda i: element(found, i), suffix)
    if dim is None:
        return reshape(whole, (1,) * rank if keepdim else ())
    return finish(low, whole, normal_dims(dim, rank), keepdim)


@rule("argmax.default", "argmin.default")
def argmax(low: Lowering, a: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    assert low.current is not None
    kind = "max" if "argmax" in str(low.current.target) else "min"
    _, found = arg_reduce(low, a, dim, kind)
    return _indices(low, found, dim if a.shape else None, keepdim, len(a.shape), "")


@rule("max.dim", "min.dim")
def max_dim(low: Lowering, a: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    assert low.current is not None
    if not a.shape:
        raise Illegal("scalar")
    kind = "max" if "max" in str(low.current.target) else "min"
    best, found = arg_reduce(low, a, dim, kind)
    dims = normal_dims(dim, len(a.shape))
    return finish(low, best, dims, keepdim), _indices(low, found, dim, keepdim, len(a.shape), "indices")


@rule("max.default", "min.default")
def max_all(low: Lowering, a: Tensor) -> Tensor:
    assert low.current is not None
    return _plain(low, a, None, False, "max" if ".max" in str(low.current.target) else "min")


# --------------------------------------------------------------------------------------- softmax family


def exponentials(low: Lowering, a: Tensor, dim: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, exp(a - maximum), its sum) along ``dim``."""
    inner = compute_dtype(dtype)
    top = low.reduce(a, (dim,), "max", same, inner, "max")
    wide = broadcast(top, a.shape)
    power = low.compute(
        a.shape, inner, lambda i: op("exp", op("sub", cast(element(a, i), inner), element(wide, i))), "exp"
    )
    return top, power, low.reduce(power, (dim,), "sum", same, inner, "sum")


@rule("_softmax.default", "softmax.int", "_safe_softmax.default")
def softmax(low: Lowering, a: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    if not a.shape:
        return full((), low.result()[1], 1)
    dim %= len(a.shape)
    shape, dtype = low.result()
    _, power, total = exponentials(low, a, dim, dtype)
    inverse = low.compute(
        total.shape, power.dtype, lambda i: op("div", literal(1.0, power.dtype), element(total, i)), "inverse"
    )
    wide = broadcast(inverse, shape)
    return low.compute(shape, dtype, lambda i: op("mul", element(power, i), element(wide, i)))


@rule("_log_softmax.default", "log_softmax.int")
def log_softmax(low: Lowering, a: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    if not a.shape:
        return full((), low.result()[1], 0)
    dim %= len(a.shape)
    shape, dtype = low.result()
    top, power, total = exponentials(low, a, dim, dtype)
    shift = low.compute(total.shape, power.dtype, lambda i: op("log", element(total, i)), "log")
    wide, wide_top = broadcast(shift, shape), broadcast(top, shape)
    return low.compute(
        shape,
        dtype,
        lambda i: op(
            "sub", op("sub", cast(element(a, i), power.dtype), element(wide_top, i)), element(wide, i)
        ),
    )


@rule("logsumexp.default")
def logsumexp(low: Lowering, a: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    dims = normal_dims(dim, len(a.shape))
    dtype = low.result()[1]
    inner = compute_dtype(dtype)
    top = low.reduce(a, dims, "max", same, inner, "max")
    infinite = literal(math.inf, inner)

    def shift(i: tuple[Index, ...]) -> Expr:
        value = element(top, i)
        return op("where", Op("eq", (op("abs", value), infinite), "bool"), literal(0.0, inner), value)

    safe = low.compute(top.shape, inner, shift, "shift")
    wide = broadcast(safe, a.shape)
    total = low.reduce(
        a, dims, "sum", lambda v, i: op("exp", op("sub", cast(v, inner), element(wide, i))), inner, "sum"
    )
    result = low.compute(
        total.shape, dtype, lambda i: op("add", op("log", element(total, i)), element(safe, i))
    )
    return finish(low, result, dims, keepdim)


# --------------------------------------------------------------------------------------- normalisation


def normalised(
    low: Lowering, a: Tensor, dims: Sequence[int], eps: float, affine: Any, dtype: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(affine((a - mean) / std), mean, 1 / std) over ``dims``; ``affine(value, index)`` is applied last."""
    inner = compute_dtype(dtype)
    spread, average = variance(low, a, dims, 0, inner)
    inverse = low.compute(
        spread.shape, inner, lambda i: op("rsqrt", op("add", element(spread, i), literal(eps, inner))), "rstd"
    )
    wide_mean, wide_inverse = broadcast(average, a.shape), broadcast(inverse, a.shape)

    def value(index: tuple[Index, ...]) -> Expr:
        centred = op("sub", cast(element(a, index), inner), element(wide_mean, index))
        return affine(op("mul", centred, element(wide_inverse, index)), index)  # type: ignore[no-any-return]

    return low.compute(a.shape, dtype, value), average, inverse


def per_channel(parameter: Tensor | None, a: Tensor) -> Tensor | None:
    return None if parameter is None else channels(parameter, a)


def scaled(weight: Tensor | None, bias: Tensor | None, dtype: str) -> Any:
    def affine(value: Expr, index: tuple[Index, ...]) -> Expr:
        if weight is not None:
            value = op("mul", value, cast(element(weight, index), dtype))
        return value if bias is None else op("add", value, cast(element(bias, index), dtype))

    return affine


@rule("native_layer_norm.default")
def layer_norm(
    low: Lowering, a: Tensor, normal: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, ...]:
    dims = tuple(range(len(a.shape) - len(normal), len(a.shape)))
    wide = [None if p is None else broadcast(p, a.shape) for p in (weight, bias)]
    dtype = low.result(0)[1]
    return normalised(low, a, dims, eps, scaled(wide[0], wide[1], compute_dtype(dtype)), dtype)


@rule("native_group_norm.default")
def group_norm(
    low: Lowering, a: Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, ...]:
    grouped = reshape(a, (n, groups, c // groups, hw))
    wide = [
        None if p is None else broadcast(reshape(p, (1, groups, c // groups, 1)), grouped.shape)
        for p in (weight, bias)
    ]
    dtype = low.result(0)[1]
    out, average, inverse = normalised(
        low, grouped, (2, 3), eps, scaled(wide[0], wide[1], compute_dtype(dtype)), dtype
    )
    return reshape(out, a.shape), reshape(average, (n, groups)), reshape(inverse, (n, groups))


def channels(parameter: Tensor, a: Tensor) -> Tensor:
    shape = (1, a.shape[1], *(1 for _ in a.shape[2:]))
    return broadcast(reshape(parameter, shape), a.shape)


@rule("_native_batch_norm_legit_no_training.default")
def batch_norm(
    low: Lowering, a: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    shape, dtype = low.result(0)
    inner = compute_dtype(dtype)
    affine = scaled(per_channel(weight, a), per_channel(bias, a), inner)
    inverse = low.compute(
        var.shape, inner, lambda i: op("rsqrt", op("add", element(var, i), literal(eps, inner))), "rstd"
    )
    wide_mean, wide_inverse = channels(mean, a), channels(inverse, a)

    def value(i: tuple[Index, ...]) -> Expr:
        centred = op("sub", cast(element(a, i), inner), cast(element(wide_mean, i), inner))
        return affine(op("mul", centred, element(wide_inverse, i)), i)  # type: ignore[no-any-return]

    empty = full((0,), dtype, 0)
    return low.compute(shape, dtype, value), empty, empty


@rule(
    "_native_batch_norm_legit_functional.default",
    "_native_batch_norm_legit.no_stats",
    "_native_batch_norm_legit.default",
)
def batch_norm_train(low: Lowering, a: Tensor, weight: Any, bias: Any, *args: Any) -> tuple[Tensor, ...]:
    assert low.current is not None
    if "no_stats" in str(low.current.target):
        training, eps = args[0], args[2]
    else:
        training, eps = args[2], args[4]
    if not training:
        return batch_norm(low, a, weight, bias, args[0], args[1], 0.0, eps)
    if "no_stats" not in str(low.current.target):
        raise Illegal("running statistics")
    dims = (0, *range(2, len(a.shape)))
    dtype = low.result(0)[1]
    affine = scaled(per_channel(weight, a), per_channel(bias, a), compute_dtype(dtype))
    out, average, inverse = normalised(low, a, dims, eps, affine, dtype)
    return out, squeeze(average, dims), squeeze(inverse, dims)


@rule("_fused_rms_norm.default")
def rms_norm(
    low: Lowering, a: Tensor, normal: Sequence[int], weight: Any, eps: float | None
) -> tuple[Tensor, ...]:
    dims = tuple(range(len(a.shape) - len(normal), len(a.shape)))
    dtype = low.result(0)[1]
    inner = compute_dtype(dtype)
    limit = {"f64": 2.220446049250313e-16, "bf16": 0.0078125, "f16": 0.0009765625}.get(
        dtype, 1.1920928955078125e-07
    )
    eps = limit if eps is None else eps
    squares = low.reduce(a, dims, "sum", lambda v, i: op("mul", v, v), inner, "squares")
    scale = literal(1.0 / max(count(a, dims), 1), inner)
    inverse = low.compute(
        squares.shape,
        inner,
        lambda i: op("rsqrt", op("add", op("mul", element(squares, i), scale), literal(eps, inner))),
        "rrms",
    )
    wide = broadcast(inverse, a.shape)
    affine = scaled(None if weight is None else broadcast(weight, a.shape), None, inner)
    out = low.compute(
        a.shape, dtype, lambda i: affine(op("mul", cast(element(a, i), inner), element(wide, i)), i)
    )
    return out, inverse


# ------------------------------------------------------------------------------------------------ scans


@rule("cumsum.default", "cumprod.default")
def cumulative(low: Lowering, a: Tensor, dim: int, **kwargs: Any) -> Tensor:
    assert low.current is not None
    return low.scan(a, dim, "sum" if "cumsum" in str(low.current.target) else "prod", low.result()[1])


@rule("cummax.default", "cummin.default", "logcumsumexp.default")
def not_looped(low: Lowering, *args: Any, **kwargs: Any) -> Tensor:
    raise Illegal("left to the library")


__all__ = ["Const", "arg_reduce", "same"]
