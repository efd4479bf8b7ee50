"""Drafts for kernels that memory limits: what caches are told of what is read once, rows read twice rather than held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ke_gym.codegen.expr import BYTES
from ke_gym.codegen.fusion import cached_nest, legal, visible_in
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.schedule import Group, Plan, Schedule
from ke_gym.codegen.tiles import Tiles, along_columns

BEYOND = 1 << 26  # bytes that no L2 holds
PIECE = 2048
FEWER, FULL = 16, 32
"""Warps of a block: of which a multiprocessor has four at once, or two."""
KEPT = 96 << 10  # bytes of rows under way that an L1 still holds when they are read again


def drafts(graphs: Sequence[Graph], schedule: Schedule) -> Iterator[Schedule]:
    """``schedule`` with the caches told which reads are the last; and with whole rows in pieces as well, as many of them at
    once as an L1 holds until it is read for the second time."""
    for pieces in (False, True):
        plans = [_told(graph, plan, pieces) for graph, plan in zip(graphs, schedule.plans)]
        if any(plan is not None for plan in plans):
            yield replace(schedule, plans=tuple(new or old for new, old in zip(plans, schedule.plans)))


def _told(graph: Graph, plan: Plan, pieces: bool) -> Plan | None:
    """The plan with its large tile kernels so launched; None if none can be."""
    listed = [group.nodes for group in plan.groups]
    groups = list(plan.groups)
    for k, group in enumerate(plan.groups):
        nest: Any = cached_nest(graph, group, visible_in(graph, group.nodes, listed))
        if isinstance(nest, Tiles) and nest.caches and nest.bytes >= BEYOND and (not pieces or _whole(nest)):
            groups[k] = _with(group, {**(_looped(nest) if pieces else {}), "cache": "reads"})
    found = Plan(tuple(groups))
    return found if groups != list(plan.groups) and legal(graph, found) else None


def _with(group: Group, launch: dict[str, Any]) -> Group:
    return replace(group, launch=tuple(sorted((dict(group.launch) | launch).items())))


def _looped(tiles: Tiles) -> dict[str, Any]:
    widest = max(BYTES[buffer.dtype] for buffer in tiles.reads if buffer.numel >= tiles.rows)
    fits = (64 // FEWER) * tiles.columns * widest <= KEPT
    return {"rows": 1, "columns": PIECE, "warps": FEWER if fits else FULL}


def _whole(tiles: Tiles) -> bool:
    """Whether rows are reduced that a block holds, and are long enough to be taken in pieces."""
    reduces = any(work.op is not None and not work.scan for work in tiles.works)
    single = not any(work.scan or work.across for work in tiles.works)
    long = PIECE < tiles.columns <= tiles.blocks.columns
    return reduces and single and long and along_columns(tiles)
