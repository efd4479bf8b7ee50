"""What makes a stage's inner loops cheaper: pieces without index tests, products instead of divisions."""

from __future__ import annotations

from dataclasses import replace

from ke_gym.codegen.expr import Const, Expr, InRange, Op, Rewriter, Var, bounds, of, walk
from ke_gym.codegen.nest import Loop, Stage

MAX_PIECES = 27


def multiplied(expr: Expr, loops: frozenset[Var]) -> Expr:
    """``expr`` with divisions by what ``loops`` do not change as products with the reciprocal."""
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in memo:
            if isinstance(node, Op):
                args = tuple(visit(a) for a in node.args)
                one = Const(1.0, node.dtype)
                divides = node.name == "div" and node.dtype in ("f32", "f64") and args[0] is not one
                if divides and not _moves(args[1], loops):
                    inverse = Op("div", (one, args[1]), node.dtype)
                    memo[node] = Op("mul", (args[0], inverse), node.dtype)
                else:
                    memo[node] = Op(node.name, args, node.dtype)
            else:
                memo[node] = node
        return memo[node]

    return visit(expr)


def _moves(expr: Expr, loops: frozenset[Var]) -> bool:
    return any(n in loops for n in walk(expr) if isinstance(n, Var))


def peeled(stage: Stage) -> list[Stage]:
    """``stage`` cut along its output loops into pieces inside of which index tests are decided."""
    pieces = [stage]
    for position in range(len(stage.loops)):
        cut = [part for piece in pieces for part in _cut(piece, position)]
        if len(cut) <= MAX_PIECES:
            pieces = cut
    return pieces


def _cut(stage: Stage, position: int) -> list[Stage]:
    loop = stage.loops[position]
    var = loop.var
    if loop.limit is not None or any(var in i.reduced or var is i.scan for i in stage.items):
        return [stage]
    edges = {0, var.size}
    for item in stage.items:
        for test in walk(item.expr):
            if isinstance(test, InRange) and (step := test.index.coefficient(var)):
                rest = test.index - of(var) * step
                if any(not isinstance(a, Var) for a, _ in test.index.terms):
                    continue
                low, high = bounds(rest)
                for limit in (test.low - low, test.low - high, test.high - low, test.high - high):
                    edge = -(-limit // step)
                    if 0 < edge < var.size:
                        edges.add(edge)
    ordered = sorted(edges)
    if len(ordered) == 2:
        return [stage]
    parts = []
    for first, last in zip(ordered, ordered[1:]):
        piece = Var(var.name, last - first)
        change = Rewriter({var: of(piece) + first})
        items = tuple(
            replace(
                item,
                expr=change.expr(item.expr),
                target=replace(item.target, index=change.index(item.target.index)),
            )
            for item in stage.items
        )
        loops = (*stage.loops[:position], Loop(piece), *stage.loops[position + 1 :])
        parts.append(Stage(loops, items))
    return parts
