"""What is known of values without knowing them: ranges, and tests that these decide.

A range ``(low, high)`` says that a value is NaN or within it. So a test of floats is only ever decided the way NaN
decides it: comparisons are false, ``ne`` is true. Only signs and constants are followed through arithmetic of floats,
which rounding cannot move past them.
"""

from __future__ import annotations

import math
from ctypes import c_float

from ke_gym.codegen.expr import (
    BYTES,
    Const,
    Expr,
    InRange,
    Op,
    Position,
    Rewriter,
    Search,
    bounds,
    is_float,
)

Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)
TESTS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))
_UNITS: dict[str, Range] = {
    "sigmoid": (0.0, 1.0), "exp": (0.0, math.inf), "exp2": (0.0, math.inf), "sqrt": (0.0, math.inf),
}  # fmt: skip


class Ranges:
    """Ranges of expressions."""

    def __init__(self) -> None:
        self.memo: dict[Expr, Range] = {}

    def of(self, expr: Expr) -> Range:
        """What ``expr`` is within, unless it is NaN."""
        if expr not in self.memo:
            low, high = self._of(expr)
            if not is_float(expr.dtype):
                least, most = whole(expr.dtype)
                low, high = (
                    (low, high) if least <= low and high <= most else (least, most)
                )  # it may wrap around
            self.memo[expr] = (low, high)
        return self.memo[expr]

    def _of(self, expr: Expr) -> Range:
        if isinstance(expr, Const):
            value = (
                c_float(expr.value).value if expr.dtype == "f32" else expr.value
            )  # kernels round it as well
            return ANY if isinstance(value, float) and math.isnan(value) else (value, value)
        if isinstance(expr, Position):
            return bounds(expr.index)
        if isinstance(expr, InRange):
            return (0, 1)
        if isinstance(expr, Search):
            return (0, expr.size)
        if not isinstance(expr, Op):
            return ANY
        ranges = [self.of(arg) for arg in expr.args]
        return self._floats(expr, ranges) if is_float(expr.dtype) else self._integers(expr, ranges)

    def _integers(self, expr: Op, ranges: list[Range]) -> Range:
        (a, b), *others = ranges
        c, d = others[0] if others else (0, 0)
        match expr.name:
            case "add":
                return a + c, b + d
            case "sub":
                return a - d, b - c
            case "mul":
                corners = [x * y for x in (a, b) for y in (c, d)]
                return min(corners), max(corners)
            case "cast" if not is_float(expr.args[0].dtype):
                return a, b
        return _either(expr, ranges)

    def _floats(self, expr: Op, ranges: list[Range]) -> Range:
        (a, b), *others = ranges
        c, _ = others[0] if others else ANY
        if expr.name in _UNITS:
            return _UNITS[expr.name]
        same = len(expr.args) == 2 and expr.args[0] is expr.args[1]
        match expr.name:
            case "add" if a >= 0 and c >= 0:
                return max(a, c), math.inf
            case "mul" if same or (a >= 0 and c >= 0):
                return 0.0, math.inf
            case "cast":  # rounding moves no value past zero
                return (0.0 if a >= 0 else -math.inf), (0.0 if b <= 0 else math.inf)
        return _either(expr, ranges)


def _either(expr: Op, ranges: list[Range]) -> Range:
    """Of what chooses one of its arguments."""
    match expr.name:
        case "max":
            return max(low for low, _ in ranges), max(high for _, high in ranges)
        case "min":
            return min(low for low, _ in ranges), min(high for _, high in ranges)
        case "where":
            return min(low for low, _ in ranges[1:]), max(high for _, high in ranges[1:])
        case "abs" if ranges[0][0] >= 0:
            return ranges[0]
        case "abs" if is_float(expr.dtype):
            return 0.0, math.inf
    return ANY


def whole(dtype: str) -> Range:
    """All values of an integer dtype."""
    if dtype == "bool":
        return 0, 1
    bits = 8 * BYTES[dtype]
    return (0, 2**bits - 1) if dtype == "u8" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class Folded(Rewriter):
    """Rebuilds expressions without tests that always go the same way."""

    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self.ranges = ranges

    def _expr(self, expr: Expr) -> Expr:
        if isinstance(expr, Op) and expr.name in TESTS:
            found = self._decided(expr.name, *(self.expr(arg) for arg in expr.args))
            if found is not None:
                return Const(found, "bool")
        return super()._expr(expr)

    def _decided(self, test: str, left: Expr, right: Expr) -> bool | None:
        (a, b), (c, d) = self.ranges.of(left), self.ranges.of(right)
        apart = a > d or b < c
        never = {"lt": a >= d, "le": a > d, "gt": b <= c, "ge": b < c, "eq": apart, "ne": False}
        if never[test]:
            return False
        if test == "ne" and apart:
            return True
        always = {"lt": b < c, "le": b <= c, "gt": a > d, "ge": a >= d}  # unless one of them is NaN
        numbers = not is_float(left.dtype) and not is_float(right.dtype)
        return True if numbers and always.get(test, False) else None


def folded(expr: Expr) -> Expr:
    """``expr`` without tests whose outcome its ranges tell, in its indices too."""
    return Folded(Ranges()).expr(expr)
