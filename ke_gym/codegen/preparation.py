"""What of a schedule depends on weights alone, so that a module may declare it a preparation, done once."""

from __future__ import annotations

from typing import Any

from ke_gym.codegen.fusion import cached_nest, order_steps, visible_in
from ke_gym.codegen.graph import Extern, Graph
from ke_gym.codegen.products import Product
from ke_gym.codegen.schedule import Group, Plan
from ke_gym.languages.allow import draws


def standing(graph: Graph, plan: Plan) -> tuple[list[Group | Extern], frozenset[str]]:
    """The groups and library calls that need nothing but weights, in order, and all tensors that stand then.

    What makes an output is none of them: every call makes its outputs.
    """
    listed = [g.nodes for g in plan.groups]
    ready, found = set(graph.weights), []
    for unit in order_steps(graph, plan):
        if isinstance(unit, Extern):
            reads, makes = set(unit.reads), {buffer.name for buffer in unit.outputs}
            if draws(unit.target):
                continue
        else:
            nest: Any = cached_nest(graph, unit, visible_in(graph, unit.nodes, listed))
            reads, makes = {b.name for b in nest.reads}, {b.name for b in nest.writes}
        if reads and reads <= ready and not makes & set(graph.outputs):
            ready |= makes
            found.append(unit)
    return found, frozenset(ready)


def preparable(graph: Graph, plan: Plan) -> bool:
    """Whether a legal plan has anything to prepare: a step of its own, or a product's copy of weights."""
    found, ready = standing(graph, plan)
    return bool(found) or any(product.standing(ready) for product in products_of(graph, plan))


def products_of(graph: Graph, plan: Plan) -> list[Product]:
    """The plan's kernels for products of a GPU."""
    listed = [g.nodes for g in plan.groups]
    nests = [cached_nest(graph, g, visible_in(graph, g.nodes, listed)) for g in plan.groups]
    return [nest for nest in nests if isinstance(nest, Product)]
