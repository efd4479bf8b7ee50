"""Convolutions with the channels innermost: which, and that those that follow each other need no copy between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ke_gym.codegen import fusion, products
from ke_gym.codegen.expr import Load, walk
from ke_gym.codegen.graph import Extern, Graph, View, contiguous_stride
from ke_gym.codegen.operands import position
from ke_gym.codegen.products import Product, Store
from ke_gym.codegen.schedule import Group, Plan
from ke_gym.codegen.tiles import joined

LAUNCH = (("channels_last", True),)


def useful(graph: Graph) -> bool:
    """Whether there is a convolution of several taps over images, or in fp32, which then is faster than the library's."""
    for step in graph.steps.values():
        if isinstance(step, Extern) and step.target == products.CONVOLUTION and step.args[8] == 1:
            size = step.args[1].shape[2:]
            single = graph.buffers[step.args[1].buffer].dtype == "f32"
            if math.prod(size) > 1 and (single or len(size) > 1):
                return True
    return False


def everywhere(graph: Graph, plan: Plan) -> Plan:
    """``plan`` with all convolutions our own over copies of their inputs, and behind them what fits there."""
    above = _ancestors(graph)
    convolutions = [
        n for n, s in graph.steps.items() if isinstance(s, Extern) and s.target == products.CONVOLUTION
    ]
    groups: list[Group] = []
    for group in plan.groups:
        inside = set(group.nodes) & set(convolutions)
        if not inside:
            groups.append(group)
            continue
        behind = tuple(n for n in group.nodes if above[n] & inside)
        before = tuple(n for n in group.nodes if n not in inside and n not in behind)
        groups += [Group(part) for part in (before, behind) if part]
    order = list(graph.steps)
    plan = Plan(tuple(sorted(groups, key=lambda g: order.index(g.nodes[-1]))))
    for name in convolutions:
        plan = fusion.absorb(graph, plan, name, LAUNCH)
    return plan


def _ancestors(graph: Graph) -> dict[str, set[str]]:
    """Step name -> names of the steps that it needs."""
    found: dict[str, set[str]] = {}
    for name, step in graph.steps.items():
        above: set[str] = set()
        for read in step.reads:
            if read in graph.producer:
                parent = graph.producer[read]
                above |= {parent} | found[parent]
        found[name] = above
    return found


def handed_on(graph: Graph, units: Sequence[Any]) -> list[Any]:
    """``units`` (nests and library calls) with every result that nobody but such convolutions reads stored as they
    read it, by a convolution of this kind itself."""
    found = list(units)
    for k, unit in enumerate(units):
        if not isinstance(unit, Product) or unit.laid is None:
            continue
        for number, store in enumerate(unit.stores):
            name = store.buffer.name
            readers = [j for j, other in enumerate(found) if name in _reads(other)]
            if name in graph.outputs or not store.index or not readers:
                continue
            if all(_takes(found[j], store) for j in readers):
                stores = list(found[k].stores)
                stores[number] = _turned(store)
                found[k] = replace(found[k], stores=tuple(stores))
                for j in readers:
                    found[j] = replace(found[j], laid=replace(found[j].laid, copy=name))
    return found


def _reads(unit: Any) -> list[str]:
    return list(unit.reads) if isinstance(unit, Extern) else [buffer.name for buffer in unit.reads]


def _takes(unit: Any, store: Store) -> bool:
    """Whether the unit reads the whole result as the input of a convolution, and nowhere else."""
    if not isinstance(unit, Product) or unit.laid is None:
        return False
    name, shape = store.buffer.name, store.buffer.shape
    elsewhere = walk(unit.operands[0], *(other.expr for other in unit.stores))
    whole = View(name, shape, contiguous_stride(shape), 0)
    return unit.laid.call.x == whole and not any(isinstance(n, Load) and n.buffer == name for n in elsewhere)


def _turned(store: Store) -> Store:
    """The result with its channels innermost."""
    image, channel, *place = store.index
    images, channels, *sizes = store.buffer.shape
    turned = position((image, *place, channel), contiguous_stride((images, *sizes, channels)))
    return replace(store, place=joined(turned))
