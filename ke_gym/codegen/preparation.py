"""What of a schedule depends on weights alone, so that a module may declare it a preparation, done once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ke_gym.codegen.fusion import cached_nest, legal, order_steps, visible_in
from ke_gym.codegen.graph import Extern, Graph
from ke_gym.codegen.product_blocks import SKINNY
from ke_gym.codegen.products import Product
from ke_gym.codegen.schedule import Group, Plan, Schedule
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


def prepared(graphs: Sequence[Graph], schedule: Schedule) -> Schedule | None:
    """``schedule`` with weights copied into what is multiplied (TF32 parts, bf16), in a preparation.

    None if there is nothing to prepare. Several shape sets have weights of their own each: nothing is prepared then.
    """
    if len(graphs) > 1 or graphs[0].device != "cuda":
        return None
    (graph,), (plan,) = graphs, schedule.plans
    groups = list(plan.groups)
    for product in products_of(graph, plan):
        if (
            product.weighed and min(product.shape.m, product.shape.n) > SKINNY
        ):  # otherwise it waits for memory
            at = groups.index(product.group)
            groups[at] = replace(product.group, launch=(*product.group.launch, ("ready", True)))
    plan = Plan(tuple(groups))
    if not legal(graph, plan) or not preparable(graph, plan):
        return None
    return replace(schedule, plans=(plan,), prepared=True)


def preparable(graph: Graph, plan: Plan) -> bool:
    """Whether a legal plan has anything to prepare: a step of its own, or a product's copy of weights."""
    found, ready = standing(graph, plan)
    return bool(found) or any(product.standing(ready) for product in products_of(graph, plan))


def products_of(graph: Graph, plan: Plan) -> list[Product]:
    """The plan's kernels for products of a GPU."""
    listed = [g.nodes for g in plan.groups]
    nests = [cached_nest(graph, g, visible_in(graph, g.nodes, listed)) for g in plan.groups]
    return [nest for nest in nests if isinstance(nest, Product)]
