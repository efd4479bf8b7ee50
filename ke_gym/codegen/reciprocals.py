"""Divisions by what a loop does not change, as products with the reciprocal: where that is as exact, made so elsewhere.

The reciprocal of a subnormal number is infinite, and that of a very large one subnormal. Where it can't be told that a
divisor is neither, both operands are scaled by the power of two that makes it so, which rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ke_gym.codegen import one_pass
from ke_gym.codegen.expr import Const, Expr, Interned, Load, Op, Var, rebuilt, walk
from ke_gym.codegen.graph import Node
from ke_gym.codegen.ranges import Range, Ranges

LIMITS = {"f32": (2.0**-126, 2.0**126), "f64": (2.0**-1022, 2.0**1022)}
"""What is normal with a normal reciprocal."""
UP = {"f32": 2.0**24, "f64": 2.0**54}
"""Makes subnormal numbers normal."""
DOWN = 0.25
ANYTHING: Range = (0.0, math.inf)
_ROOTS = {"f32": (2.0**-75, 2.0**64), "f64": (2.0**-538, 2.0**512)}


def multiplied(expr: Expr, loops: frozenset[Var], known: Mapping[str, Range]) -> Expr:
    """``expr`` with divisions by what ``loops`` do not change as products with the reciprocal.

    ``known``: magnitudes of tensors (``magnitudes``).
    """

    def change(node: Expr) -> Expr:
        if not isinstance(node, Op) or node.name != "div" or node.dtype not in LIMITS:
            return node
        value, by = node.args
        if value is Const(1.0, node.dtype) or _moves(by, loops):
            return node
        return _product(value, by, known)

    return rebuilt(expr, change)


def _moves(expr: Expr, loops: frozenset[Var]) -> bool:
    return any(n in loops for n in walk(expr) if isinstance(n, Var))


def _product(value: Expr, by: Expr, known: Mapping[str, Range]) -> Expr:
    dtype = by.dtype
    low, high = LIMITS[dtype]
    least, most = magnitude(by, known)
    if least < low or most > high:
        size = Op("abs", (by,), dtype)
        small = Op("lt", (size, Const(low, dtype)), "bool")
        large = Op("gt", (size, Const(high, dtype)), "bool")
        one, up, down = Const(1.0, dtype), Const(UP[dtype], dtype), Const(DOWN, dtype)
        scale = Op("where", (small, up, Op("where", (large, down, one), dtype)), dtype)
        value, by = Op("mul", (value, scale), dtype), Op("mul", (by, scale), dtype)
    return Op("mul", (value, Op("div", (Const(1.0, dtype), by), dtype)), dtype)


def magnitude(expr: Expr, known: Mapping[str, Range]) -> Range:
    """What the absolute value is within, unless it is zero, infinite or NaN."""
    ranges, found = Ranges(), dict[Interned, Range]()
    for node in walk(expr):
        if isinstance(node, Load):
            found[node] = known.get(node.buffer, ANYTHING)
        elif isinstance(node, Const):
            size = abs(node.value)
            found[node] = (size, size) if 0 < size < math.inf else (1.0, 1.0)
        elif isinstance(node, Op):
            found[node] = _combined(node, [found.get(arg, ANYTHING) for arg in node.args], ranges)
    return found.get(expr, ANYTHING)


def _combined(expr: Op, parts: list[Range], ranges: Ranges) -> Range:
    if expr.name == "sqrt":
        return _ROOTS.get(expr.dtype, ANYTHING)
    if expr.name == "add" and all(ranges.of(arg)[0] >= 0 for arg in expr.args):
        return min(low for low, _ in parts), sum(high for _, high in parts)
    if expr.name in ("max", "min", "where", "abs", "neg"):
        chosen = parts[expr.name == "where" :]
        return min(low for low, _ in chosen), max(high for _, high in chosen)
    return ANYTHING


def magnitudes(nodes: Mapping[str, Node]) -> dict[str, Range]:
    """Of a nest's pointwise nodes, and of the sums of a softmax: the largest term of these is 1, if there is one."""
    pairs = (pair for pair in one_pass.find(nodes) if isinstance(pair, one_pass.Softmax))
    found = {pair.total: (1.0, float(math.prod(r.size for r in nodes[pair.total].rvars))) for pair in pairs}
    for name, node in nodes.items():
        if node.pointwise and (size := magnitude(node.expr, found)) != ANYTHING:
            found[name] = size
    return found
