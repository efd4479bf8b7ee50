"""Drafts for kernels that memory limits: what caches are told of what is read once, rows read twice rather than held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ke_gym.codegen.fusion import cached_nest, legal, visible_in
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.schedule import Group, Plan, Schedule
from ke_gym.codegen.tiles import Tiles, along_columns

BEYOND = 1 << 26  # bytes that no L2 holds
LOOPED = {"rows": 1, "columns": 2048, "warps": 16}
"""A row in pieces, by as many threads as a multiprocessor has four times: its second reading then finds it in the L1."""


def drafts(graphs: Sequence[Graph], schedule: Schedule) -> Iterator[Schedule]:
    """``schedule`` with the caches told which reads are the last; and with whole rows in pieces as well."""
    for launch in ({}, LOOPED):
        plans = [_told(graph, plan, launch) for graph, plan in zip(graphs, schedule.plans)]
        if any(plan is not None for plan in plans):
            yield replace(schedule, plans=tuple(new or old for new, old in zip(plans, schedule.plans)))


def _told(graph: Graph, plan: Plan, launch: dict[str, Any]) -> Plan | None:
    """The plan with its large tile kernels so launched; None if none can be."""
    listed = [group.nodes for group in plan.groups]
    groups = list(plan.groups)
    for k, group in enumerate(plan.groups):
        nest: Any = cached_nest(graph, group, visible_in(graph, group.nodes, listed))
        if isinstance(nest, Tiles) and nest.caches and nest.bytes >= BEYOND and (not launch or _whole(nest)):
            groups[k] = _with(group, {**launch, "cache": "reads"})
    found = Plan(tuple(groups))
    return found if groups != list(plan.groups) and legal(graph, found) else None


def _with(group: Group, launch: dict[str, Any]) -> Group:
    return replace(group, launch=tuple(sorted((dict(group.launch) | launch).items())))


def _whole(tiles: Tiles) -> bool:
    """Whether rows are reduced that a block holds, and are long enough to be taken in pieces."""
    reduces = any(work.op is not None and not work.scan for work in tiles.works)
    single = not any(work.scan or work.across for work in tiles.works)
    long = LOOPED["columns"] < tiles.columns <= tiles.blocks.columns
    return reduces and single and long and along_columns(tiles)
