"""Which loops of a reduction a nest may run outside: one choice per way to share work between threads."""

from __future__ import annotations

import math

from ke_gym.codegen.expr import Expr, Var, constant, loads
from ke_gym.codegen.graph import Graph, Node

SERIAL = 1 << 14  # elements below which a reduction may run on one thread without outer loops


def outer_choices(graph: Graph, node: Node, expr: Expr) -> list[tuple[tuple[int, int], ...]]:
    """Ways to take loops of a reduction outside, the likeliest first.

    Rows: its output loops, with the loop that is contiguous in memory tiled so that a tile stays inside and
    fills vectors. Columns: its outermost reduced loop, each thread accumulating privately.
    """
    loops = (*node.vars, *node.rvars)
    kept = [k for k, v in enumerate(node.vars) if v.size != 1]
    if node.scan is not None:
        kept = [k for k in kept if k != node.scan]
    unit = _unit_loop(graph, expr, loops)
    rows = []
    for k in kept:
        tile = 1
        if k == unit:
            if node.vars[k].size <= 64:
                continue
            tile = next((t for t in (512, 256, 128) if node.vars[k].size >= 8 * t), 64)
        rows.append((k, tile))
    reduced = [len(node.vars) + k for k, r in enumerate(node.rvars)]
    columns: list[tuple[tuple[int, int], ...]] = []
    if node.scan is None:
        for k in reduced:
            if len(reduced) > 1 or loops[k].size > 1:
                if k == unit:
                    if loops[k].size >= 2048:
                        columns.append(((k, 1024),))
                else:
                    columns.append(((k, 64 if loops[k].size >= 1024 and unit in kept else 1),))
    parallel = math.prod(-(-loops[k].size // t) for k, t in rows)
    first = [tuple(rows)] if rows else []
    if unit in kept and parallel < 16:
        return [*columns, *first] or [()]
    small = node.numel * math.prod(r.size for r in node.rvars) < SERIAL
    if not rows or parallel < 2:
        return [*columns, *first, *([()] if small or node.scan is not None or not columns else [])]
    return [*first, *columns]


def _unit_loop(graph: Graph, expr: Expr, loops: tuple[Var, ...]) -> int | None:
    """The loop along which the largest tensor it reads is contiguous."""
    best, largest = None, 0
    for load in loads(expr):
        buffer = graph.buffers[load.buffer]
        flat = constant(0)
        for i, s in zip(load.index, buffer.stride):
            flat = flat + i * s
        for k, var in enumerate(loops):
            if flat.coefficient(var) == 1 and buffer.numel > largest and var.size > 1:
                best, largest = k, buffer.numel
    return best
