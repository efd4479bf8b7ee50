"""A group of nodes under its schedule -> a loop nest. Language-independent: emitters only print it.

Building is the legality test: it raises ``Illegal`` when the group's nodes cannot share their outer loops.

The outer loops come from one node, the anchor. Every other node of the group is bound to them by following
loads: if a node reads ``mean[i // 8]`` and ``mean``'s only loop is the outer loop ``o``, then ``i`` is split
into ``8 * o + j``. What is not bound stays inside, as the stages of one outer iteration. Nodes that reduce
over an outer loop accumulate into a buffer private to each thread, combined after the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial

from ke_gym.codegen import one_pass
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    BYTES,
    Const,
    Expr,
    Index,
    InRange,
    Interned,
    Load,
    Op,
    Quotient,
    Rewriter,
    Search,
    Var,
    bounds,
    compute_dtype,
    constant,
    linear,
    of,
    walk,
)
from ke_gym.codegen.graph import Buffer, Graph, Node
from ke_gym.codegen.schedule import Group

SERIAL = 1 << 14  # elements below which a reduction may run on one thread without outer loops
ROW_BYTES = 1 << 19  # of thread-local buffers, well inside any thread's stack
COSTLY = frozenset(
    [
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "tanh",
        "erf",
        "erfc",
        "gelu",
        "gelu_tanh",
        "silu",
        "sigmoid",
        "sin",
        "cos",
        "tan",
        "pow",
        "sqrt",
        "rsqrt",
        "div",
        "atan2",
        "fmod",
        "remainder",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "asinh",
        "acosh",
        "atanh",
        "lgamma",
        "floordiv",
        "intdiv",
    ]
)


@dataclass(frozen=True)
class Loop:
    """``var`` over ``[0, var.size)``, cut off at ``limit`` where the last tile is partial."""

    var: Var
    limit: Index | None = None


@dataclass(frozen=True)
class Target:
    """Where a result goes: "scalar" local, "row" buffer local, "private" per-thread buffer, "global" tensor."""

    kind: str
    name: str
    index: Index
    dtype: str


@dataclass(frozen=True)
class Item:
    """One result in a stage's loops. With ``op``: a reduction over the loops in ``reduced``; with ``scan``: a scan.

    The reduction ``one_pass.SUM_EXP`` stands next to the "max" of the same values in a stage of their own.
    """

    node: Node
    expr: Expr
    target: Target
    op: str | None
    reduced: frozenset[Var]
    scan: Var | None = None


@dataclass(frozen=True)
class Stage:
    """One inner loop nest of an outer iteration."""

    loops: tuple[Loop, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Local:
    """A buffer of ``size`` elements, one per outer iteration ("row") or per thread ("private", with its op)."""

    name: str
    dtype: str
    size: int
    op: str | None = None


@dataclass(frozen=True)
class Nest:
    """What one kernel does."""

    name: str
    outer: tuple[Loop, ...]
    stages: tuple[Stage, ...]
    rows: tuple[Local, ...]
    private: tuple[Local, ...]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    work: int
    bytes: int
    group: Group
    origins: tuple[str, ...]

    @property
    def parallel(self) -> bool:
        return self.work >= 2 * self.group.grain


Binding = dict[Var, Index]


class Builder:
    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        self.graph = graph
        self.group = group
        self.visible = visible
        self.nodes: dict[str, Node] = {}
        for name in group.nodes:
            step = graph.steps[name]
            assert isinstance(step, Node)
            self.nodes[name] = step
        pairs = one_pass.find(self.nodes) if group.one_pass else []
        if group.one_pass and not pairs:
            raise Illegal("no statistics that one pass could give")
        kept = set(group.staged) - one_pass.late(self.nodes, pairs) | visible
        self.kept = {n: d for n, d in self.nodes.items() if not d.pointwise or n in kept}
        self.resolved: dict[str, Expr] = {}
        self.limits: dict[Var, Index] = {}
        self.outer: tuple[Var, ...] = ()
        self.bound: dict[str, Binding] = {}
        for name, node in self.nodes.items():
            self.resolved[name] = Rewriter(load=self._inline).expr(node.expr)
        self.online: dict[str, str] = {}  # an online sum of exponentials -> its maximum
        self._take_in_one_pass(pairs)

    def _inline(self, load: Load) -> Expr:
        if load.buffer not in self.nodes or load.buffer in self.kept:
            return load
        node = self.nodes[load.buffer]
        return Rewriter(dict(zip(node.vars, load.index))).expr(self.resolved[load.buffer])

    def _take_in_one_pass(self, pairs: list[one_pass.Variance | one_pass.Softmax]) -> None:
        """Change how pairs of reductions are computed, and what reads them: see ``one_pass``."""
        for pair in pairs:
            if isinstance(pair, one_pass.Softmax):
                self._read_as({pair.total}, partial(one_pass.settled, pair))
                self._reduce_instead(pair.total, self.resolved[pair.top], one_pass.SUM_EXP)
                self.online[pair.total] = pair.top
            else:
                first, value = self.nodes[pair.total], self.resolved[pair.total]
                far = one_pass.distance(first, value)
                self._read_as(
                    {pair.total, pair.squares}, partial(one_pass.restored, pair, node=first, value=value)
                )
                self._reduce_instead(pair.total, far, "sum")
                self._reduce_instead(pair.squares, Op("mul", (far, far), "f64"), "sum")

    def _read_as(self, names: set[str], restored: Callable[[Load], Expr]) -> None:
        if names & self.visible:
            raise Illegal("another nest reads what one pass does not give")
        rewriter = Rewriter(load=lambda load: restored(load) if load.buffer in names else load)
        for name in self.resolved:
            self.resolved[name] = rewriter.expr(self.resolved[name])

    def _reduce_instead(self, name: str, expr: Expr, op: str) -> None:
        self.resolved[name] = expr
        self.kept[name] = replace(self.kept[name], reduction=op, dtype=expr.dtype)

    # --------------------------------------------------------------------------------------- building

    def build(self) -> Nest:
        if not self.kept:
            raise Illegal("nothing to compute")
        reducing = [n for n in self.kept.values() if not n.pointwise]
        if self.group.anchor or reducing:
            self._bind_rows(reducing)
        else:
            self._bind_pointwise()
        for name in self.kept:
            self._check(name)
        nest = self._nest()
        if len(self.nodes) > 1 and reducing and nest.parallel and not nest.outer:
            raise Illegal("together they would run on one thread")
        return nest

    def _bind_pointwise(self) -> None:
        """All nodes run over one domain: that of the first of highest rank; the others are reindexed."""
        first = max(self.kept.values(), key=lambda n: sum(s != 1 for s in n.shape))
        domain = [v for v in first.vars if v.size != 1]
        variables = [Var(f"i{k}", v.size) for k, v in enumerate(domain)]
        flat = constant(0)
        step = 1
        for var in reversed(variables):
            flat = flat + of(var) * step
            step *= var.size
        for name, node in self.kept.items():
            if node.numel != first.numel:
                raise Illegal(f"{name} has another number of elements than {first.name}")
            binding: Binding = {}
            step = 1
            for var in reversed(node.vars):
                if var.size != 1:
                    binding[var] = (flat // step) % var.size
                    if any(isinstance(a, Quotient) for a, _ in binding[var].terms):
                        raise Illegal(f"{name} runs over another shape than {first.name}")
                    step *= var.size
            self.bound[name] = binding

    def _bind_rows(self, reducing: list[Node]) -> None:
        if self.group.anchor:
            if self.group.anchor not in self.kept:
                raise Illegal("the anchor is not computed here")
            self._bind(self.kept[self.group.anchor], self.group.outer)
            return
        reasons = []
        for node in reducing:
            for outer in outer_choices(self.graph, node, self.resolved[node.name]):
                try:
                    self._bind(node, outer)
                    self.group = replace(self.group, anchor=node.name, outer=outer)
                    return
                except Illegal as reason:
                    reasons.append(str(reason))
        raise Illegal(reasons[0])

    def _bind(self, anchor: Node, outer: tuple[tuple[int, int], ...]) -> None:
        self.bound = {}
        self.limits = {}
        loops = (*anchor.vars, *anchor.rvars)
        binding: Binding = {}
        variables = []
        for k, (position, tile) in enumerate(outer):
            if position >= len(loops) or loops[position].size == 1:
                raise Illegal("no such loop")
            var = loops[position]
            if tile == 1:
                outside = Var(f"o{k}", var.size)
                binding[var] = of(outside)
            else:
                if tile >= var.size:
                    raise Illegal("the tile is the whole loop")
                outside = Var(f"o{k}", -(-var.size // tile))
                binding[var] = self._tiled(outside, var, tile, anchor.name)
            variables.append(outside)
        self.outer = tuple(variables)
        self.bound[anchor.name] = binding
        pending = [n for n in self.kept if n != anchor.name]
        hints = self._hints(anchor.name)
        while pending:
            progress = [n for n in pending if self._try_bind(n)]
            if not progress:
                progress = [n for n in pending if self._bind_by_inputs(n, hints)][:1]
            if not progress:
                raise Illegal(f"{pending[0]} does not share the outer loops of {anchor.name}")
            for name in progress:
                hints.update(self._hints(name))
            pending = [n for n in pending if n not in progress]

    def _tiled(self, outside: Var, var: Var, tile: int, owner: str) -> Index:
        inside = Var(f"{owner}.{var.name}", tile)
        if var.size % tile:
            self.limits[inside] = of(outside) * -tile + var.size
        return of(outside) * tile + of(inside)

    def _covered(self, binding: Binding) -> bool:
        used = {a for index in binding.values() for a, _ in index.terms}
        return all(o in used for o in self.outer)

    def _try_bind(self, name: str) -> bool:
        """Bind ``name`` through loads between it and nodes that are bound; False if they do not reach it."""
        node = self.kept[name]
        binding: Binding = {}
        for load in _loads(self.resolved[name]):
            if load.buffer in self.bound and load.buffer in self.kept:
                producer = self.kept[load.buffer]
                for var, index in zip(producer.vars, load.index):
                    self._match(name, node, binding, index, self.bound[producer.name].get(var))
        for other, found in list(self.bound.items()):
            for load in _loads(self.resolved[other]):
                if load.buffer == name:
                    outer_only = dict(found)
                    for var, index in zip(node.vars, Rewriter(outer_only).indices(load.index)):
                        self._match_back(name, binding, var, index)
        if not self._covered(binding):
            return False
        self.bound[name] = binding
        return True

    def _match(self, name: str, node: Node, binding: Binding, index: Index, wanted: Index | None) -> None:
        """``index`` (over the node's own loops) must equal ``wanted`` in its outer part: bind a loop so."""
        if wanted is None or not any(a in self.outer for a, _ in wanted.terms):
            return
        found = Rewriter(binding).index(index)
        outside, rest = self._parts(wanted)
        if self._parts(found)[0] == outside:
            return
        (atom, factor) = outside.terms[0]
        assert isinstance(atom, Var)
        if len(outside.terms) != 1 or len(found.terms) != 1 or found.const or found.terms[0][1] != 1:
            raise Illegal(f"{name} reads across outer iterations")
        own = found.terms[0][0]
        if isinstance(own, Var) and not rest.terms:
            if own.size != atom.size or own in binding:
                raise Illegal(f"{name} reads across outer iterations")
            binding[own] = of(atom)
        elif isinstance(own, Var):
            inside = rest.terms[0][0]
            assert isinstance(inside, Var)
            if own in binding or (own.size + factor - 1) // factor != atom.size:
                raise Illegal(f"{name} reads across outer iterations")
            binding[own] = self._tiled(atom, own, factor, name) if factor == inside.size else of(atom)
        elif type(own) is Quotient and factor == 1 and not rest.terms:
            self._split(name, binding, own.index, own.divisor, atom)
        else:
            raise Illegal(f"{name} reads across outer iterations")

    def _split(self, name: str, binding: Binding, index: Index, divisor: int, atom: Var) -> None:
        """Bind ``index // divisor`` to ``atom`` where ``index`` is one loop."""
        own = index.terms[0][0] if len(index.terms) == 1 and not index.const else None
        if not isinstance(own, Var) or index.terms[0][1] != 1 or own in binding:
            raise Illegal(f"{name} cannot be split")
        if own.size != divisor * atom.size:
            raise Illegal(f"{name} cannot be split evenly")
        binding[own] = of(atom) * divisor + of(Var(f"{name}.{own.name}", divisor))

    def _match_back(self, name: str, binding: Binding, var: Var, index: Index) -> None:
        """A bound user reads this node at ``index``: the outer part must be this node's own."""
        outside, rest = self._parts(index)
        if not outside.terms or var in binding or var.size == 1:
            return
        (atom, factor) = outside.terms[0]
        assert isinstance(atom, Var)
        if len(outside.terms) != 1 or outside.const or rest.const:
            raise Illegal(f"{name} is read across outer iterations")
        if factor == 1 and not rest.terms and var.size == atom.size:
            binding[var] = of(atom)
        elif rest.terms and -(-var.size // factor) == atom.size and bounds(rest) <= (0, factor - 1):
            binding[var] = self._tiled(atom, var, factor, name)
        else:
            raise Illegal(f"{name} is read across outer iterations")

    def _parts(self, index: Index) -> tuple[Index, Index]:
        outside = [(a, c) for a, c in index.terms if a in self.outer]
        inside = [(a, c) for a, c in index.terms if a not in self.outer]
        return linear(0, outside), linear(index.const, inside)

    def _hints(self, name: str) -> dict[tuple[str, int], Index]:
        """How this bound node reads tensors from outside the group: (buffer, dimension) -> index."""
        found: dict[tuple[str, int], Index] = {}
        rewriter = Rewriter(self.bound[name])
        for load in _loads(self.resolved[name]):
            if load.buffer not in self.nodes:
                for k, index in enumerate(rewriter.indices(load.index)):
                    if any(a in self.outer for a, _ in index.terms):
                        found[load.buffer, k] = index
        node = self.kept[name]
        for k, var in enumerate(node.vars):
            if var in self.bound[name]:
                found[f"shape{node.shape}", k] = self.bound[name][var]
        return found

    def _bind_by_inputs(self, name: str, hints: dict[tuple[str, int], Index]) -> bool:
        """Bind a node that shares only inputs (or its shape) with the bound ones."""
        node = self.kept[name]
        for use_shape in (False, True):
            binding: Binding = {}
            try:
                if use_shape:
                    shape = f"shape{node.shape}"
                    for k, var in enumerate(node.vars):
                        self._match(name, node, binding, of(var), hints.get((shape, k)))
                else:
                    for load in _loads(self.resolved[name]):
                        for k, index in enumerate(load.index):
                            self._match(name, node, binding, index, hints.get((load.buffer, k)))
            except Illegal:
                continue
            if self._covered(binding):
                self.bound[name] = binding
                return True
        return False

    def _check(self, name: str) -> None:
        """Every in-group read stays in its own outer iteration, and no read sees an unfinished reduction."""
        rewriter = Rewriter(self.bound[name])
        for node in walk(self.resolved[name]):
            if isinstance(node, Search) and node.buffer in self.nodes:
                raise Illegal("a search needs the whole tensor")
        for load in _loads(self.resolved[name]):
            if load.buffer not in self.kept:
                continue
            producer = self.kept[load.buffer]
            if self._privatised(producer):
                raise Illegal(f"{name} needs the finished {producer.name}")
            for var, index in zip(producer.vars, rewriter.indices(load.index)):
                home = self.bound[producer.name].get(var)
                if home is None or not any(a in self.outer for a, _ in home.terms):
                    continue
                outside, rest = self._parts(index)
                home_outside, home_rest = self._parts(home)
                low, high = bounds(rest)
                if outside != home_outside or (low, high) < (0, 0) or high > bounds(home_rest)[1]:
                    raise Illegal(f"{name} reads {producer.name} across outer iterations")
                if low < 0:
                    raise Illegal(f"{name} reads {producer.name} across outer iterations")

    def _privatised(self, node: Node) -> bool:
        binding = self.bound[node.name]
        return any(a in self.outer for r in node.rvars if r in binding for a, _ in binding[r].terms)

    # ------------------------------------------------------------------------------------------ stages

    def _nest(self) -> Nest:
        inner: dict[str, tuple[Loop, ...]] = {}
        values: dict[str, Expr] = {}
        places: dict[str, Binding] = {}
        for name, node in self.kept.items():
            binding = dict(self.bound[name])
            for var in (*node.vars, *node.rvars):
                if var not in binding:
                    binding[var] = of(Var(f"{name}.{var.name}", var.size)) if var.size != 1 else constant(0)
            places[name] = binding
            values[name] = Rewriter(binding).expr(self.resolved[name])
            inner[name] = self._order(name, node, binding, values[name])
        levels = self._levels(inner, values, places)
        merged: list[tuple[int, tuple[Loop, ...], list[str]]] = []
        for name in self.kept:
            for level, loops, members in merged:
                if (
                    level == levels[name]
                    and self._same_loops(loops, inner[name])
                    and self._joins(name, members)
                ):
                    members.append(name)
                    break
            else:
                merged.append((levels[name], inner[name], [name]))
        merged.sort(key=lambda m: m[0])
        return self._assemble(merged, inner, values, places)

    def _joins(self, name: str, members: list[str]) -> bool:
        pairs = {*self.online, *self.online.values()}
        if name in pairs or not pairs.isdisjoint(members):
            return self.online.get(name) in members and len(members) == 1
        node = self.kept[name]
        return node.scan is None and all(self.kept[m].scan is None for m in members)

    def _same_loops(self, a: tuple[Loop, ...], b: tuple[Loop, ...]) -> bool:
        def limits(loops: tuple[Loop, ...]) -> list[tuple[int, Index | None]]:
            return [(x.var.size, x.limit) for x in loops]

        return limits(a) == limits(b)

    def _order(self, name: str, node: Node, binding: Binding, value: Expr) -> tuple[Loop, ...]:
        """The node's inner loops, outermost first: by descending stride of what it touches."""
        variables: dict[Var, None] = {}
        for var in (*node.vars, *node.rvars):
            for atom, _ in binding[var].terms:
                if isinstance(atom, Var) and atom not in self.outer:
                    variables[atom] = None
        weight = {v: self._stride_weight(v, node, binding, value) for v in variables}
        ordered = sorted(variables, key=lambda v: weight[v], reverse=True)
        if self.group.order and len(ordered) > self.group.order:
            ordered.append(ordered.pop(len(ordered) - 1 - self.group.order))
        return tuple(Loop(v, self.limits.get(v)) for v in ordered)

    def _stride_weight(self, var: Var, node: Node, binding: Binding, value: Expr) -> tuple[float, int]:
        """Mean stride over the accesses that move with ``var``; unit strides pull it innermost."""
        strides = []
        for load in _loads(value):
            flat = self._flat(load.buffer, load.index)
            size = self._numel(load.buffer)
            stride = flat.coefficient(var)
            if stride:
                strides.append((abs(stride), size))
        out = linear(
            0, [t for v, s in zip(node.vars, _contiguous(node.shape)) for t in (binding[v] * s).terms]
        )
        if out.coefficient(var) and (node.name in self.visible or not strides):
            strides.append((out.coefficient(var), node.numel))
        if not strides:
            return 0.5, 0
        total = sum(size for _, size in strides)
        return sum(math.log2(s) * size for s, size in strides) / total, -var.size

    def _flat(self, buffer: str, index: tuple[Index, ...]) -> Index:
        stride = self.graph.buffers[buffer].stride
        total = constant(0)
        for i, s in zip(index, stride):
            total = total + i * s
        return total

    def _numel(self, buffer: str) -> int:
        return max(self.graph.buffers[buffer].numel, 1)

    def _levels(
        self, inner: dict[str, tuple[Loop, ...]], values: dict[str, Expr], places: dict[str, Binding]
    ) -> dict[str, int]:
        """Stage numbers: one more than what a node needs finished; a value made in the same loops is not waited for."""
        levels: dict[str, int] = {}
        for name in self.kept:
            level = 0
            for load in _loads(values[name]):
                if load.buffer not in self.kept:
                    continue
                producer = self.kept[load.buffer]
                forwarded = (
                    producer.pointwise
                    and self.kept[name].scan is None
                    and self._same_loops(inner[producer.name], inner[name])
                    and self._same_place(inner[producer.name], inner[name], producer, load, places)
                )
                level = max(level, levels[producer.name] + (0 if forwarded else 1))
            levels[name] = level
        return levels

    def _same_place(
        self,
        there: tuple[Loop, ...],
        here: tuple[Loop, ...],
        producer: Node,
        load: Load,
        places: dict[str, Binding],
    ) -> bool:
        rename = Rewriter({a.var: of(b.var) for a, b in zip(there, here)})
        made = tuple(rename.index(places[producer.name][v]) for v in producer.vars)
        return made == load.index

    def _assemble(
        self,
        merged: list[tuple[int, tuple[Loop, ...], list[str]]],
        inner: dict[str, tuple[Loop, ...]],
        values: dict[str, Expr],
        places: dict[str, Binding],
    ) -> Nest:
        rows: dict[str, Local] = {}
        private: dict[str, Local] = {}
        targets: dict[str, Target] = {}
        for name, node in self.kept.items():
            targets[name] = self._target(node, places[name], rows, private)
        if sum(r.size * BYTES[r.dtype] for r in rows.values()) > ROW_BYTES:
            raise Illegal("the buffers of one outer iteration exceed a thread's stack")
        stages = []
        work = 0
        for _, loops, members in merged:
            names = _loop_names(loops, self.graph.buffers)
            shared = tuple(Loop(new, loop.limit) for loop, new in zip(loops, names))
            items = []
            done: dict[str, Expr] = {}
            for name in members:
                node = self.kept[name]
                rename = {a.var: of(b) for a, b in zip(inner[name], names)}
                rewriter = Rewriter(rename, self._reader(targets, done))
                expr = rewriter.expr(values[name])
                if self.group.reciprocal:
                    expr = multiplied(expr, frozenset(names))
                target = targets[name]
                target = replace(target, index=Rewriter(rename).index(target.index))
                reduced = frozenset(
                    b for a, b in zip(inner[name], names) if self._is_reduced(node, places[name], a.var)
                )
                if name in self.online:
                    along = len(reduced) == len(shared) and all(loop.limit is None for loop in shared)
                    if not along or members != [self.online[name], name]:
                        raise Illegal("an online sum of exponentials runs along one row")
                scan = None
                if node.scan is not None:
                    own = {a for a, _ in places[name][node.vars[node.scan]].terms}
                    scan = next((b for a, b in zip(inner[name], names) if a.var in own), None)
                    if scan is None or any(o in own for o in self.outer):
                        raise Illegal("a scan runs inside")
                op = node.reduction if node.scan is None else None
                items.append(
                    Item(node, expr, target, node.reduction if scan is not None else op, reduced, scan)
                )
                if node.pointwise:
                    done[name] = expr
                work += _cost(expr) * math.prod(max(loop.var.size, 1) for loop in shared)
            stage = Stage(shared, tuple(items))
            stages.extend(peeled(stage) if self.group.peel else [stage])
        work *= math.prod(o.size for o in self.outer)
        reads, writes = self._memory(stages)
        total = sum(b.numel * BYTES[b.dtype] for b in (*reads, *writes))
        origins = tuple(dict.fromkeys(n.origin for n in self.nodes.values()))
        return Nest(
            self._title(), tuple(Loop(o) for o in self.outer), tuple(stages), tuple(rows.values()),
            tuple(private.values()), reads, writes, work, total, self.group, origins,
        )  # fmt: skip

    def _title(self) -> str:
        made = [n for n in self.kept if n in self.visible]
        return made[-1]

    def _is_reduced(self, node: Node, place: Binding, var: Var) -> bool:
        return any(var is a for r in node.rvars for a, _ in place[r].terms)

    def _target(
        self, node: Node, place: Binding, rows: dict[str, Local], private: dict[str, Local]
    ) -> Target:
        flat = constant(0)
        for var, stride in zip(node.vars, _contiguous(node.shape)):
            flat = flat + place[var] * stride
        if self._privatised(node):
            if node.name not in self.visible:
                raise Illegal("nobody reads the reduction")
            dtype = compute_dtype(node.dtype)
            if dtype == "f32" and node.numel <= 16 and node.reduction == "sum":
                dtype = "f64"  # few sums of very many terms
            private[node.name] = Local(node.name, dtype, max(node.numel, 1), node.reduction)
            return Target("private", node.name, flat, dtype)
        if node.name in self.visible:
            return Target("global", node.name, flat, node.dtype)
        dtype = compute_dtype(node.dtype)
        local = constant(0)
        step = 1
        for var in reversed(node.vars):
            rest = self._parts(place[var])[1]
            if rest.terms:
                local = local + rest * step
                step *= bounds(rest)[1] + 1
        if step == 1:
            return Target("scalar", node.name, constant(0), dtype)
        rows[node.name] = Local(node.name, dtype, step)
        return Target("row", node.name, local, dtype)

    def _reader(self, targets: dict[str, Target], done: dict[str, Expr]):  # type: ignore[no-untyped-def]
        """Turns loads of in-group values into reads of where they are: this loop's value, a local, or memory."""

        def read(load: Load) -> Expr:
            if load.buffer in done:
                return done[load.buffer]
            target = targets.get(load.buffer)
            if target is None or target.kind == "global":
                return Load(load.buffer, (self._flat(load.buffer, load.index),), load.dtype)
            if target.kind == "scalar":
                return Load(load.buffer, (), target.dtype)
            local = constant(0)
            step = 1
            node = self.kept[load.buffer]
            for var, index in zip(reversed(node.vars), reversed(load.index)):
                home = self.bound[node.name].get(var)
                limit = var.size
                if home is not None and any(a in self.outer for a, _ in home.terms):
                    index = self._parts(index)[1]
                    limit = bounds(self._parts(home)[1])[1] + 1
                if limit > 1:
                    local = local + index * step
                    step *= limit
            return Load(load.buffer, (local,), target.dtype)

        return read

    def _memory(self, stages: list[Stage]) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
        reads: dict[str, Buffer] = {}
        writes: dict[str, Buffer] = {}
        for stage in stages:
            for item in stage.items:
                for node in walk(item.expr):
                    if isinstance(node, (Load, Search)) and node.buffer not in self.nodes:
                        reads[node.buffer] = self.graph.buffers[node.buffer]
        for name in self.kept:
            if name in self.visible:
                writes[name] = self.graph.buffers[name]
        return tuple(reads.values()), tuple(writes.values())


def multiplied(expr: Expr, loops: frozenset[Var]) -> Expr:
    """``expr`` with divisions by what ``loops`` do not change as products with the reciprocal."""
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in memo:
            if isinstance(node, Op):
                args = tuple(visit(a) for a in node.args)
                one = Const(1.0, node.dtype)
                divides = node.name == "div" and node.dtype in ("f32", "f64") and args[0] is not one
                if divides and not _moves(args[1], loops):
                    inverse = Op("div", (one, args[1]), node.dtype)
                    memo[node] = Op("mul", (args[0], inverse), node.dtype)
                else:
                    memo[node] = Op(node.name, args, node.dtype)
            else:
                memo[node] = node
        return memo[node]

    return visit(expr)


def _moves(expr: Expr, loops: frozenset[Var]) -> bool:
    return any(n in loops for n in walk(expr) if isinstance(n, Var))


MAX_PIECES = 27


def peeled(stage: Stage) -> list[Stage]:
    """``stage`` cut along its output loops into pieces inside of which index tests are decided."""
    pieces = [stage]
    for position in range(len(stage.loops)):
        cut = [part for piece in pieces for part in _cut(piece, position)]
        if len(cut) <= MAX_PIECES:
            pieces = cut
    return pieces


def _cut(stage: Stage, position: int) -> list[Stage]:
    loop = stage.loops[position]
    var = loop.var
    if loop.limit is not None or any(var in i.reduced or var is i.scan for i in stage.items):
        return [stage]
    edges = {0, var.size}
    for item in stage.items:
        for test in walk(item.expr):
            if isinstance(test, InRange) and (step := test.index.coefficient(var)):
                rest = test.index - of(var) * step
                if any(not isinstance(a, Var) for a, _ in test.index.terms):
                    continue
                low, high = bounds(rest)
                for limit in (test.low - low, test.low - high, test.high - low, test.high - high):
                    edge = -(-limit // step)
                    if 0 < edge < var.size:
                        edges.add(edge)
    ordered = sorted(edges)
    if len(ordered) == 2:
        return [stage]
    parts = []
    for first, last in zip(ordered, ordered[1:]):
        piece = Var(var.name, last - first)
        change = Rewriter({var: of(piece) + first})
        items = tuple(
            replace(
                item,
                expr=change.expr(item.expr),
                target=replace(item.target, index=change.index(item.target.index)),
            )
            for item in stage.items
        )
        loops = (*stage.loops[:position], Loop(piece), *stage.loops[position + 1 :])
        parts.append(Stage(loops, items))
    return parts


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
    for load in _loads(expr):
        buffer = graph.buffers[load.buffer]
        flat = constant(0)
        for i, s in zip(load.index, buffer.stride):
            flat = flat + i * s
        for k, var in enumerate(loops):
            if flat.coefficient(var) == 1 and buffer.numel > largest and var.size > 1:
                best, largest = k, buffer.numel
    return best


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    from ke_gym.codegen.graph import contiguous_stride

    return contiguous_stride(shape)


def _loads(expr: Interned) -> list[Load]:
    return [n for n in walk(expr) if isinstance(n, Load)]


def _loop_names(loops: tuple[Loop, ...], taken: Container[str]) -> list[Var]:
    """Names for the loops that no tensor has."""
    names = (name for name in (*"ijklmnpq", *(f"i{k}" for k in range(99))) if name not in taken)
    return [Var(name, loop.var.size) for name, loop in zip(names, loops)]


def _cost(expr: Expr) -> int:
    return sum(
        (12 if n.name in COSTLY else 1) if isinstance(n, Op) else 1
        for n in walk(expr)
        if isinstance(n, (Op, Load))
    )
