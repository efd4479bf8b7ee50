"""The nodes of a group, bound to outer loops that they share; ``Illegal`` when they cannot share them.

The outer loops come from one node, the anchor. Every other node of the group is bound to them by following
loads: if a node reads ``mean[i // 8]`` and ``mean``'s only loop is the outer loop ``o``, then ``i`` is split
into ``8 * o + j``. What is not bound stays inside an outer iteration. Nodes that reduce over an outer loop
are privatised: each thread accumulates on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ke_gym.codegen import one_pass
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Expr,
    Index,
    Load,
    Op,
    Quotient,
    Rewriter,
    Search,
    Var,
    bounds,
    constant,
    linear,
    loads,
    of,
    walk,
)
from ke_gym.codegen.graph import Graph, Node, contiguous_stride
from ke_gym.codegen.nest import Loop
from ke_gym.codegen.schedule import Group

Binding = dict[Var, Index]


class Binder:
    """Binds the nodes of ``group``; ``visible`` are those whose values others read."""

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
        used = [a for index in binding.values() for a, _ in index.terms]
        return all(used.count(o) == 1 for o in self.outer)  # two loops bound to one would be its diagonal

    def _try_bind(self, name: str) -> bool:
        """Bind ``name`` through loads between it and nodes that are bound; False if they do not reach it."""
        node = self.kept[name]
        binding: Binding = {}
        for load in loads(self.resolved[name]):
            if load.buffer in self.bound and load.buffer in self.kept:
                producer = self.kept[load.buffer]
                for var, index in zip(producer.vars, load.index):
                    self._match(name, node, binding, index, self.bound[producer.name].get(var))
        for other, found in list(self.bound.items()):
            for load in loads(self.resolved[other]):
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
            self._place(binding, own, of(atom))
        elif isinstance(own, Var):
            inside = rest.terms[0][0]
            if (
                not isinstance(inside, Var)
                or own in binding
                or (own.size + factor - 1) // factor != atom.size
            ):
                raise Illegal(f"{name} reads across outer iterations")
            self._place(
                binding, own, self._tiled(atom, own, factor, name) if factor == inside.size else of(atom)
            )
        elif type(own) is Quotient and factor == 1 and not rest.terms:
            self._split(name, binding, own.index, own.divisor, atom)
        else:
            raise Illegal(f"{name} reads across outer iterations")

    def _place(self, binding: Binding, own: Var, index: Index) -> None:
        """Bind the loop ``own``; if it is what a split left of a loop, that loop is bound through it."""
        split = [var for var, place in binding.items() if place.coefficient(own)]
        for var in split:
            binding[var] = Rewriter({own: index}).index(binding[var])
        if not split:
            binding[own] = index

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
        for load in loads(self.resolved[name]):
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
                    for load in loads(self.resolved[name]):
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
        for load in loads(self.resolved[name]):
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

    def _order(self, node: Node, binding: Binding, value: Expr) -> tuple[Loop, ...]:
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
        for load in loads(value):
            flat = self._flat(load.buffer, load.index)
            size = self._numel(load.buffer)
            stride = flat.coefficient(var)
            if stride:
                strides.append((abs(stride), size))
        out = linear(
            0, [t for v, s in zip(node.vars, contiguous_stride(node.shape)) for t in (binding[v] * s).terms]
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
