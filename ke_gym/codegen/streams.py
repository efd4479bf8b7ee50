"""Drafts for kernels that memory limits: what caches are told of what is read once, rows read twice rather than held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ke_gym.codegen.expr import BYTES, Indirect, Load, walk
from ke_gym.codegen.fusion import cached_nest, legal, visible_in
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.schedule import Plan, Schedule
from ke_gym.codegen.tiles import Tiles, along_columns, gathers, power_above
from ke_gym.codegen.windows import SHARED

BEYOND = 1 << 26  # bytes that no L2 holds
MUCH = 1 << 24  # bytes for which what lies in an L2, and may have to be written, makes room
PIECE, WHOLE = 2048, 8192
FEWER, FULL = 16, 32
"""Warps of a block: of which a multiprocessor has four at once, or two."""
ELEMENTS = 128  # of a warp that has a part of a row
SLAB, LEAST, WAVE = 40 << 20, 16, 512  # bytes, columns at the least, programs that run at once
KEPT = 96 << 10  # bytes of rows under way that an L1 still holds when they are read again

Kind = Callable[[Tiles], dict[str, Any] | None]
"""How a kernel is launched otherwise; None for those that it is nothing for."""


def drafts(graphs: Sequence[Graph], schedule: Schedule) -> Iterator[Schedule]:
    """``schedule`` with the caches told which reads are the last; with whole rows in pieces as well, as many of them at once
    as an L1 holds until it is read for the second time, or read twice in one piece; with short rows of gathered elements
    one by one; and with long ones by slabs of a table that an L2 holds, so that what is gathered again is still there."""
    yield from told(graphs, schedule)
    for kind in (_looped, _again, _single, _slabs):
        yield from _launched(graphs, schedule, kind, BEYOND)


def told(graphs: Sequence[Graph], schedule: Schedule) -> Iterator[Schedule]:
    """The first of ``drafts`` alone."""
    yield from _launched(graphs, schedule, _told, MUCH)


def _launched(graphs: Sequence[Graph], schedule: Schedule, kind: Kind, least: int) -> Iterator[Schedule]:
    """The schedule with tile kernels that move ``least`` bytes launched as ``kind`` says; none if it says so of none."""
    plans = [_of_plan(graph, plan, kind, least) for graph, plan in zip(graphs, schedule.plans)]
    if any(plan is not None for plan in plans):
        yield replace(schedule, plans=tuple(new or old for new, old in zip(plans, schedule.plans)))


def _of_plan(graph: Graph, plan: Plan, kind: Kind, least: int) -> Plan | None:
    listed = [group.nodes for group in plan.groups]
    groups = list(plan.groups)
    for k, group in enumerate(plan.groups):
        nest: Any = cached_nest(graph, group, visible_in(graph, group.nodes, listed))
        if isinstance(nest, Tiles) and nest.bytes >= least and (launch := kind(nest)) is not None:
            groups[k] = replace(group, launch=tuple(sorted((dict(group.launch) | launch).items())))
    found = Plan(tuple(groups))
    return found if groups != list(plan.groups) and legal(graph, found) else None


def _told(tiles: Tiles) -> dict[str, Any] | None:
    """On an H200, weighted means of 128 times 512 rows of 256 in fp16 (32 MiB), strided: 12 % sooner."""
    if not tiles.caches:
        return None
    if any(work.op is not None for work in tiles.works):
        return {"cache": "reads"}
    if tiles.bytes < BEYOND:
        return None
    return {"cache": "results"} if tiles.blocks.cache == "plain" else {"cache": "plain", "warps": 4}


def _looped(tiles: Tiles) -> dict[str, Any] | None:
    if not (tiles.caches and _reduces(tiles) and PIECE < tiles.columns <= tiles.blocks.columns):
        return None
    widest = max((BYTES[b.dtype] for b in tiles.reads if b.numel >= tiles.rows), default=4)
    fits = (64 // FEWER) * tiles.columns * widest <= KEPT
    return {"cache": "streamed", "rows": 1, "columns": PIECE, "warps": FEWER if fits else FULL}


def _again(tiles: Tiles) -> dict[str, Any] | None:
    """On an H200, 16384 rows of 8192 in bf16, normed: 127.3 us, in pieces 128.4 to 129.2, held in registers 136."""
    if not (tiles.caches and _reduces(tiles) and PIECE < tiles.columns <= WHOLE):
        return None
    stored = any(work.op is None and work.columns == tiles.columns for work in tiles.works)
    return {"cache": "again", "rows": 1, "warps": FEWER} if stored else None


def _single(tiles: Tiles) -> dict[str, Any] | None:
    if not (gathers(tiles) and _reduces(tiles) and tiles.blocks.rows > 1 and not tiles.passes):
        return None
    return {"cache": "kept", "rows": 1, "warps": max(1, tiles.blocks.columns // ELEMENTS)}


def _slabs(tiles: Tiles) -> dict[str, Any] | None:
    """On an H200, 131072 of 128256 rows of 4096: 1.09 ms with the next columns under way, 1.25 without, row by row 1.49."""
    loads = [n for work in tiles.works for n in walk(work.expr) if isinstance(n, Load)]
    gathered = {n.buffer for n in loads if any(isinstance(a, Indirect) for i in n.index for a, _ in i.terms)}
    sizes = [b.numel * BYTES[b.dtype] for b in tiles.reads if b.name in gathered]
    if not sizes or any(work.op is not None for work in tiles.works) or not along_columns(tiles):
        return None
    columns = power_above(SLAB * tiles.columns // max(sizes) + 1) // 2  # as many as fit
    repeats = 2 * tiles.rows * tiles.columns * BYTES[tiles.writes[0].dtype] >= max(sizes)
    if not repeats or not LEAST <= columns < power_above(tiles.columns):
        return None
    rows = max(1, min(1024, power_above(tiles.rows) // WAVE))
    ahead = rows * columns * BYTES[tiles.writes[0].dtype] <= SHARED // 2  # of two tables, if they are added
    return {"columns": columns, "rows": rows, "warps": 8, "stages": 2 if ahead else 1}


def _reduces(tiles: Tiles) -> bool:
    """Whether rows, contiguous in memory, are reduced, and nothing else that goes on from one column or row to another."""
    return tiles.reducing and along_columns(tiles)
