"""A group of nodes -> what one kernel of a GPU does, as work on tiles. Language-independent: emitters print it.

The outer loops of the group, flattened, are the *rows*; every program takes a block of them. What a node runs over
within a row, flattened, is its *column* axis: reduced, scanned, or stored. Blocks of rows of a pointwise group are
simply blocks of elements. Values that are reduced stay with their row; pointwise nodes are recomputed where they
are read, and a compiler finds what is the same. So nothing passes from one program, or one thread, to another.

Building is the legality test, as for loop nests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ke_gym.codegen.binding import Binder
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    BYTES,
    Const,
    Expr,
    Index,
    Indirect,
    Interned,
    Load,
    Op,
    Remainder,
    Rewriter,
    Search,
    Var,
    compute_dtype,
    constant,
    in_range,
    linear,
    of,
    walk,
)
from ke_gym.codegen.graph import Buffer, Extern, Graph, Node, contiguous_stride
from ke_gym.codegen.schedule import Group

WHOLE_ROW = 32768  # columns up to which a block may hold a whole row
PROGRAMS = 1024  # about what fills a GPU several times over
SHARED_COLUMNS = 1 << 16  # columns that one row's programs may store when there are few rows
B = TypeVar("B")
IDENTITY = {"sum": 0, "prod": 1, "any": False, "all": True}


@dataclass(frozen=True)
class Work:
    """One node: ``expr`` over the row and, if ``columns`` > 1, the column; stored at element ``place``.

    ``op`` is a reduction over the columns or, with ``scan``, a scan along them. Works of one ``level`` need
    only reductions of lower levels.
    """

    node: Node
    expr: Expr
    columns: int
    place: Index | None
    op: str | None
    scan: bool
    level: int


@dataclass(frozen=True)
class Blocks:
    """How a tile kernel is launched: ``rows`` and ``columns`` per program and pass, warps, pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int = 3


@dataclass(frozen=True)
class Tiles:
    """What one kernel does: ``rows`` rows of ``works``, in order of their levels."""

    name: str
    rows: int
    works: tuple[Work, ...]
    blocks: Blocks
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    bytes: int
    group: Group
    origins: tuple[str, ...]

    @property
    def columns(self) -> int:
        """The longest column axis."""
        return max(work.columns for work in self.works)

    @property
    def passes(self) -> bool:
        """Whether a row takes several blocks of columns."""
        return self.columns > self.blocks.columns

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        whole = power_above(self.columns)
        columns = sorted({min(whole, c) for c in (whole, 8192, 4096, 2048, 1024, 512, 256, 64, 16)})
        if any(work.scan for work in self.works):
            columns = [c for c in columns if c > 1]
        return {
            "columns": [c for c in columns if c <= WHOLE_ROW],
            "rows": [
                r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if r <= power_above(self.rows)
            ],
            "warps": [1, 2, 4, 8, 16, 32],
            "stages": [1, 2, 3, 4] if self.passes else [3],
        }


def row_var(rows: int) -> Var:
    return Var("row", rows)


def column_var(columns: int) -> Var:
    return Var("col", columns)


class Builder(Binder):
    """Builds the ``Tiles`` of a group; raises ``Illegal`` if its nodes cannot share rows."""

    def _inline(self, load: Load) -> Expr:
        node = self.nodes.get(load.buffer)
        if node is None or not node.pointwise:
            return load
        return Rewriter(dict(zip(node.vars, load.index))).expr(self.resolved[load.buffer])

    def build(self) -> Tiles:
        if not self.kept:
            raise Illegal("nothing to compute")
        reducing = [n for n in self.kept.values() if not n.pointwise]
        if reducing:
            self._bind_any(reducing)
        else:
            self._bind_pointwise()
            first = max(self.kept.values(), key=lambda n: sum(s != 1 for s in n.shape))
            binding = self._complete(first)
            value = Rewriter(binding).expr(self.resolved[first.name])
            loops = self._order(first.name, first, binding, value)
            self.outer = tuple(loop.var for loop in loops)
        if self.limits:
            raise Illegal("rows of different length")
        for name in self.kept:
            self._check(name)
            if self._privatised(self.kept[name]):
                raise Illegal(f"{name} needs all rows")
        return self._tiles()

    def _complete(self, node: Node) -> dict[Var, Index]:
        """The node's loops over the group's outer loops and its own."""
        binding = dict(self.bound[node.name])
        for var in (*node.vars, *node.rvars):
            if var not in binding:
                own = Var(f"{node.name}.{var.name}", var.size)
                binding[var] = of(own) if var.size != 1 else constant(0)
        return binding

    def _bind_any(self, reducing: list[Node]) -> None:
        reasons = []
        for node in reducing:
            outer = [(k, 1) for k, v in enumerate(node.vars) if v.size != 1 and k != node.scan]
            try:
                self._bind(node, tuple(outer))
                return
            except Illegal as reason:
                reasons.append(str(reason))
        raise Illegal(reasons[0])

    # ------------------------------------------------------------------------------------------- works

    def _tiles(self) -> Tiles:
        rows = math.prod(v.size for v in self.outer)
        places: dict[Var, Index] = dict(_unflatten(of(row_var(rows)), self.outer))
        levels: dict[str, int] = {}
        works = []
        for name, node in self.kept.items():
            work = self._work(name, node, places, levels)
            levels[name] = work.level
            works.append(work)
        if rows < 128 and any(w.op is None and w.columns > SHARED_COLUMNS for w in works):
            raise Illegal("too few rows for so many columns")
        works.sort(key=lambda w: w.level)
        reads, writes = self._memory_of(works)
        total = sum(b.numel * BYTES[b.dtype] for b in (*reads, *writes))
        origins = tuple(dict.fromkeys(n.origin for n in self.nodes.values()))
        made = [n for n in self.kept if n in self.visible]
        if not made:
            raise Illegal("nothing is stored")
        drafted = Tiles(
            made[-1], rows, tuple(works), Blocks(1, 1, 4), reads, writes, total, self.group, origins
        )
        return replace(drafted, blocks=self._blocks(drafted))

    def _work(self, name: str, node: Node, places: dict[Var, Index], levels: dict[str, int]) -> Work:
        binding = self._complete(node)
        value = Rewriter(binding).expr(self.resolved[name])
        loops = [loop.var for loop in self._order(name, node, binding, value)]
        kept = {a for v in node.vars for a, _ in binding[v].terms if a not in self.outer}
        scan = node.scan is not None
        if not node.pointwise and not scan and kept:
            raise Illegal(f"{name} keeps columns")
        if scan and kept != {a for a, _ in binding[node.vars[node.scan or 0]].terms}:
            raise Illegal(f"{name} scans along rows")
        columns = math.prod(v.size for v in loops)
        inside = {**places, **dict(_unflatten(of(column_var(columns)), tuple(loops)))}
        level = 0
        for load in (n for n in walk(value) if isinstance(n, Load) and n.buffer in self.nodes):
            producer = self.nodes[load.buffer]
            if producer.scan is not None or load.buffer not in levels:
                raise Illegal(f"{name} needs the finished {load.buffer}")
            level = max(level, levels[load.buffer] + 1)
        expr = Rewriter(inside, self._read).expr(value)
        flat = constant(0)
        for var, stride in zip(node.vars, contiguous_stride(node.shape)):
            flat = flat + binding[var] * stride
        place = joined(Rewriter(inside).index(flat)) if name in self.visible else None
        return Work(node, expr, columns, place, node.reduction, scan, level)

    def _read(self, load: Load) -> Expr:
        node = self.nodes.get(load.buffer)
        if node is not None:
            return Load(load.buffer, (), compute_dtype(node.dtype))
        return Load(load.buffer, (joined(self._flat(load.buffer, load.index)),), load.dtype)

    def _memory_of(self, works: list[Work]) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
        reads: dict[str, Buffer] = {}
        for work in works:
            for node in walk(work.expr):
                if isinstance(node, (Load, Search)) and node.buffer not in self.nodes:
                    reads[node.buffer] = self.graph.buffers[node.buffer]
        writes = tuple(self.graph.buffers[n] for n in self.kept if n in self.visible)
        return tuple(reads.values()), writes

    # ------------------------------------------------------------------------------------------ blocks

    def _blocks(self, tiles: Tiles) -> Blocks:
        """The heuristic blocks with the group's own values; each must be one of the legal ones."""
        blocks = chosen(heuristic(tiles, self.graph), tiles.knobs(), self.group)
        if blocks.rows * min(blocks.columns, power_above(tiles.columns)) > 1 << 16:
            raise Illegal("blocks of more than 65536 elements")
        if blocks.rows > power_above(tiles.rows):
            raise Illegal("blocks of more rows than there are")
        return blocks


def chosen(blocks: B, legal: Mapping[str, list[Any]], group: Group) -> B:
    """``blocks`` with the group's own values of the knobs; raises ``Illegal`` for one that is not among the legal."""
    for knob, value in group.launch:
        if value not in legal.get(knob, []):
            raise Illegal(f"{knob}={value} is no choice here")
        blocks = replace(blocks, **{knob: value})  # type: ignore[type-var]
    return blocks


def heuristic(tiles: Tiles, graph: Graph) -> Blocks:
    """Blocks of a few thousand elements, contiguous along the axis that memory is contiguous along."""
    columns, rows = tiles.columns, tiles.rows
    if columns == 1:
        size = 1024 if rows >= 1 << 19 else 256
        return Blocks(min(size, power_above(rows)), 1, 4)
    if not along_columns(tiles):
        wide = min(64 if columns > 32 else 256, power_above(rows))
        block = min(power_above(columns), 1024 // wide if wide < 64 else 32)
        return Blocks(wide, block, 4)
    block = power_above(columns)
    if block > WHOLE_ROW:
        block = 4096
    height = max(1, min(power_above(rows), 2048 // block))
    while height > 1 and rows // height < PROGRAMS and height * block > 128:
        height //= 2
    size = height * block
    return Blocks(height, block, 16 if size > 8192 else 8 if size > 2048 else 4 if size > 512 else 2)


def along_columns(tiles: Tiles) -> bool:
    """Whether the largest tensor that is read along columns is contiguous along them."""
    row = row_var(tiles.rows)
    best, largest = True, 0
    for work in tiles.works:
        col = column_var(work.columns)
        for load in walk(work.expr):
            if not isinstance(load, Load) or not load.index:
                continue
            moves = dict(load.index[0].terms)
            size = next((b.numel for b in tiles.reads if b.name == load.buffer), 0)
            if size > largest and depends(load, col):
                largest = size
                unit = [a for a, c in moves.items() if abs(c) == 1]
                best = any(depends(a, col) for a in unit) or not any(depends(a, row) for a in unit)
    return best


def online(tiles: Tiles, work: Work) -> Work | None:
    """The sum of ``exp(x - m)`` that follows the maximum ``m`` of ``x`` at once, if rows take several passes."""
    if work.op != "max" or work.scan or work.columns <= tiles.blocks.columns:
        return None
    shifted = Op("sub", (work.expr, Load(work.node.name, (), work.expr.dtype)), work.expr.dtype)
    wanted = Op("exp", (shifted,), work.expr.dtype)
    return next((w for w in tiles.works if w.op == "sum" and w.expr is wanted), None)


def depends(node: Interned, var: Var) -> bool:
    return any(n is var for n in walk(node))


def joined(index: Index) -> Index:
    """The index with quotients and remainders of one value put together: ``r // 6 * 6 + r // 2 % 3 * 2 + r % 2``."""
    while True:
        total = dict(index.terms)
        for atom, factor in index.terms:
            if type(atom) is not Remainder:
                continue
            whole = atom.index // atom.divisor
            if len(whole.terms) == 1 and not whole.const and whole.terms[0][1] == 1:
                twin = whole.terms[0][0]
                if twin is not atom and total.get(twin) == factor * atom.divisor:
                    rest = [(a, c) for a, c in index.terms if a is not atom and a is not twin]
                    index = linear(index.const, rest) + atom.index * factor
                    break
        else:
            return index


def _unflatten(flat: Index, loops: tuple[Var, ...]) -> list[tuple[Var, Index]]:
    """Each loop of a row-major nest as a function of the position in it."""
    found, step = [], 1
    for var in reversed(loops):
        found.append((var, (flat // step) % var.size))
        step *= var.size
    return found


def power_above(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()


# -------------------------------------------------------------------------------------------- reductions


def for_gpu(graph: Graph, language: Literal["triton", "cuda"] = "triton") -> Graph:
    """The graph with reductions of few results over many elements taken in two steps, so that a GPU is filled."""
    steps: dict[str, Node | Extern] = {}
    for name, step in graph.steps.items():
        if isinstance(step, Node) and step.reduction is not None and step.scan is None:
            for node in _split(step, graph):
                steps[node.name] = node
        else:
            steps[name] = step
    return replace(graph, steps=steps, device="cuda", language=language)


def _split(node: Node, graph: Graph) -> list[Node]:
    reduced = math.prod(r.size for r in node.rvars)
    contiguous = any(
        load.index
        and any(r in (a for a, c in _flat_index(graph, load).terms if abs(c) == 1) for r in node.rvars)
        for load in walk(node.expr)
        if isinstance(load, Load) and load.buffer in graph.buffers
    )
    programs = node.numel if contiguous else -(-node.numel // 64)
    least = 4096 if contiguous else 128
    want = min(PROGRAMS // max(programs, 1), reduced // least)
    whole = max(node.rvars, key=lambda r: r.size)
    outermost = next((r for r in node.rvars if r.size >= want), whole)
    if want < 2 or programs >= 128 or outermost.size < 2:
        return [node]
    parts = min(want, outermost.size)
    length = -(-outermost.size // parts)
    parts = -(-outermost.size // length)
    part, rest = Var(f"{outermost.name}_part", parts), Var(f"{outermost.name}_rest", length)
    index = of(part) * length + of(rest)
    expr = Rewriter({outermost: index}).expr(node.expr)
    dtype = compute_dtype(node.dtype)
    if parts * length != outermost.size:
        inside = in_range(index, 0, outermost.size)
        expr = Op("where", (inside, expr, identity(node.reduction or "sum", expr.dtype)), expr.dtype)
    rvars = tuple(rest if r is outermost else r for r in node.rvars)
    partial = Node(
        f"{node.name}_parts", (parts, *node.shape), dtype, (part, *node.vars), expr, node.origin,
        node.reduction, rvars,
    )  # fmt: skip
    read = Load(partial.name, (of(part), *(of(v) if v.size != 1 else constant(0) for v in node.vars)), dtype)
    return [partial, replace(node, expr=read, rvars=(part,))]


def _flat_index(graph: Graph, load: Load) -> Index:
    total = constant(0)
    for index, stride in zip(load.index, graph.buffers[load.buffer].stride):
        total = total + index * stride
    return linear(total.const, [t for t in total.terms if not isinstance(t[0], Indirect)])


def identity(op: str, dtype: str) -> Const:
    """What a reduction starts from."""
    if op in IDENTITY:
        return Const(IDENTITY[op] if dtype == "bool" else float(IDENTITY[op]) if dtype in ("f32", "f64")
                     else int(IDENTITY[op]), dtype)  # fmt: skip
    if dtype in ("f32", "f64"):
        return Const(-math.inf if op == "max" else math.inf, dtype)
    bits = 8 * BYTES[dtype]
    if dtype in ("u8", "bool"):
        return Const(0 if op == "max" else (255 if dtype == "u8" else 1), dtype)
    return Const(-(1 << (bits - 1)) if op == "max" else (1 << (bits - 1)) - 1, dtype)
