"""What of a score is masked by where its key lies: causal masks, however they are written."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ke_gym.codegen.expr import Const, Expr, Index, InRange, Op, Position, bounds, constant

_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
_DUAL = {"or": "and", "and": "or"}
_SAME = {"bitor": "or", "bitand": "and"}  # of truth values


def limits(score: Expr, row: Index, key: Index) -> Iterator[tuple[int, Expr]]:
    """Every ``k`` such that a test in ``score`` makes it -inf wherever ``key >= row + k``, and only there; with what is
    left of ``score`` without that test."""
    if not isinstance(score, Op) or score.name != "where":
        return
    test, *branches = score.args
    hidden = [isinstance(branch, Const) and branch.value == -math.inf for branch in branches]
    if not any(hidden):
        return
    how = "or" if hidden[0] else "and"
    parts = list(_parts(test, how))
    for part in parts:
        least = _least(part if hidden[0] else _opposite(part))
        if least is not None and not (distance := least - row + key).terms:
            left = [other for other in parts if other is not part]
            rest = branches[1] if hidden[0] else branches[0]
            if left:
                kept = left[0]
                for other in left[1:]:
                    kept = Op(how, (kept, other), "bool")
                rest = Op("where", (kept, *branches), score.dtype)
            yield distance.const, rest


def _parts(test: Expr, name: str) -> Iterator[Expr]:
    """What ``test`` joins by ``name``, "or" or "and"; of what is joined the other way and negated, the opposites."""
    test = _plain(test)
    inner = _plain(test.args[0]) if isinstance(test, Op) and test.name == "not" else None
    if isinstance(test, Op) and test.name == name:
        for part in test.args:
            yield from _parts(part, name)
    elif isinstance(inner, Op) and inner.name == _DUAL[name]:
        for part in inner.args:
            yield from _parts(_opposite(part), name)
    else:
        yield test


def _opposite(test: Expr) -> Expr:
    """``not test``; of comparisons the other one, which is for integers alone (of NaN neither holds)."""
    if isinstance(test, Op) and test.name == "not":
        return test.args[0]
    if isinstance(test, Op) and test.name in _OPPOSITE and all(_index(arg) is not None for arg in test.args):
        return Op(_OPPOSITE[test.name], test.args, "bool")
    return Op("not", (test,), "bool")


def _plain(test: Expr) -> Expr:
    """The same test, ranges and comparisons with what a test chose (``tril(ones) == 0``) written out."""
    if isinstance(test, InRange):
        place, (low, high) = Position(test.index, "i64"), bounds(test.index)
        below = Op("lt", (place, Const(test.high, "i64")), "bool")
        above = Op("ge", (place, Const(test.low, "i64")), "bool")
        if low >= test.low:
            return below
        return above if high < test.high else Op("and", (below, above), "bool")
    if not isinstance(test, Op):
        return test
    if test.name in _SAME and all(arg.dtype == "bool" for arg in test.args):
        return Op(_SAME[test.name], test.args, "bool")
    if test.name in ("eq", "ne"):
        choice, number = test.args
        if isinstance(choice, Op) and choice.name == "where" and isinstance(number, Const):
            chosen, *values = choice.args
            if all(isinstance(value, Const) for value in values):
                one, other = ((value == number) == (test.name == "eq") for value in values)
                if one != other:
                    return _plain(chosen) if one else _plain(_opposite(_plain(chosen)))
    return test


def _least(test: Expr) -> Index | None:
    """The index that ``test`` holds for as soon as it is 0 or less, and only then: ``a >= b`` gives ``b - a``."""
    if not isinstance(test, Op):
        return None
    if test.name == "not":
        other = _opposite(_plain(test.args[0]))
        return _least(other) if other != test else None
    if test.name not in _OPPOSITE:
        return None
    a, b = (_index(x) for x in test.args)
    if a is None or b is None:
        return None
    if test.name in ("lt", "le"):
        a, b = b, a
    return b - a + (1 if test.name in ("lt", "gt") else 0)


def _index(expr: Expr) -> Index | None:
    """An integer expression that is linear in loop variables, as an index."""
    if isinstance(expr, Const) and isinstance(expr.value, int):
        return constant(expr.value)
    if isinstance(expr, Position):
        return expr.index
    if isinstance(expr, Op) and expr.name == "cast" and expr.dtype in ("i64", "i32"):
        return _fitting(_index(expr.args[0]), expr.dtype)
    if isinstance(expr, Op) and expr.name in ("add", "sub"):
        a, b = (_index(x) for x in expr.args)
        if a is not None and b is not None:
            return _fitting(a + b if expr.name == "add" else a - b, expr.dtype)
    return None


def _fitting(index: Index | None, dtype: str) -> Index | None:
    """The index, unless an integer of this type does not hold all of it."""
    if index is None or dtype == "i64":
        return index
    low, high = bounds(index)
    return index if dtype == "i32" and low >= -(2**31) and high < 2**31 else None
