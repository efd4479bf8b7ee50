"""A block's threads: which rows and columns of the tiles each one takes, and how many at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ke_gym.codegen.expr import (
    BYTES,
    Index,
    Load,
    Rewriter,
    Search,
    Var,
    linear,
    of,
    walk,
)
from ke_gym.codegen.tiles import (
    Tiles,
    along_columns,
    column_var,
    depends,
    power_above,
    row_var,
)

VECTOR_BYTES = 16
KEPT = 64  # words of a row that a thread keeps in registers: at most, and half of those there are
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Layout:
    """A block's threads: ``rows`` rows with ``lanes`` threads each, which take ``vector`` elements at once.

    ``down``: neighbouring threads have neighbouring rows. ``steps``: how often a thread of a kernel without
    columns takes a vector.
    """

    rows: int
    lanes: int
    vector: int
    steps: int
    down: bool

    @property
    def threads(self) -> int:
        return self.rows * self.lanes

    @property
    def kept(self) -> int:
        """How many words of a row a thread may keep."""
        return min(KEPT, REGISTERS // 2 // self.threads)

    @property
    def block(self) -> tuple[int, ...]:
        """As it is launched."""
        if self.lanes == 1:
            return (self.rows,)
        if self.rows == 1 and not self.down:
            return (self.lanes,)
        return (self.rows, self.lanes) if self.down else (self.lanes, self.rows)

    def grid(self, tiles: Tiles) -> int:
        """How many blocks are launched."""
        return math.ceil(
            tiles.rows / (self.rows * self.vector * self.steps if tiles.columns == 1 else self.rows)
        )


def layout(tiles: Tiles) -> Layout:
    """The blocks of the schedule as threads."""
    blocks, threads = tiles.blocks, 32 * tiles.blocks.warps
    if tiles.columns == 1:
        threads = min(threads, max(32, blocks.rows))
        each = max(1, blocks.rows // threads)
        vector = _vector(tiles, row_var(tiles.rows), each)
        return Layout(threads, 1, vector, each // vector, down=True)
    scans = any(work.scan for work in tiles.works)
    down = not along_columns(tiles) and not scans
    rows = min(blocks.rows, threads)
    col = column_var(tiles.columns)
    widths = {work.columns for work in tiles.works if work.columns > 1}
    plain = len(widths) == 1 and not down and not scans
    vector = _vector(tiles, col, power_above(tiles.columns)) if plain else 1
    lanes = min(threads // rows, power_above(-(-tiles.columns // vector)))
    rows = max(rows, 32 // lanes)
    return Layout(rows, lanes, vector, 1, down)


def _vector(tiles: Tiles, var: Var, most: int) -> int:
    """How many neighbours along ``var`` every access can take at once."""
    kinds = {b.name: b.dtype for b in (*tiles.reads, *tiles.writes)}
    for vector in (16, 8, 4, 2):
        if vector > most or var.size % vector:
            continue
        split = in_vectors(var, vector)
        moved = []
        for work in tiles.works:
            if work.columns == 1 and tiles.columns > 1:
                continue
            if any(isinstance(n, Search) for n in walk(work.expr)):
                break
            places = [
                (n.buffer, split.index(n.index[0]))
                for n in walk(work.expr)
                if isinstance(n, Load) and n.index
            ]
            if work.place is not None and (work.op is None):
                places.append((work.buffer, split.index(work.place)))
            moved += [
                (kinds[name], together(index, vector))
                for name, index in places
                if depends(index, inner(vector))
            ]
        else:
            fits = all(which is not None and BYTES[kind] * vector <= VECTOR_BYTES for kind, which in moved)
            if moved and fits:
                return vector
    return 1


def inner(vector: int) -> Var:
    return Var("j", vector)


def in_vectors(var: Var, vector: int) -> Rewriter:
    """``var`` as the ``j``-th element of the ``at``-th vector."""
    return Rewriter({var: of(Var("at", var.size // vector)) * vector + of(inner(vector))})


def together(index: Index, vector: int) -> Index | None:
    """Which vector the index goes through as ``j`` does; None if it is no whole one."""
    j = inner(vector)
    rest = [(atom, c) for atom, c in index.terms if atom is not j]
    if index.coefficient(j) != 1 or index.const % vector:
        return None
    if any(c % vector or depends(atom, j) for atom, c in rest):
        return None
    return linear(index.const // vector, [(atom, c // vector) for atom, c in rest])
