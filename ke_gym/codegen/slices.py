"""Concatenations without kernels of their own: a node that chooses by position, cut where the choice changes.

What computes a piece may then store it into its slice, and no row of the piece has to be that of another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Expr, InRange, Rewriter, Var, constant, of, walk
from ke_gym.codegen.graph import Node, contiguous_stride

MAX_SLICES = 16


@dataclass(frozen=True)
class Slice:
    """``node`` computes a part of ``whole``, from its element ``start`` on."""

    node: Node
    whole: Node
    start: int = 0


def slices(whole: Node, value: Expr) -> list[Slice]:
    """The slices of a pointwise node that computes ``value``: a single one if no test is of one of its loops alone."""
    found = list(islice(_cut(Slice(replace(whole, expr=value), whole)), MAX_SLICES + 1))
    if len(found) > MAX_SLICES:
        raise Illegal("too many slices")
    return [
        replace(part, node=replace(part.node, name=f"{whole.name}_slice{k}")) for k, part in enumerate(found)
    ]


def _cut(part: Slice) -> Iterator[Slice]:
    node = part.node
    for test in walk(node.expr):  # a condition comes before what it chooses between
        if not isinstance(test, InRange) or len(test.index.terms) != 1:
            continue
        ((var, step),) = test.index.terms
        if step != 1 or not isinstance(var, Var) or var not in node.vars:
            continue
        at, offset = node.vars.index(var), test.index.const
        stride = contiguous_stride(part.whole.shape)[at]
        edges = {0, max(0, test.low - offset), min(test.high - offset, var.size), var.size}
        for first, last in pairwise(sorted(edges)):
            own = Var(var.name, last - first)
            narrow = replace(
                node,
                shape=(*node.shape[:at], own.size, *node.shape[at + 1 :]),
                vars=(*node.vars[:at], own, *node.vars[at + 1 :]),
                expr=Rewriter({var: of(own) + first if own.size != 1 else constant(first)}).expr(node.expr),
            )
            yield from _cut(replace(part, node=narrow, start=part.start + first * stride))
        return
    yield part
