"""Binary searches whose first probes go to shared memory. Language-independent.

Lanes that search for values of their own probe places that have nothing in common, and a multiprocessor's L1 looks up one
line after the other, where shared memory serves 32 banks at once. So a block copies what is probed first once, and takes
many values after that: the rows of its columns, where each column is searched for in a row of its own, and else the top
of the one tree that all values descend. Probes are those of torch, in its order: what is not sorted, or NaN, comes out
alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ke_gym.codegen import tiling
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import BYTES, Search, bounds, walk
from ke_gym.codegen.graph import Buffer, Graph, Node
from ke_gym.codegen.pairs import BULK
from ke_gym.codegen.product_blocks import FILL
from ke_gym.codegen.schedule import Group
from ke_gym.codegen.tiles import Tiles, chosen, column_var, depends
from ke_gym.codegen.windows import LANGUAGE, SHARED
from ke_gym.languages.plan import GRID_LIMITS

SHARED_BEFORE = 99 << 10  # bytes of shared memory that a block may have on GPUs before those with bulk copies
DEEPEST = 14  # levels of a tree at most
WHOLE, THREADS = 224 << 10, 2048  # of a multiprocessor: bytes of shared memory, about, and threads
SIDE_BY_SIDE = GRID_LIMITS[1]  # blocks along a grid's second dimension, at most
LEAST = 31  # what is searched in, for shared memory to be worth it


@dataclass(frozen=True)
class Blocks:
    """``persistent`` blocks of ``warps``, at most, share the rows; a thread takes ``unroll`` values at once.

    ``columns``: of a block, where each is searched for in a row of its own; 1 if all values descend one tree, of which
    ``levels`` are in shared memory.
    """

    warps: int
    persistent: int
    columns: int
    levels: int
    unroll: int = 1
    language: str = LANGUAGE


@dataclass(frozen=True)
class Searched:
    """What one kernel does: the pointwise works of ``tiles``, of which all searches are in ``table``, ``size`` elements from
    ``search.start`` on. ``name``, ``bytes``, ``origins``, ``reads`` and ``writes`` are those of ``tiles``."""

    tiles: Tiles
    search: Search
    table: Buffer
    blocks: Blocks
    group: Group
    room: int
    """Bytes of shared memory that a block may have."""

    @property
    def name(self) -> str:
        return self.tiles.name

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.tiles.reads

    @property
    def writes(self) -> tuple[Buffer, ...]:
        return self.tiles.writes

    @property
    def bytes(self) -> int:
        return self.tiles.bytes

    @property
    def origins(self) -> tuple[str, ...]:
        return self.tiles.origins

    @property
    def by_column(self) -> bool:
        """Whether each column has a row of its own to be searched in."""
        return self.tiles.columns > 1

    @property
    def pitch(self) -> int:
        """Elements from one row in shared memory to the next: odd, which spreads a place of all rows over all banks."""
        return self.search.size | 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.blocks.warps

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor is to hold at once, at least."""
        return max(1, min(self.blocks.persistent // FILL, THREADS // self.threads, WHOLE // self.shared))

    @property
    def height(self) -> int:
        """Rows that a block takes at once."""
        return self.threads // self.blocks.columns

    @property
    def across(self) -> int:
        """Blocks side by side along the columns."""
        return -(-self.tiles.columns // self.blocks.columns)

    @property
    def along(self) -> int:
        """Blocks that share the rows."""
        return min(max(1, self.blocks.persistent // self.across), -(-self.tiles.rows // self.height))

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self._shared(self.blocks.columns, self.blocks.levels)

    def _shared(self, columns: int, levels: int) -> int:
        elements = columns * self.pitch + 1 if self.by_column else (1 << levels) - 1
        return elements * BYTES[self.table.dtype]

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        columns, levels = [1], [1]
        if self.by_column:
            columns = [
                c
                for c in (32, 64, 128)
                if c < self.tiles.columns + 32
                and self._shared(c, 1) <= self.room
                and -(-self.tiles.columns // c) <= SIDE_BY_SIDE
            ]
        else:
            # A tree of so many levels is full: torch's probes halve what is left, less the one probed.
            most = min(DEEPEST, (self.search.size + 1).bit_length() - 1)
            levels = [n for n in range(1, most + 1) if self._shared(1, n) <= self.room][-4:]
        return {
            "warps": [4, 8, 16, 32],
            "persistent": [FILL * n for n in (1, 2, 4, 8, 16)],
            "columns": columns,
            "levels": levels,
            "unroll": [1, 2, 4],
            "language": [LANGUAGE],
        }


class _Common(Illegal):
    """Elements of a row have one search together: element by element, each would make it again."""


class Builder:
    """Builds the ``Searched`` of a group; raises ``Illegal`` if it is none."""

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        self.graph, self.group, self.visible = graph, group, visible

    def build(self) -> Any:
        if not searching(self.graph, self.group):
            raise Illegal("nothing is searched for")
        reasons = []
        for launch in ((("inner", 1),), (("inner", 0),), ()):
            try:
                return self._built(Group(self.group.nodes, launch=launch))
            except _Common:
                raise
            except Illegal as reason:
                reasons.append(str(reason))
        raise Illegal("; ".join(dict.fromkeys(reasons)))

    def _built(self, group: Group) -> Searched:
        tiles = tiling.Builder(self.graph, group, self.visible).build()
        if any(work.op is not None or work.columns != tiles.columns for work in tiles.works):
            raise Illegal("more than pointwise results")
        roots = [work.expr for work in tiles.works]
        if len(found := {n for n in walk(*roots) if isinstance(n, Search)}) != 1:
            raise Illegal("several searches")
        (search,) = found
        table = next(b for b in tiles.reads if b.name == search.buffer)
        if tiles.columns > 1 and not depends(search.value, column_var(tiles.columns)):
            raise _Common("a row shares what it searches for")
        own = {column_var(tiles.columns)} if tiles.columns > 1 else set()
        if {atom for atom, _ in search.start[0].terms} != own:
            raise Illegal("a search in something else for every row")
        low, high = bounds(search.start[0])
        if low < 0 or high + search.size > table.extent:
            raise Illegal("a search that is made for some elements only")  # the copy is made for all
        if search.size < LEAST or any(b is table for b in tiles.writes):
            raise Illegal("too little to be searched in")
        room = SHARED if self.graph.arch in BULK else SHARED_BEFORE
        made = Searched(tiles, search, table, Blocks(8, FILL, 1, 1), self.group, room)
        if not (made.knobs()["columns"] and made.knobs()["levels"]):
            raise Illegal("more than shared memory holds")
        made = replace(made, blocks=_first(made))
        made = replace(made, blocks=chosen(made.blocks, made.knobs(), self.group))
        if made.shared > room:
            raise Illegal("more than shared memory holds")
        return made


def _first(searched: Searched) -> Blocks:
    """As much of the tree as a block may hold, or a warp's columns, and blocks of all the threads there may be.

    On an H200, 2^20 of eight bytes: 14 levels 190 us, 13 in each of two blocks 239, none 311; 128 columns of 255: 32 of them
    in each of two blocks 141 us, 64 in one 210, none 217.
    """
    legal = searched.knobs()
    columns, levels = legal["columns"][0], legal["levels"][-1]
    resident = min(2, WHOLE // searched._shared(columns, levels))
    return Blocks(32, FILL * max(1, resident), columns, levels, 4 if searched.by_column else 1)


def searching(graph: Graph, group: Group) -> bool:
    """Whether anything is searched for by the group's nodes, and they are pointwise."""
    nodes = [n for name in group.nodes if isinstance(n := graph.steps[name], Node)]
    found = any(isinstance(n, Search) for node in nodes for n in walk(node.expr))
    return found and len(nodes) == len(group.nodes)
