"""Statistics of a row that come out of one pass over it, where a graph takes a pass for each.

A variance is lowered as a mean and then a sum of squared distances from it, a softmax as a maximum and then a sum of
exponentials: the second reduction waits for the first. In a nest whose schedule says ``one_pass``

* a variance is made from the sums of ``x - s`` and ``(x - s)**2``, where ``s`` is the row's first element (Chan,
  Golub, LeVeque, "Algorithms for computing the sample variance", 1983). Both are fp64: the variance of a row of
  ``n`` elements is at least ``(mean - s)**2 / n``, so that what cancels costs a factor of ``n`` at worst, which fp64
  has to spare and fp32 has not.
* exponentials are summed relative to the largest element so far, and rescaled when a larger one comes (Milakov,
  Gimelshein, "Online normalizer calculation for softmax", 2018).

Only how the reductions are computed changes: what reads them gets the same values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ke_gym.codegen.expr import Const, Expr, Index, Load, Op, Rewriter, Var, cast, constant, of
from ke_gym.codegen.graph import Node

SUM_EXP = "sum_exp"  # the reduction of an online sum of exponentials: of its items, relative to their maximum


@dataclass(frozen=True)
class Variance:
    """The names of a sum, and of the sum of squared distances from the mean it gives."""

    total: str
    squares: str


@dataclass(frozen=True)
class Softmax:
    """The names of a maximum, and of the sum of ``exp(x - maximum)``.

    guarded: an infinite maximum is not subtracted (logsumexp), rather than giving NaN.
    """

    top: str
    total: str
    guarded: bool


def find(nodes: Mapping[str, Node]) -> list[Variance | Softmax]:
    """The pairs of reductions among a nest's nodes, in topological order, that one pass can give."""
    whole: dict[str, Expr] = {}
    for name, node in nodes.items():
        whole[name] = Rewriter(load=lambda load: _inlined(load, nodes, whole)).expr(node.expr)
    found: dict[str, Variance | Softmax] = {}
    for node in nodes.values():
        if node.reduction == "sum" and node.scan is None:
            pair = _variance(node, nodes, whole) or _softmax(node, nodes, whole)
            if pair is not None:
                found.setdefault(pair.top if isinstance(pair, Softmax) else pair.total, pair)
    return list(found.values())


def late(nodes: Mapping[str, Node], pairs: Iterable[Variance | Softmax]) -> set[str]:
    """The pointwise nodes that need an online maximum: kept in a buffer, they would take a pass of their own."""
    found = {pair.top for pair in pairs if isinstance(pair, Softmax)}
    for name, node in nodes.items():
        if node.pointwise and not found.isdisjoint(node.reads):
            found.add(name)
    return found


def _inlined(load: Load, nodes: Mapping[str, Node], whole: Mapping[str, Expr]) -> Expr:
    node = nodes.get(load.buffer)
    if node is None or not node.pointwise:
        return load
    return Rewriter(dict(zip(node.vars, load.index))).expr(whole[load.buffer])


def _first(load: Expr, second: Node, op: str, nodes: Mapping[str, Node]) -> Node | None:
    """The ``op`` over the same loops as ``second`` whose own result for them ``load`` is."""
    first = nodes.get(load.buffer) if isinstance(load, Load) else None
    if first is None or first.reduction != op or first.scan is not None:
        return None
    own = tuple(of(v) if v.size != 1 else constant(0) for v in second.vars)
    same = first.vars == second.vars and first.rvars == second.rvars
    return first if same and isinstance(load, Load) and load.index == own else None


def _variance(node: Node, nodes: Mapping[str, Node], whole: Mapping[str, Expr]) -> Variance | None:
    square = whole[node.name]
    if not (isinstance(square, Op) and square.name == "mul" and square.args[0] is square.args[1]):
        return None
    centred = square.args[0]
    if not (isinstance(centred, Op) and centred.name == "sub" and centred.dtype == "f32"):
        return None
    value, mean = centred.args
    if not (isinstance(mean, Op) and mean.name in ("mul", "div") and isinstance(mean.args[1], Const)):
        return None
    scale = mean.args[1].value if mean.name == "mul" else 1 / (mean.args[1].value or math.inf)
    first = _first(mean.args[0], node, "sum", nodes)
    if first is None or abs(scale * _count(node) - 1) > 1e-12 or whole[first.name] is not value:
        return None
    return Variance(first.name, node.name)


def _softmax(node: Node, nodes: Mapping[str, Node], whole: Mapping[str, Expr]) -> Softmax | None:
    power = whole[node.name]
    shifted = power.args[0] if isinstance(power, Op) and power.name == "exp" else None
    if not (isinstance(shifted, Op) and shifted.name == "sub"):
        return None
    value, top = shifted.args
    guarded = isinstance(top, Op)
    if isinstance(top, Op) and top.name == "where":
        plain = top.args[2]
        if top is not _guarded(plain):
            return None
        top = plain
    first = _first(top, node, "max", nodes)
    if first is None or whole[first.name] is not value:
        return None
    return Softmax(first.name, node.name, guarded)


def _guarded(top: Expr) -> Expr:
    """``top``, or nothing where it is infinite."""
    return Op("where", (_infinite(top), Const(0.0, top.dtype), top), top.dtype)


def _infinite(value: Expr) -> Expr:
    return Op("eq", (Op("abs", (value,), value.dtype), Const(math.inf, value.dtype)), "bool")


def _count(node: Node) -> int:
    return math.prod(r.size for r in node.rvars)


# ------------------------------------------------------------------------------------------- variances


def distance(first: Node, value: Expr) -> Expr:
    """How far ``value``, an element of the row that ``first`` sums, is from the row's first one, in fp64."""
    start = Rewriter({r: constant(0) for r in first.rvars}).expr(value)
    return Op("sub", (cast(value, "f64"), _start(start)), "f64")


def _start(element: Expr) -> Expr:
    """What is subtracted from a row: its first element, unless that would turn a whole row into NaN."""
    small = Op("lt", (Op("abs", (element,), element.dtype), Const(math.inf, element.dtype)), "bool")
    return cast(Op("where", (small, element, Const(0.0, element.dtype)), element.dtype), "f64")


def restored(pair: Variance, load: Load, node: Node, value: Expr) -> Expr:
    """What ``load`` of one of the pair's reductions meant, from the shifted sums of ``value``, in fp32."""
    total = Load(pair.total, load.index, "f64")
    n = _count(node)
    if load.buffer == pair.total:
        place: dict[Var, Index] = dict(zip(node.vars, load.index))
        place.update({r: constant(0) for r in node.rvars})
        start = _start(Rewriter(place).expr(value))
        whole: Expr = Op("add", (Op("mul", (start, Const(float(n), "f64")), "f64"), total), "f64")
    else:
        around = Op("mul", (Op("mul", (total, total), "f64"), Const(1.0 / n, "f64")), "f64")
        squares = Op("sub", (Load(pair.squares, load.index, "f64"), around), "f64")
        whole = Op("max", (squares, Const(0.0, "f64")), "f64")
    return cast(whole, load.dtype)


# ---------------------------------------------------------------------------------------- exponentials


def settled(pair: Softmax, load: Load) -> Expr:
    """What ``load`` of the pair's sum meant: NaN where the row's maximum is infinite, unless that is guarded."""
    if pair.guarded:
        return load
    infinite = _infinite(Load(pair.top, load.index, load.dtype))
    return Op("where", (infinite, Const(math.nan, load.dtype), load), load.dtype)
