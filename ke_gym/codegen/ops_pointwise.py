"""Lowering of elementwise operations: broadcasting, type promotion, and one scalar expression each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ke_gym.codegen.expr import Const, Expr, Op, cast, compute_dtype, is_float
from ke_gym.codegen.graph import Tensor
from ke_gym.codegen.lower import Lowering, dtype_name, rule
from ke_gym.codegen.tensors import broadcast, element, literal, op

Formula = Callable[..., Expr]


def value_of(arg: Any, shape: tuple[int, ...], index: Any, dtype: str) -> Expr:
    if isinstance(arg, Tensor):
        return cast(element(broadcast(arg, shape), index), dtype)
    return literal(arg, dtype)


def promoted(low: Lowering, args: tuple[Any, ...]) -> str:
    """The dtype torch computes ``args`` in, from the FX arguments' fake tensors."""
    assert low.current is not None
    fakes = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in low.current.args[: len(args)]]
    fakes = [f for f in fakes if isinstance(f, (torch.Tensor, bool, int, float))]
    dtype = fakes[0]
    for other in fakes[1:]:
        dtype = _result_type(dtype, other)
    return dtype_name(dtype.dtype) if isinstance(dtype, torch.Tensor) else "f32"


def _result_type(a: Any, b: Any) -> Any:
    result = torch.result_type(a, b)
    tensors = [t for t in (a, b) if isinstance(t, torch.Tensor)]
    wide = max(tensors, key=lambda t: t.dim())
    return torch.empty((1,) * wide.dim(), dtype=result, device="meta")


def pointwise(low: Lowering, formula: Formula, args: tuple[Any, ...], dtype: str | None = None) -> Tensor:
    """``formula`` over ``args`` converted to ``dtype`` (default: the result's)."""
    shape, out = low.result()
    inner = dtype or out
    return low.compute(shape, out, lambda index: formula(*(value_of(a, shape, index, inner) for a in args)))


def register(names: str, formula: Formula, arity: int, compare: bool = False) -> None:
    @rule(*names.split())
    def lowered(low: Lowering, *args: Any, **kwargs: Any) -> Tensor:
        args = args[:arity]
        return pointwise(low, formula, args, promoted(low, args) if compare else None)


def _unary(name: str) -> Formula:
    return lambda a: op(name, a)


def _binary(name: str) -> Formula:
    return lambda a, b: op(name, a, b)


def _truth(expr: Expr) -> Expr:
    return cast(expr, "bool")


def const(like: Expr, value: float) -> Expr:
    return literal(value, like.dtype)


for _name in [
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
    "tanh",
    "erf",
    "erfc",
    "sqrt",
    "rsqrt",
    "sigmoid",
    "abs",
    "neg",
    "floor",
    "ceil",
    "trunc",
    "round",
    "lgamma",
]:
    register(f"{_name}.default", _unary(_name), 1)

register("relu.default", lambda a: op("max", a, const(a, 0)), 1)
register("reciprocal.default", lambda a: op("div", const(a, 1.0), a), 1)
register("square.default", lambda a: op("mul", a, a), 1)
register("silu.default", _unary("silu"), 1)
register("sign.default sgn.default", _unary("sign"), 1)
register("frac.default", lambda a: op("sub", a, op("trunc", a)), 1)
register("mul.Tensor mul.Scalar", _binary("mul"), 2)
register("div.Tensor div.Scalar true_divide.Tensor", _binary("div"), 2)
register("maximum.default", _binary("max"), 2)
register("minimum.default", _binary("min"), 2)
register("atan2.default", _binary("atan2"), 2)
register("fmod.Tensor fmod.Scalar", _binary("fmod"), 2)
register("remainder.Tensor remainder.Scalar", _binary("remainder"), 2)
register("hypot.default", _binary("hypot"), 2)
register("copysign.Tensor copysign.Scalar", _binary("copysign"), 2)
register("bitwise_and.Tensor bitwise_and.Scalar", _binary("bitand"), 2)
register("bitwise_or.Tensor bitwise_or.Scalar", _binary("bitor"), 2)
register("bitwise_xor.Tensor bitwise_xor.Scalar", _binary("bitxor"), 2)
register(
    "bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar __lshift__.Tensor __lshift__.Scalar",
    _binary("shl"),
    2,
)
register(
    "bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar __rshift__.Tensor __rshift__.Scalar",
    _binary("shr"),
    2,
)
register("lerp.Scalar", lambda a, b, w: op("add", a, op("mul", w, op("sub", b, a))), 3)

for _name in ["eq", "ne", "lt", "le", "gt", "ge"]:
    register(
        f"{_name}.Tensor {_name}.Scalar",
        (lambda n: lambda a, b: Op(n, (a, b), "bool"))(_name),
        2,
        compare=True,
    )

register("isnan.default", lambda a: Op("ne", (a, a), "bool"), 1, compare=True)
register("isinf.default", lambda a: Op("eq", (op("abs", a), const(a, float("inf"))), "bool"), 1, compare=True)
register(
    "isfinite.default", lambda a: Op("lt", (op("abs", a), const(a, float("inf"))), "bool"), 1, compare=True
)
register("logical_not.default", lambda a: Op("not", (_truth(a),), "bool"), 1, compare=True)
register("logical_and.default", lambda a, b: Op("and", (_truth(a), _truth(b)), "bool"), 2, compare=True)
register("logical_or.default", lambda a, b: Op("or", (_truth(a), _truth(b)), "bool"), 2, compare=True)
register("logical_xor.default", lambda a, b: Op("ne", (_truth(a), _truth(b)), "bool"), 2, compare=True)


@rule("bitwise_not.default")
def bitwise_not(low: Lowering, a: Any) -> Tensor:
    return pointwise(low, lambda x: op("not" if x.dtype == "bool" else "bitnot", x), (a,))


@rule("add.Tensor", "add.Scalar")
def add(low: Lowering, a: Any, b: Any, alpha: Any = 1) -> Tensor:
    return pointwise(
        low, lambda x, y: op("add", x, y if alpha == 1 else op("mul", y, literal(alpha, y.dtype))), (a, b)
    )


@rule("sub.Tensor", "sub.Scalar")
def sub(low: Lowering, a: Any, b: Any, alpha: Any = 1) -> Tensor:
    return pointwise(
        low, lambda x, y: op("sub", x, y if alpha == 1 else op("mul", y, literal(alpha, y.dtype))), (a, b)
    )


@rule("rsub.Scalar", "rsub.Tensor")
def rsub(low: Lowering, a: Any, b: Any, alpha: Any = 1) -> Tensor:
    return pointwise(
        low, lambda x, y: op("sub", y, x if alpha == 1 else op("mul", x, literal(alpha, x.dtype))), (a, b)
    )


@rule("div.Tensor_mode", "div.Scalar_mode")
def div_mode(low: Lowering, a: Any, b: Any, rounding_mode: str | None = None) -> Tensor:
    def formula(x: Expr, y: Expr) -> Expr:
        if is_float(x.dtype):
            quotient = op("div", x, y)
            return op(rounding_mode, quotient) if rounding_mode else quotient
        return op("floordiv" if rounding_mode == "floor" else "intdiv", x, y)

    return pointwise(low, formula, (a, b))


@rule("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(low: Lowering, condition: Any, a: Any, b: Any) -> Tensor:
    shape, dtype = low.result()
    return low.compute(
        shape,
        dtype,
        lambda i: op(
            "where",
            _truth(value_of(condition, shape, i, "bool")),
            value_of(a, shape, i, dtype),
            value_of(b, shape, i, dtype),
        ),
    )


@rule("clamp.default", "clamp.Tensor", "hardtanh.default")
def clamp(low: Lowering, a: Any, low_bound: Any = None, high: Any = None, **named: Any) -> Tensor:
    low_bound, high = named.get("min", low_bound), named.get("max", high)

    def formula(x: Expr, *limits: Expr) -> Expr:
        rest = list(limits)
        if low_bound is not None:
            x = op("max", x, rest.pop(0))
        return op("min", x, rest.pop(0)) if high is not None else x

    return pointwise(low, formula, (a, *(b for b in (low_bound, high) if b is not None)))


@rule("clamp_min.default")
def clamp_min(low: Lowering, a: Any, bound: Any) -> Tensor:
    return clamp(low, a, bound, None)


@rule("clamp_max.default")
def clamp_max(low: Lowering, a: Any, bound: Any) -> Tensor:
    return clamp(low, a, None, bound)


@rule("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def power(low: Lowering, a: Any, b: Any) -> Tensor:
    def formula(x: Expr, y: Expr) -> Expr:
        exponent = float(y.value) if isinstance(y, Const) else None
        if exponent in (2.0, 3.0, 4.0):
            square = op("mul", x, x)
            return square if exponent == 2 else op("mul", square, x if exponent == 3 else square)
        if exponent == 1.0:
            return x
        if is_float(x.dtype) and exponent in (0.5, -0.5, -1.0, -2.0):
            if exponent == 0.5:
                return op("sqrt", x)
            if exponent == -0.5:
                return op("rsqrt", x)
            return op("div", const(x, 1.0), x if exponent == -1 else op("mul", x, x))
        return op("pow", x, y)

    return pointwise(low, formula, (a, b))


@rule("gelu.default")
def gelu(low: Lowering, a: Any, approximate: str = "none") -> Tensor:
    return pointwise(low, _unary("gelu" if approximate == "none" else "gelu_tanh"), (a,))


@rule("leaky_relu.default")
def leaky_relu(low: Lowering, a: Any, slope: float = 0.01) -> Tensor:
    return pointwise(
        low, lambda x: op("where", Op("gt", (x, const(x, 0)), "bool"), x, op("mul", x, const(x, slope))), (a,)
    )


@rule("elu.default")
def elu(low: Lowering, a: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    def formula(x: Expr) -> Expr:
        negative = op("mul", op("expm1", op("mul", x, const(x, input_scale))), const(x, alpha * scale))
        return op("where", Op("gt", (x, const(x, 0)), "bool"), op("mul", x, const(x, scale)), negative)

    return pointwise(low, formula, (a,))


@rule("softplus.default")
def softplus(low: Lowering, a: Any, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    def formula(x: Expr) -> Expr:
        scaled = x if beta == 1 else op("mul", x, const(x, beta))
        soft = op("log1p", op("exp", scaled))
        soft = soft if beta == 1 else op("div", soft, const(x, beta))
        return op("where", Op("gt", (scaled, const(x, threshold)), "bool"), x, soft)

    return pointwise(low, formula, (a,))


@rule("_to_copy.default", "to.dtype", "convert_element_type.default")
def to_copy(low: Lowering, a: Any, *args: Any, **kwargs: Any) -> Tensor:
    shape, dtype = low.result()
    if a.dtype == dtype:
        return Tensor(a.shape, a.dtype, a.at)
    return low.compute(shape, dtype, lambda i: element(a, i))


@rule("addcmul.default")
def addcmul(low: Lowering, a: Any, b: Any, c: Any, value: float = 1) -> Tensor:
    return pointwise(
        low,
        lambda x, y, z: op(
            "add", x, op("mul", op("mul", y, z), const(x, value)) if value != 1 else op("mul", y, z)
        ),
        (a, b, c),
    )


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(low: Lowering, a: Any, mask: Any, value: Any) -> Tensor:
    return where(low, mask, value, a)


__all__ = ["compute_dtype", "pointwise", "value_of"]
