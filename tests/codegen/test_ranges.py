"""Tests that ranges decide, and reciprocals that are made exact: against what the same expression gives by evaluation."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ke_gym.codegen.expr import Const, Expr, Indirect, Load, Op, Position, Var, constant, of, walk
from ke_gym.codegen.ranges import TESTS, Ranges, folded
from ke_gym.codegen.reciprocals import multiplied

ROW, COL = Var("row", 7), Var("col", 5)
FUNCTIONS: dict[str, Any] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "max": torch.maximum, "min": torch.minimum,
    "abs": torch.abs, "sqrt": torch.sqrt, "exp": torch.exp, "sigmoid": torch.sigmoid, "div": operator.truediv,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "where": torch.where,
}  # fmt: skip
KINDS = {
    "f32": torch.float32,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "bool": torch.bool,
}
SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, -3e38, 0.5)


def evaluated(expr: Expr, values: dict[str, Any]) -> torch.Tensor:
    """The expression's value; tensors and variables by name."""
    kind = KINDS[expr.dtype]
    if isinstance(expr, Const):
        return torch.tensor(expr.value, dtype=kind)
    if isinstance(expr, Load):
        return torch.tensor(values[expr.buffer], dtype=kind)
    if isinstance(expr, Position):
        total = expr.index.const + sum(values[atom.name] * by for atom, by in expr.index.terms)
        return torch.tensor(total, dtype=kind)
    assert isinstance(expr, Op)
    args = [evaluated(arg, values) for arg in expr.args]
    return args[0].to(kind) if expr.name == "cast" else FUNCTIONS[expr.name](*args)


def expressions(dtype: str) -> st.SearchStrategy[Expr]:
    numbers: Any = st.sampled_from(SPECIAL) if dtype == "f32" else st.integers(-4, 4)
    leaves: Any = st.one_of(
        numbers.map(lambda v: Const(v, dtype)),
        st.sampled_from(("x", "y")).map(lambda name: Load(f"{name}_{dtype}", (constant(0),), dtype)),
        *(
            []
            if dtype == "f32"
            else [st.integers(-9, 9).map(lambda c: Position(of(ROW) * 3 - of(COL) + c, dtype))]
        ),
    )
    ones = ("sqrt", "exp", "sigmoid", "abs") if dtype == "f32" else ("abs",)

    def grown(inner: Any) -> Any:
        pairs = st.tuples(inner, inner)
        test = st.tuples(st.sampled_from(sorted(TESTS)), pairs).map(lambda t: Op(t[0], t[1], "bool"))
        return st.one_of(
            st.tuples(st.sampled_from(("add", "sub", "mul", "max", "min")), pairs).map(
                lambda t: Op(t[0], t[1], dtype)
            ),
            st.tuples(st.sampled_from(ones), inner).map(lambda t: Op(t[0], (t[1],), dtype)),
            inner.map(lambda e: Op("mul", (e, e), dtype)),
            st.tuples(test, inner, inner).map(lambda t: Op("where", t, dtype)),
        )

    return st.recursive(leaves, grown, max_leaves=8)


FLOATS = st.sampled_from(SPECIAL)
INTEGERS = st.integers(-(2**31), 2**31 - 1)


@given(st.sampled_from(sorted(TESTS)), expressions("f32"), expressions("f32"), FLOATS, FLOATS)
def test_tests_of_floats_are_decided_as_evaluation_does(
    test: str, a: Expr, b: Expr, x: float, y: float
) -> None:
    whole = Op(test, (a, b), "bool")
    values = {"x_f32": x, "y_f32": y}
    assert evaluated(whole, values) == evaluated(folded(whole), values)
    value = float(evaluated(a, values))
    low, high = Ranges().of(a)
    assert math.isnan(value) or low <= value <= high


@pytest.mark.parametrize("dtype", ["i32", "i64"])
@given(st.data())
def test_tests_of_integers_are_decided_as_evaluation_does(dtype: str, data: st.DataObject) -> None:
    test = data.draw(st.sampled_from(sorted(TESTS)))
    whole = Op(test, (data.draw(expressions(dtype)), data.draw(expressions(dtype))), "bool")
    values: dict[str, Any] = {f"{name}_{dtype}": data.draw(INTEGERS) for name in "xy"}
    values |= {"row": data.draw(st.integers(0, 6)), "col": data.draw(st.integers(0, 4))}
    assert evaluated(whole, values) == evaluated(folded(whole), values)


def test_an_index_that_is_clamped_is_not_turned_around() -> None:
    given_ = Load("offsets", (of(ROW),), "i64")
    clamped = Op("max", (given_, Const(0, "i64")), "i64")
    negative = Op("lt", (clamped, Const(0, "i64")), "bool")
    turned = Op("where", (negative, Op("add", (clamped, Const(9, "i64")), "i64"), clamped), "i64")
    load = Load("ids", (of(Indirect(turned, 9)),), "f32")
    assert folded(load) is Load("ids", (of(Indirect(clamped, 9)),), "f32")
    relu = Op("max", (Load("x", (of(ROW),), "f32"), Const(0.0, "f32")), "f32")
    assert folded(Op("lt", (relu, Const(0.0, "f32")), "bool")) is Const(False, "bool")
    assert folded(Op("ge", (relu, Const(0.0, "f32")), "bool")) is not Const(True, "bool"), "NaN is not"


@pytest.mark.parametrize(
    "a, b",
    [(1e-50, 0.0), (0.1 + 1e-12, 0.1), (1e-40, 1.00000001e-40)],
    ids=["vanishes", "normal", "subnormal"],
)
def test_numbers_are_what_fp32_makes_of_them(a: float, b: float) -> None:
    x = Load("x_f32", (constant(0),), "f32")
    for test in sorted(TESTS):
        whole = Op(test, (Op("max", (x, Const(a, "f32")), "f32"), Const(b, "f32")), "bool")
        assert evaluated(whole, {"x_f32": -1.0}) == evaluated(folded(whole), {"x_f32": -1.0})


SIZES = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(SIZES, SIZES)
def test_reciprocals_are_as_exact_as_divisions(x: float, s: float) -> None:
    """Within two units in the last place of a normal quotient, and the same where that is infinite or NaN."""
    by = Load("s", (constant(0),), "f32")
    made = multiplied(Op("div", (Load("x", (of(COL),), "f32"), by), "f32"), frozenset({COL}), {})
    with np.errstate(all="ignore"):
        wanted = np.float32(x) / np.float32(s)
    got = float(evaluated(made, {"x": x, "s": s}))
    if abs(wanted) > 2.0**125:  # the last step may overflow a little earlier or later
        assert abs(got) > 2.0**124
    elif math.isnan(wanted):
        assert math.isnan(got)
    else:
        assert abs(got - wanted) <= max(2.0**-22 * abs(wanted), 2.0**-146)


@pytest.mark.parametrize(
    "by",
    [
        Op("sqrt", (Load("s", (), "f32"),), "f32"),
        Op("max", (Op("sqrt", (Load("s", (), "f32"),), "f32"), Const(1e-12, "f32")), "f32"),
        Op("add", (Op("sqrt", (Load("s", (), "f32"),), "f32"), Const(1e-6, "f32")), "f32"),
        Load("total", (), "f32"),
    ],
    ids=["sqrt", "clamped", "with epsilon", "a softmax's sum"],
)
def test_divisors_that_are_known_to_be_normal_are_not_scaled(by: Expr) -> None:
    x = Load("x", (of(COL),), "f32")
    made = multiplied(Op("div", (x, by), "f32"), frozenset({COL}), {"total": (1.0, 4096.0)})
    assert made is Op("mul", (x, Op("div", (Const(1.0, "f32"), by), "f32")), "f32")
    other = multiplied(Op("div", (x, Load("any", (), "f32")), "f32"), frozenset({COL}), {})
    assert any(isinstance(n, Op) and n.name == "where" for n in walk(other))
