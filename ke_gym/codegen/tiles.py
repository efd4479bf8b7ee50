"""A group of nodes -> what one kernel of a GPU does, as work on tiles. Language-independent: emitters print it.

The outer loops of the group, flattened, are the *rows*; every program takes a block of them. What a node runs over
within a row, flattened, is its *column* axis: reduced, scanned, or stored. Blocks of rows of a pointwise group are
simply blocks of elements. Values that are reduced stay with their row; pointwise nodes are recomputed where they
are read, and a compiler finds what is the same. So nothing passes from one program, or one thread, to another: what
is summed over all rows (the gradient of a norm's weight) is kept by programs that walk over many of them, and added
up by a second kernel.

``tiling`` builds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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
    Search,
    Var,
    linear,
    walk,
)
from ke_gym.codegen.graph import Buffer, Graph, Node
from ke_gym.codegen.schedule import Group

WHOLE_ROW = 32768  # columns up to which a block may hold a whole row
PROGRAMS = 1024  # about what fills a GPU several times over
LONG = 8192
"""Columns of rows that are scanned from their end in pieces. On an H200, 16384 rows of 16384: 656 us, whole 730."""
WALKING = (132, 264, 528, 1056)  # programs that walk over rows
CACHES = ("plain", "reads", "kept", "streamed", "results", "again")
"""What the caches are told: nothing; that reads leave first if they are the last, and stay if not; that results stay
too, or leave first too; that only results leave first, and what is read again stays; as "kept", and that rows which
fit into one block are read again where they are needed again, instead of being held in registers."""
B = TypeVar("B")
IDENTITY = {"sum": 0, "prod": 1, "any": False, "all": True}


@dataclass(frozen=True)
class Work:
    """One node: ``expr`` over the row and, if ``columns`` > 1, the column; stored at element ``place`` of ``buffer``.

    ``op`` is a reduction over the columns or, with ``scan``, a scan along them, from the last one if ``reverse``.
    Works of one ``level`` need only reductions of lower levels, and scans that come before them.
    ``across``: a sum over the rows instead, column by column.
    """

    node: Node
    expr: Expr
    columns: int
    buffer: str
    place: Index | None
    op: str | None
    scan: bool
    level: int
    reverse: bool = False
    across: bool = False


@dataclass(frozen=True)
class Blocks:
    """How a tile kernel is launched: ``rows`` and ``columns`` per program and pass, warps, pipeline stages.

    ``programs`` walk over all rows where something is summed over these (0: each row is done by a program of its
    own). ``inner``: how many of a pointwise group's innermost loops are columns; the others are rows.
    ``cache``: what the caches are told (``CACHES``).
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    programs: int = 0
    inner: int = 0
    cache: str = "plain"


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
    splits: tuple[int, ...] = ()
    """Legal values of ``Blocks.inner``."""
    caches: tuple[str, ...] = ()
    """Legal values of ``Blocks.cache``."""

    @property
    def columns(self) -> int:
        """The longest column axis."""
        return max(work.columns for work in self.works)

    @property
    def passes(self) -> bool:
        """Whether a row takes several blocks of columns."""
        return self.columns > self.blocks.columns

    @property
    def across(self) -> tuple[Work, ...]:
        """What is summed over the rows."""
        return tuple(work for work in self.works if work.across)

    @property
    def reducing(self) -> bool:
        """Whether rows are reduced, and nothing goes on from one column or row to another besides."""
        reduced = any(work.op is not None for work in self.works)
        return reduced and not any(work.scan or work.across for work in self.works)

    def at_once(self, columns: int) -> bool:
        """Whether this many columns are one block's, and held in registers where they are needed twice."""
        again = self.blocks.cache == "again" and power_above(columns) == self.blocks.columns
        return columns <= self.blocks.columns and not again

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        whole = power_above(self.columns)
        columns = sorted({min(whole, c) for c in (whole, 8192, 4096, 2048, 1024, 512, 256, 64, 16)})
        if any(work.scan for work in self.works):
            columns = [c for c in columns if c > 1]
        choices: dict[str, list[Any]] = {
            "columns": [c for c in columns if c <= WHOLE_ROW],
            "rows": [
                r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if r <= power_above(self.rows)
            ],
            "warps": [1, 2, 4, 8, 16, 32],
            "stages": [1, 2, 3, 4] if self.passes or self.across else [1],
        }
        if self.across:
            choices["programs"] = list(WALKING)
        if len(self.splits) > 1:
            choices["inner"] = list(self.splits)
        if self.caches:
            levels = {work.level for work in self.works if work.columns == self.columns}
            again = self.reducing and len(levels) > 1
            choices["cache"] = [c for c in self.caches if c != "again" or again]
        return choices


def row_var(rows: int) -> Var:
    """The variable that runs over a kernel's rows."""
    return Var("row", rows)


def column_var(columns: int) -> Var:
    """The variable that runs over a column axis of this length."""
    return Var("col", columns)


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
        return _flat(tiles, graph)
    if not along_columns(tiles):
        wide = min(64 if columns > 32 else 256, power_above(rows))
        block = min(power_above(columns), 1024 // wide if wide < 64 else 32)
        return Blocks(wide, block, 4)
    if searched_by_column(tiles):
        return Blocks(min(8, power_above(rows)), min(64, power_above(columns)), 8)
    block, stages = power_above(columns), 1
    if block > WHOLE_ROW:
        if any(online(tiles, work) for work in tiles.works):
            return Blocks(1, 2048, 8)
        block, stages = 4096, 3 if any(variance(tiles, work) for work in tiles.works) else 1
    height = max(1, min(power_above(rows), _elements(tiles) // block))
    while height > 1 and rows // height < PROGRAMS and height * block > 128:
        height //= 2
    size = height * block
    if tiles.across:  # a row for every multiprocessor, and the next one on its way
        return Blocks(height, block, 16 if size > 2048 else 8 if size > 1024 else 4, 3)
    most = 32 if size > 16384 and graph.language == "triton" else 16
    warps = most if size > 8192 else 8 if size > 2048 else 4 if size > 512 else 2
    if any(work.scan for work in tiles.works):
        warps = min(warps, 8)
        if columns >= LONG and any(work.reverse for work in tiles.works):
            return Blocks(1, 512, 4)
    return Blocks(height, block, 2 if _searched(tiles) else warps, stages)


def _streams(tiles: Tiles) -> int:
    """How many elements of four bytes each element of a pointwise group is computed from, those aside that others read too.

    On an H200, two of them and half a gigabyte of results: 370.1 us by 8 warps past the caches, 371.4 by 4 as usual; of one,
    4 warps are faster (255.3 us) than 8 (268.4).
    """
    again = shared(tiles)
    loads = {n for work in tiles.works for n in walk(work.expr) if isinstance(n, Load) and n.index}
    return sum(BYTES[load.dtype] == 4 and load.buffer not in again for load in loads)


def _flat(tiles: Tiles, graph: Graph) -> Blocks:
    """Blocks of a pointwise group.

    On an H200, 134 million halves: 2048 at once 197 us, 1024 of them 211. Maxima of 3 x 3 with stride 2: 128 at once, one a
    thread, 139 us, 1024 of them 275, since neighbours of one thread part those of a warp.
    """
    rows = tiles.rows
    if rows < 1 << 19:
        return Blocks(min(256, power_above(rows)), 1, 4)
    if graph.language != "triton":
        return Blocks(1024, 1, 4)
    if _apart(tiles):
        return Blocks(128, 1, 4)
    if tiles.caches and rows >= 1 << 26 and _streams(tiles) > 1:
        return Blocks(1024, 1, 8, cache="results")
    halves = all(BYTES[b.dtype] == 2 for b in (*tiles.reads, *tiles.writes))
    return Blocks(2048 if halves and rows >= PROGRAMS * 2048 else 1024, 1, 4)


def _apart(tiles: Tiles) -> bool:
    """Whether most of what a pointwise group reads steps over elements from one row to the next."""
    row = row_var(tiles.rows)
    loads = {n for work in tiles.works for n in walk(work.expr) if isinstance(n, Load) and n.index}
    steps = [min((abs(c) for a, c in load.index[0].terms if depends(a, row)), default=0) for load in loads]
    return 2 * sum(step > 1 for step in steps) > sum(step > 0 for step in steps)


def _elements(tiles: Tiles) -> int:
    """About how many a program takes: fewer where each waits for an index that is no search's."""
    return 1024 if gathers(tiles) and not _searched(tiles) else 2048


def gathers(tiles: Tiles) -> bool:
    """Whether elements are read at places that have to be read first."""
    return any(isinstance(n, Indirect) for work in tiles.works for n in walk(work.expr))


def _searched(tiles: Tiles) -> bool:
    """Whether rows are stored that share a search: fewer warps make it less often."""
    found = any(isinstance(n, Search) for work in tiles.works for n in walk(work.expr))
    return found and all(work.op is None for work in tiles.works)


def searched_by_column(tiles: Tiles) -> bool:
    """Whether every column is searched for in a row of its own: many warps wait for each other's probes.

    On an H200, 262144 x 128 values in 255 boundaries each: 8 x 64 by 8 warps 0.220 ms, 1024 in a row by 4 warps 0.375 ms.
    """
    searches = [
        n for work in tiles.works if work.op is None for n in walk(work.expr) if isinstance(n, Search)
    ]
    row, col = row_var(tiles.rows), column_var(tiles.columns)
    return any(depends(n.start[0], col) and not depends(n.start[0], row) for n in searches)


def shared(tiles: Tiles) -> set[str]:
    """The tensors of which an element is read by two rows or more, on average, at places that were read first, or once for
    all columns."""
    sizes = {buffer.name: buffer.numel for buffer in tiles.reads}
    found = set()
    for work in tiles.works:
        col = column_var(work.columns)
        for load in walk(work.expr):
            if isinstance(load, Load) and load.index and load.buffer in sizes:
                reads = tiles.rows * (work.columns if depends(load, col) else 1)
                by_row = work.columns > 1 and not depends(load, col)
                found_first = any(isinstance(n, Indirect) for n in walk(load.index[0]))
                if by_row or found_first or 2 * sizes[load.buffer] <= reads:
                    found.add(load.buffer)
    return found


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
    return next((w for w in tiles.works if _row_sum(w) and w.expr is wanted), None)


def variance(tiles: Tiles, work: Work) -> Work | None:
    """The sum of ``(x - mean)**2`` that follows the sum of ``x`` at once, if rows take several passes."""
    if not _row_sum(work) or work.columns <= tiles.blocks.columns:
        return None
    total = Load(work.node.name, (), work.expr.dtype)

    def squares(expr: Expr) -> bool:
        if not (isinstance(expr, Op) and expr.name == "mul" and expr.args[0] is expr.args[1]):
            return False
        apart = expr.args[0]
        if not (isinstance(apart, Op) and apart.name == "sub" and apart.args[0] is work.expr):
            return False
        mean = apart.args[1]
        if not (isinstance(mean, Op) and mean.name in ("mul", "div") and mean.args[0] is total):
            return False
        count = mean.args[1].value if isinstance(mean.args[1], Const) and mean.args[1].value else math.inf
        return abs((count if mean.name == "mul" else 1 / count) * work.columns - 1) < 1e-12

    found = (w for w in tiles.works if _row_sum(w) and w.columns == work.columns and squares(w.expr))
    return next(found, None)


def _row_sum(work: Work) -> bool:
    """Whether the work is one sum a row."""
    return work.op == "sum" and not work.scan and not work.across


def depends(node: Interned, var: Var) -> bool:
    """Whether ``var`` is anywhere in the expression or index."""
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


def power_above(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()


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
