"""What makes a stage's inner loops cheaper: pieces without index tests."""

from __future__ import annotations

from dataclasses import replace

from ke_gym.codegen.expr import InRange, Rewriter, Var, bounds, of, walk
from ke_gym.codegen.nest import Loop, Stage

MAX_PIECES = 27


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
