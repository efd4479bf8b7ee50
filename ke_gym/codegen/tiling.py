"""A group of nodes -> ``Tiles``: which loops are rows and which are columns, and what is done with them.

Building is the legality test, as for loop nests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ke_gym.codegen.binding import Binder
from ke_gym.codegen.continuity import continuous
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    BYTES,
    Const,
    Expr,
    Index,
    Indirect,
    Load,
    Op,
    Rewriter,
    Search,
    Var,
    compute_dtype,
    constant,
    of,
    rebuilt,
    walk,
)
from ke_gym.codegen.graph import Buffer, Graph, Node, contiguous_stride
from ke_gym.codegen.ranges import folded
from ke_gym.codegen.reciprocals import magnitudes, multiplied
from ke_gym.codegen.schedule import Group
from ke_gym.codegen.slices import Slice, slices
from ke_gym.codegen.tiles import (
    CACHES,
    WALKING,
    WHOLE_ROW,
    Blocks,
    Tiles,
    Work,
    chosen,
    column_var,
    depends,
    heuristic,
    joined,
    power_above,
    row_var,
)
from ke_gym.codegen.windows import SHARED

SHARED_COLUMNS = 1 << 16  # columns that one row's programs may store when there are few rows
EACH = 256
"""Elements of a block for each thread, at most. Of 2,500 kernels of the suite on an H200, 56 had more: none was its task's
best, and building them took 20 s on average, some more than 120; others half a second."""
ACROSS = 8192  # columns up to which a program keeps a sum of each


class Builder(Binder):
    """Builds the ``Tiles`` of a group; raises ``Illegal`` if its nodes cannot share rows."""

    inner = 0
    splits: tuple[int, ...] = ()

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        super().__init__(graph, group, visible)
        self.slices: dict[str, Slice] = {}

    def _inline(self, load: Load) -> Expr:
        node = self.nodes.get(load.buffer)
        if node is None or not node.pointwise:
            return load
        return Rewriter(dict(zip(node.vars, load.index))).expr(self.resolved[load.buffer])

    def build(self) -> Tiles:
        """The tiles; what chooses by position is cut into slices only if it does not share the rows as a whole."""
        builder = self
        try:
            tiles = self._drafted()
        except Illegal:
            builder = Builder(self.graph, self.group, self.visible)
            if not builder._cut():
                raise
            tiles = builder._drafted()
        return replace(tiles, blocks=builder._blocks(tiles))

    def _cut(self) -> bool:
        """Put slices in the place of stored nodes that choose by position; False if there are none."""
        kept = {}
        for name, node in self.kept.items():
            parts = slices(node, self.resolved[name]) if node.pointwise else []
            if len(parts) < 2:
                kept[name] = node
                continue
            for part in parts:
                own = part.node.name
                if own in self.graph.buffers:
                    raise Illegal(f"another tensor is called {own}")
                if self._given(part.node.expr):
                    raise Illegal(f"{own} would be copied")
                kept[own], self.resolved[own], self.slices[own] = part.node, part.node.expr, part
        self.kept = kept
        self.visible |= self.slices.keys()
        return bool(self.slices)

    def _given(self, value: Expr) -> bool:
        """Whether the value is an element of an input or of a library call's result: reading it there costs no less."""
        while isinstance(value, Op) and value.name == "cast":
            (value,) = value.args
        return isinstance(value, Load) and not isinstance(self.graph.steps.get(value.buffer), Node)

    def _slice(self, name: str) -> Slice:
        """What of a tensor the node computes: all of its own, if it is no slice."""
        return self.slices.get(name) or Slice(self.kept[name], self.kept[name])

    def _drafted(self) -> Tiles:
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
            loops = self._order(first, binding, value)
            self.inner = self._columns_of(value, [loop.var for loop in loops])
            self.outer = tuple(loop.var for loop in loops[: len(loops) - self.inner])
        if self.limits:
            raise Illegal("rows of different length")
        for name in self.kept:
            self._check(name)
            if self._privatised(self.kept[name]) and not self._across(self.kept[name]):
                raise Illegal(f"{name} needs all rows")
        return self._tiles()

    def _across(self, node: Node) -> bool:
        """Whether the node is a sum over the rows, and nothing but rows."""
        binding = self.bound[node.name]
        reduced = {a for r in node.rvars if r.size != 1 for a, _ in binding.get(r, of(r)).terms}
        own = {a for v in node.vars if v in binding for a, _ in binding[v].terms}
        return column_sum(self.graph, node) and reduced == set(self.outer) and not own & reduced

    def _columns_of(self, value: Expr, loops: list[Var]) -> int:
        """How many loops of a pointwise group are columns: the innermost where rows share what takes a search, or what
        is searched in."""
        self.splits = tuple(range(min(len(loops), 3))) if self.graph.language == "triton" else (0,)
        given = dict(self.group.launch).get("inner")
        if given in self.splits:
            return int(given)
        if len(self.splits) < 2 or not 16 <= loops[-1].size <= WHOLE_ROW:
            return 0
        shared = (n for n in walk(value) if isinstance(n, (Search, Indirect)) and not depends(n, loops[-1]))
        own = (
            n
            for n in walk(value)
            if isinstance(n, Search) and {v for v in loops if depends(n.start[0], v)} == {loops[-1]}
        )
        return int(any(shared) or any(own))

    def _complete(self, node: Node) -> dict[Var, Index]:
        """The node's loops over the group's outer loops and its own."""
        binding = dict(self.bound[node.name])
        for var in (*node.vars, *node.rvars):
            if var not in binding:
                own = Var(f"{node.name}.{var.name}", var.size)
                binding[var] = of(own) if var.size != 1 else constant(0)
        return binding

    def _match(
        self, name: str, node: Node, binding: dict[Var, Index], index: Index, wanted: Index | None
    ) -> None:
        # Rows may see tensors from outside at other distances; reads within the group are checked later.
        super()._match(name, node, binding, index + -index.const, wanted and wanted + -wanted.const)

    def _bind_any(self, reducing: list[Node]) -> None:
        reasons = []
        down = [node for node in reducing if column_sum(self.graph, node)]
        for node in [*(n for n in reducing if n not in down), *down]:
            loops, first = (node.rvars, len(node.vars)) if node in down else (node.vars, 0)
            outer = [(first + k, 1) for k, v in enumerate(loops) if v.size != 1 and k != node.scan]
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
        sizes = [self.graph.buffers[work.buffer].numel for work in works if work.op is None]
        if rows < 128 and any(size > SHARED_COLUMNS * rows for size in sizes):
            raise Illegal("too few rows for so many columns")
        works.sort(key=lambda w: w.level)
        reads, writes = self._memory_of(works)
        total = sum(b.numel * BYTES[b.dtype] for b in (*reads, *writes))
        origins = tuple(dict.fromkeys(n.origin for n in self.nodes.values()))
        if not writes:
            raise Illegal("nothing is stored")
        return Tiles(
            writes[-1].name,
            rows,
            tuple(mirrored(distinct(works)) if self.graph.language == "triton" else distinct(works)),
            Blocks(1, 1, 4),
            reads,
            writes,
            total,
            self.group,
            origins,
            self.splits,
            CACHES if reads and self.graph.language == "triton" else (),
        )

    def _work(self, name: str, node: Node, places: dict[Var, Index], levels: dict[str, int]) -> Work:
        binding = self._complete(node)
        value = Rewriter(binding).expr(self.resolved[name])
        loops = [loop.var for loop in self._order(node, binding, value)]
        binding = self._follow(node, binding)
        value = Rewriter(binding).expr(self.resolved[name])
        kept = {a for v in node.vars for a, _ in binding[v].terms if a not in self.outer}
        scan = node.scan is not None
        across = self._privatised(node)
        if not node.pointwise and not scan and not across and kept:
            raise Illegal(f"{name} keeps columns")
        if scan and kept != {a for a, _ in binding[node.vars[node.scan or 0]].terms}:
            raise Illegal(f"{name} scans along rows")
        columns = math.prod(v.size for v in loops)
        rows = math.prod(v.size for v in self.outer)
        inside = {**places, **dict(_unflatten(of(column_var(columns)), tuple(loops)))}
        level = 0
        for load in (n for n in walk(value) if isinstance(n, Load) and n.buffer in self.nodes):
            producer = self.nodes[load.buffer]
            if load.buffer not in levels:
                raise Illegal(f"{name} needs the finished {load.buffer}")
            if producer.scan is not None and not (node.pointwise and self._at_scan(producer, load, loops)):
                raise Illegal(f"{name} needs the finished {load.buffer}")
            level = max(level, levels[load.buffer] + (producer.scan is None))
        expr = folded(Rewriter(inside, self._read).expr(value))
        if self.graph.language == "triton" and continuous(self.graph):
            expr = multiplied(
                inverted(expr),
                frozenset({column_var(columns) if columns > 1 else row_var(rows)}),
                magnitudes(self.nodes),
            )
        part = self._slice(name)
        flat = constant(part.start)
        for var, stride in zip(node.vars, contiguous_stride(part.whole.shape)):
            flat = flat + binding[var] * stride
        place = joined(Rewriter(inside).index(flat)) if name in self.visible else None
        return Work(node, expr, columns, part.whole.name, place, node.reduction, scan, level, across=across)

    def _follow(self, node: Node, binding: dict[Var, Index]) -> dict[Var, Index]:
        """The loops of a node that reads a scan backwards, turned so that both run over the same columns."""
        for load in (n for n in walk(self.resolved[node.name]) if isinstance(n, Load)):
            producer = self.nodes.get(load.buffer)
            if not node.pointwise or producer is None or producer.scan is None:
                continue
            at = Rewriter(binding).index(load.index[producer.scan])
            own, step = at.terms[0] if len(at.terms) == 1 else (None, 0)
            if isinstance(own, Var) and step == -1 and at.const == own.size - 1:
                turn = Rewriter({own: of(own) * -1 + at.const})
                binding = {var: turn.index(index) for var, index in binding.items()}
        return binding

    def _at_scan(self, producer: Node, load: Load, loops: list[Var]) -> bool:
        """Whether ``load`` reads the scanned value of the column that its reader runs over."""
        if self.graph.language != "triton" or len(loops) != 1 or producer.scan is None:
            return False
        place = self.bound[producer.name]
        home = tuple(
            of(loops[0]) if k == producer.scan else place.get(v, constant(0))
            for k, v in enumerate(producer.vars)
        )
        return load.index == home and loops[0].size == producer.vars[producer.scan].size

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
        writes = dict.fromkeys(self._slice(n).whole.name for n in self.kept if n in self.visible)
        return tuple(reads.values()), tuple(self.graph.buffers[n] for n in writes)

    # ------------------------------------------------------------------------------------------ blocks

    def _blocks(self, tiles: Tiles) -> Blocks:
        """The heuristic blocks with the group's own values; each must be one of the legal ones."""
        draft = heuristic(tiles, self.graph)
        if tiles.across:
            draft = replace(draft, programs=WALKING[0])
        blocks = chosen(draft, tiles.knobs(), self.group)
        elements = blocks.rows * min(blocks.columns, power_above(tiles.columns))
        if elements > 1 << 16:
            raise Illegal("blocks of more than 65536 elements")
        if blocks.cache == "again" and blocks.columns < tiles.columns:
            raise Illegal("rows in pieces are read again anyway")
        if self.graph.language == "triton":
            if elements > EACH * 32 * blocks.warps:
                raise Illegal(f"more than {EACH} elements a thread")
            if elements * (blocks.stages - 1) * _fetched(tiles) > SHARED:
                raise Illegal("more under way than shared memory holds")
        if blocks.rows > power_above(tiles.rows):
            raise Illegal("blocks of more rows than there are")
        if tiles.across and blocks.columns < tiles.columns:
            raise Illegal("sums over rows take a program's whole rows")
        return replace(blocks, inner=self.inner)


def _fetched(tiles: Tiles) -> int:
    """Bytes of what a loop fetches ahead for each element of a block, at least: of the tensors that are as large as all
    blocks together, the widest, or all of them where there is one loop only."""
    whole = tiles.rows * tiles.columns
    wide = [BYTES[b.dtype] for b in tiles.reads if b.numel >= whole]
    return sum(wide) if tiles.across else max(wide, default=0)


def column_sum(graph: Graph, node: Node) -> bool:
    """Whether the node sums over rows along which another one sums, so that one kernel may do both."""
    rows = math.prod(r.size for r in node.rvars)
    summed = node.reduction == "sum" and node.scan is None
    if graph.language != "triton" or not summed or not 16 <= node.numel <= ACROSS:
        return False
    return along(graph, node, node.vars) and any(
        isinstance(n, Node) and n.reduction is not None and n.scan is None and n is not node
        and n.numel == rows and math.prod(r.size for r in n.rvars) == node.numel and along(graph, n, n.rvars)
        for n in graph.steps.values()
    )  # fmt: skip


def along(graph: Graph, node: Node, loops: Sequence[Var]) -> bool:
    """Whether one of ``loops`` walks along memory."""
    for load in walk(node.expr):
        if isinstance(load, Load) and load.index and load.buffer in graph.buffers:
            flat = constant(0)
            for index, stride in zip(load.index, graph.buffers[load.buffer].stride):
                flat = flat + index * stride
            if any(a in loops for a, c in flat.terms if abs(c) == 1):
                return True
    return False


def distinct(works: list[Work]) -> list[Work]:
    """The works, in order of their levels, without reductions that one of them does already."""
    first: dict[tuple[Expr, str, int], str] = {}
    same: dict[str, str] = {}
    rewriter = Rewriter(
        load=lambda load: Load(same[load.buffer], (), load.dtype) if load.buffer in same else load
    )
    kept = []
    for work in works:
        expr = rewriter.expr(work.expr)
        if work.op is not None and not work.scan and not work.across:
            known = first.setdefault((expr, work.op, work.columns), work.node.name)
            if known != work.node.name and work.place is None:
                same[work.node.name] = known
                continue
        kept.append(replace(work, expr=expr))
    return kept


def inverted(expr: Expr) -> Expr:
    """``expr`` with divisions by numbers as products with their inverses."""

    def change(node: Expr) -> Expr:
        if isinstance(node, Op) and node.name == "div" and node.dtype == "f32":
            value, by = node.args
            if isinstance(by, Const) and 1e-30 < abs(by.value) < 1e30:
                return Op("mul", (value, Const(1.0 / by.value, "f32")), "f32")
        return node

    return rebuilt(expr, change)


def mirrored(works: list[Work]) -> list[Work]:
    """The works with columns counted from the end where scans read their tensors backwards."""
    turned = {}
    for columns in {work.columns for work in works if work.scan}:
        col = column_var(columns)
        loads = [
            n for w in works if w.columns == columns for n in walk(w.expr) if isinstance(n, Load) and n.index
        ]
        if {load.index[0].coefficient(col) for load in loads if depends(load, col)} == {-1}:
            turned[columns] = Rewriter({col: of(col) * -1 + (columns - 1)})
    return [
        replace(
            work, expr=turned[work.columns].expr(work.expr), reverse=work.scan,
            place=None if work.place is None else joined(turned[work.columns].index(work.place)),
        )
        if work.columns in turned
        else work
        for work in works
    ]  # fmt: skip


def _unflatten(flat: Index, loops: tuple[Var, ...]) -> list[tuple[Var, Index]]:
    """Each loop of a row-major nest as a function of the position in it."""
    found, step = [], 1
    for var in reversed(loops):
        found.append((var, (flat // step) % var.size))
        step *= var.size
    return found
