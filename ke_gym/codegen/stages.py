"""What the loops of a stage permit, whatever language they are printed in."""

from __future__ import annotations

import math

from ke_gym.codegen.expr import BYTES, Load, Quotient, Rewriter, Search, Var, compute_dtype, of, walk
from ke_gym.codegen.nest import Item, Loop, Nest, Stage, Target

NEAR = 64  # iterations below which nothing is fetched ahead or sent past the caches
VECTOR = 16  # elements of a vector of float
SHORT = 256  # iterations up to which what is left after whole vectors counts
LONG = 2048  # summands of several loops that one register takes


def streamed(nest: Nest, stage: Stage, least: int) -> list[Item]:
    """What writes a result of at least ``least`` bytes along the innermost loop that this nest reads nowhere."""
    if not stage.loops or stage.loops[-1].limit is not None or stage.loops[-1].var.size < NEAR:
        return []
    var = stage.loops[-1].var
    large = {b.name for b in nest.writes if b.extent * BYTES[b.dtype] >= least}
    read = {n.buffer for s in nest.stages for i in s.items for n in walk(i.expr) if isinstance(n, Load)}
    return [
        item
        for item in stage.items
        if item.target.kind == "global" and item.op is None and item.scan is None
        and item.target.name in large - read and item.target.index.coefficient(var) == 1
    ]  # fmt: skip


def scattered(stage: Stage) -> bool:
    """Whether the innermost loop walks across memory in all it touches: vectors would be put together singly."""
    var = stage.loops[-1].var
    loads = [n for item in stage.items for n in walk(item.expr) if isinstance(n, Load) and n.index]
    if any(item.op is not None or item.target.kind != "global" for item in stage.items) or not loads:
        return False
    steps = {item.target.index.coefficient(var) for item in stage.items}
    steps |= {load.index[0].coefficient(var) for load in loads}
    return 1 not in steps and not any(isinstance(n, Search) for item in stage.items for n in walk(item.expr))


def overlaps(stage: Stage) -> bool:
    """Whether the innermost loop is short, leaves a rest that fills no vector, and may do elements twice."""
    loop = stage.loops[-1]
    size = loop.var.size
    if loop.limit is not None or not VECTOR < size <= SHORT or size % (VECTOR // 2) == 0:
        return False
    made = {item.target.name for item in stage.items}
    reads = {n.buffer for item in stage.items for n in walk(item.expr) if isinstance(n, Load) and n.index}
    plain = all(item.op is None and item.target.kind in ("global", "row") for item in stage.items)
    return plain and not made & reads


def acc_dtype(item: Item) -> str:
    """The type of the register that a reduction accumulates in: fp64 for a long sum whose lanes no loop ends early, where
    fp32 would lose what a library's blocked sums keep."""
    dtype = compute_dtype(item.expr.dtype)
    long = len(item.reduced) > 1 and math.prod(var.size for var in item.reduced) >= LONG
    return "f64" if long and dtype == "f32" and item.op == "sum" else dtype


def trailing(item: Item, loops: tuple[Loop, ...]) -> int | None:
    """Depth of the first of the reduced loops that are innermost; None if the innermost is not reduced."""
    start = len(loops)
    while start and loops[start - 1].var in item.reduced:
        start -= 1
    return start if item.op and start < len(loops) else None


def collapsed(stage: Stage) -> Stage:
    """Adjacent loops joined where every access moves through both as through one."""
    loops = list(stage.loops)
    items = list(stage.items)
    k = len(loops) - 2
    while k >= 0:
        a, b = loops[k], loops[k + 1]
        joined = Var(a.var.name, a.var.size * b.var.size)
        change = Rewriter({a.var: of(joined) // b.var.size, b.var: of(joined) % b.var.size})
        if a.limit is None and b.limit is None and all(_joinable(i, a.var, b.var) for i in items):
            changed = []
            for item in items:
                expr = change.expr(item.expr)
                index = change.index(item.target.index)
                reduced = frozenset(joined if r is a.var else r for r in item.reduced if r is not b.var)
                changed.append(
                    Item(item.node, expr, Target(item.target.kind, item.target.name, index, item.target.dtype),
                         item.op, reduced, item.scan)
                )  # fmt: skip
            if not any(_divides(i, joined) for i in changed):
                items = changed
                loops[k : k + 2] = [Loop(joined)]
        k -= 1
    return Stage(tuple(loops), tuple(items))


def _joinable(item: Item, a: Var, b: Var) -> bool:
    if item.scan is not None and (item.scan is a or item.scan is b):
        return False
    return (a in item.reduced) == (b in item.reduced)


def _divides(item: Item, var: Var) -> bool:
    for node in walk(item.expr, item.target.index):
        if isinstance(node, Quotient) and any(n is var for n in walk(node.index)):
            return True
    return False
