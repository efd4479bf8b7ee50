"""A group of nodes under its schedule -> a loop nest.

Building is the legality test: it raises ``Illegal`` when the group's nodes cannot share their outer loops
(``binding.py``). What is not bound to them stays inside, as the stages of one outer iteration. Nodes that reduce
over an outer loop accumulate into a buffer private to each thread, combined after the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import replace

from ke_gym.codegen.binding import Binder, Binding
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    BYTES,
    Expr,
    Index,
    Load,
    Op,
    Rewriter,
    Search,
    Var,
    bounds,
    compute_dtype,
    constant,
    loads,
    of,
    walk,
)
from ke_gym.codegen.graph import Buffer, Node, contiguous_stride
from ke_gym.codegen.nest import COSTLY, ROW_BYTES, Item, Local, Loop, Nest, Stage, Target
from ke_gym.codegen.outer_loops import outer_choices
from ke_gym.codegen.peel import peeled
from ke_gym.codegen.reciprocals import magnitudes, multiplied


class Builder(Binder):
    """Builds the ``Nest`` of a group."""

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
            inner[name] = self._order(node, binding, values[name])
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

    def _levels(
        self, inner: dict[str, tuple[Loop, ...]], values: dict[str, Expr], places: dict[str, Binding]
    ) -> dict[str, int]:
        """Stage numbers: one more than what a node needs finished; a value made in the same loops is not waited for."""
        levels: dict[str, int] = {}
        for name in self.kept:
            level = 0
            for load in loads(values[name]):
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
                    expr = multiplied(expr, frozenset(names), magnitudes(self.nodes))
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
        for var, stride in zip(node.vars, contiguous_stride(node.shape)):
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

    def _reader(self, targets: dict[str, Target], done: dict[str, Expr]) -> Callable[[Load], Expr]:
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
