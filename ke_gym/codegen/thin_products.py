"""A thin product that is added to another one (the second half of a low-rank adapter), in the other one's kernel.

``x @ w + c * (y @ u)`` where ``y`` has few columns: one more step of the sums that the kernel of ``x @ w`` takes anyway,
instead of the whole result written, read and written again. What is added is the same; only its order changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Const, Expr, Index, Load, Op, constant, of, rebuilt, walk
from ke_gym.codegen.graph import Extern, Graph, View
from ke_gym.codegen.operands import Shape, variables
from ke_gym.codegen.products import Builder as Whole
from ke_gym.codegen.products import Store, turned
from ke_gym.codegen.schedule import Group

DEPTH = 64  # most that is summed over in a thin product
PLAIN = "aten.mm.default"


@dataclass(frozen=True)
class Thin:
    """``scale`` times the product of ``operands``, of ``shape``, is added to each tile."""

    shape: Shape
    operands: tuple[Expr, Expr]
    scale: float


def apart(graph: Graph, calls: Sequence[Extern]) -> tuple[Extern, Extern] | None:
    """A product and a thin one of the same size, neither made of the other; None if the two calls are none."""
    if len(calls) != 2 or any(call.target != PLAIN or call.kwargs for call in calls):
        return None
    thin, main = sorted(calls, key=_depth)
    same = thin.outputs[0].shape == main.outputs[0].shape and thin.outputs[0].dtype == main.outputs[0].dtype
    if not same or _depth(thin) > DEPTH or _depth(main) < 4 * _depth(thin):
        return None
    return None if _made_of(graph, main, thin) or _made_of(graph, thin, main) else (main, thin)


def _depth(call: Extern) -> int:
    """What a matrix product sums over."""
    return int(call.args[0].shape[-1])


def _made_of(graph: Graph, call: Extern, other: Extern) -> bool:
    """Whether ``other`` has to come before ``call``."""
    pending, seen = list(call.reads), set[str]()
    while pending:
        maker = graph.producer.get(pending.pop())
        if maker == other.name:
            return True
        if maker is not None and maker not in seen:
            seen.add(maker)
            pending.extend(graph.steps[maker].reads)
    return False


class Builder(Whole):
    """Builds the ``Product`` of a group with a thin product in it; raises ``Illegal`` unless it is simply added."""

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        super().__init__(graph, group, visible)
        calls = [s for n in group.nodes if isinstance(s := graph.steps[n], Extern)]
        found = apart(graph, calls)
        if found is None:
            raise Illegal("one contraction a kernel")
        self.step, self.other = found
        self.product = self.step.outputs[0]
        added = self.other.outputs[0].name
        self.made = {self.product.name: self.acc, added: Load(added, (), "f32")}
        if {self.step.name, self.other.name, *self.made} & visible:
            raise Illegal("a product is needed elsewhere")

    def _beside(self, shape: Shape, stores: list[Store], turn: bool) -> tuple[list[Store], Thin | None]:
        added = self.made[self.other.outputs[0].name]
        found = [_without(store.expr, self.acc, added) for store in stores]
        (scale,) = scales if len(scales := {by for _, by in found}) == 1 else (math.nan,)
        exact = math.frexp(scale)[0] in (0.5, -0.5)
        if not math.isfinite(scale) or scale == 0 or (shape.dtype != "f32" and not exact):
            raise Illegal("the thin product is not simply added")
        rows, columns = self.product.shape
        size = Shape(1, rows, columns, _depth(self.other), shape.dtype)
        _, m, n, k = (of(v) if v.size != 1 else constant(0) for v in variables(size))
        a, b = self.other.args[:2]
        operands = self._held(a, (m, k)), self._held(b, (k, n))
        if turn:
            size, operands, *_ = turned(size, operands, (), self.acc)
        kept = [replace(store, expr=expr) for store, (expr, _) in zip(stores, found)]
        return kept, Thin(size, operands, scale)

    def _held(self, view: View, index: tuple[Index, ...]) -> Expr:
        """The element of an operand that is in memory."""
        if view.buffer in self.nodes:
            raise Illegal("a thin product's operand is computed where it is read")
        return self._element(view, index)


def _without(expr: Expr, acc: Expr, added: Expr) -> tuple[Expr, float]:
    """``expr`` of ``acc + scale * added`` as one of ``acc``, and the scale; raises ``Illegal`` if it is none."""
    for total in walk(expr):
        terms = list(_terms(total)) if isinstance(total, Op) else []
        if not isinstance(total, Op) or acc not in terms:
            continue
        scales = {term: by for term in terms if (by := _scale(term, added)) is not None}
        if len(scales) != 1 or terms.count(acc) != 1:
            continue
        ((term, scale),) = scales.items()
        if terms.count(term) != 1:
            continue
        mark = Load(added.fields[0], (constant(0),), expr.dtype)
        around = _exchanged(expr, total, mark)
        if not any(node is acc or node is added for node in walk(around)):
            return _exchanged(around, mark, _less(total, term)), scale
    raise Illegal("the thin product is not simply added")


def _terms(expr: Expr) -> Iterator[Expr]:
    """What is added up."""
    if isinstance(expr, Op) and expr.name == "add":
        for arg in expr.args:
            yield from _terms(arg)
    else:
        yield expr


def _scale(term: Expr, added: Expr) -> float | None:
    """By what ``added`` is multiplied in the term; None if it is another."""
    if term is added:
        return 1.0
    if isinstance(term, Op) and term.name == "mul" and added in term.args:
        others = [arg for arg in term.args if isinstance(arg, Const)]
        return float(others[0].value) if others else None
    return None


def _less(total: Expr, term: Expr) -> Expr:
    """The sum without one of its terms."""
    if isinstance(total, Op) and total.name == "add":
        left, right = total.args
        if term in (left, right):
            return right if term is left else left
        if term in _terms(left):
            return Op("add", (_less(left, term), right), total.dtype)
        return Op("add", (left, _less(right, term)), total.dtype)
    return total


def _exchanged(expr: Expr, old: Expr, new: Expr) -> Expr:
    """``expr`` with ``new`` wherever ``old`` is."""
    return rebuilt(expr, lambda node: new if node is old else node)
