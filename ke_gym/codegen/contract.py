"""A contraction and the pointwise nodes around it, under one schedule -> one call of a blocked template.

Nodes that read the product where it is made become the epilogue: they see a strip of finished sums in
registers instead of a tensor in memory. Nodes that make the left operand and are used nowhere else become the
prologue. Reductions over the columns of a product are taken strip by strip, if its rows come in order.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ke_gym.codegen import contraction as templates
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Expr,
    Index,
    Indirect,
    Load,
    Op,
    Quotient,
    Rewriter,
    Var,
    cast,
    compute_dtype,
    constant,
    of,
    walk,
)
from ke_gym.codegen.graph import Buffer, Extern, Graph, Node, View
from ke_gym.codegen.schedule import Group

GEMM = ("aten.mm.default", "aten.bmm.default")
BIASED = "aten.addmm.default"  # of half precision, rounded once: after the bias
CONVOLUTION = "aten.convolution.default"
BAGS = ("aten._embedding_bag.default", "aten._embedding_bag_forward_only.default")
KINDS = {
    **dict.fromkeys((*GEMM, BIASED), "gemm"),
    CONVOLUTION: "conv",
    **dict.fromkeys(BAGS, "bag"),
}

STRIP = Var("j", 1 << 40)  # counts the elements of one strip; Var("at", ...) is their column or position

Problem = templates.GemmProblem | templates.ConvProblem | templates.AttentionProblem | templates.BagProblem
Choices = (
    templates.GemmSchedule | templates.ConvSchedule | templates.AttentionSchedule | templates.BagSchedule
)


@dataclass(frozen=True)
class Contraction:
    """What one kernel with a contraction does: a statement of the template, its epilogue and prologue items."""

    name: str
    step: Extern
    problem: Problem
    choices: Choices
    operands: tuple[View, ...]
    epilogue: tuple[Store, ...]
    prologue: Expr | None
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    group: Group
    origins: tuple[str, ...]
    vector_bytes: int
    score: Expr | None = None  # of attention: what becomes of the products of a query with some keys

    @property
    def kind(self) -> str:
        if isinstance(self.problem, templates.AttentionProblem):
            return "attention"
        return KINDS[self.step.target]

    def knobs(self) -> templates.Knobs:
        """Legal values of the template's knobs here."""
        if isinstance(self.problem, templates.GemmProblem):
            in_order = any(store.op for store in self.epilogue)
            return templates.GemmSchedule.choices(self.problem, self.vector_bytes, in_order)
        choices: templates.Knobs = _templates(self.problem).choices(self.problem, self.vector_bytes)
        return choices


def _templates(problem: Problem) -> Any:
    if isinstance(problem, templates.AttentionProblem):
        return templates.AttentionSchedule
    if isinstance(problem, templates.BagProblem):
        return templates.BagSchedule
    return templates.ConvSchedule


@dataclass(frozen=True)
class Store:
    """``buffer[index] = expr`` for each element of a strip; with ``op`` a reduction over the columns of a row."""

    buffer: str
    dtype: str
    index: Index
    expr: Expr
    op: str | None = None


def problem_of(graph: Graph, step: Extern, precision: str) -> Problem:
    """The contraction's sizes and strides; ``Illegal`` if the templates do not cover it."""
    if step.kwargs:
        raise Illegal("a scaled product")
    if step.target in (*GEMM, BIASED):
        a, b = step.args[-2:]
        dtypes = [graph.buffers[v.buffer].dtype for v in (a, b)]
        if dtypes[0] not in ("f32", "f64", "bf16", "f16") or dtypes[0] != dtypes[1]:
            raise Illegal("operands of this dtype")
        return templates.GemmProblem(
            m=a.shape[-2], n=b.shape[-1], k=a.shape[-1], a_strides=a.stride, b_strides=b.stride,
            batch=a.shape[:-2], a_dtype=dtypes[0], b_dtype=dtypes[1], precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip
    if step.target == CONVOLUTION:
        x, w, _, stride, padding, dilation, transposed, _, groups = step.args
        buffers = [graph.buffers[v.buffer] for v in (x, w)]
        plain = w.offset == 0 and w.stride == _contiguous(w.shape)
        if transposed or not plain or any(b.dtype not in ("f32", "f64", "bf16", "f16") for b in buffers):
            raise Illegal("this kind of convolution")
        rank = len(x.shape) - 2
        return templates.ConvProblem(
            batch=x.shape[0], in_channels=x.shape[1], out_channels=w.shape[0], size=x.shape[2:], kernel=w.shape[2:],
            stride=_spread(stride, rank), padding=_spread(padding, rank), dilation=_spread(dilation, rank),
            x_strides=x.stride, groups=groups, x_dtype=buffers[0].dtype, w_dtype=buffers[1].dtype,
            precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip
    if step.target in BAGS:
        return bag_problem(graph, step)
    raise Illegal("no template")


def bag_problem(graph: Graph, step: Extern) -> templates.BagProblem:
    """What a call of ATen's embedding bag computes. Raises ``Illegal`` for lists that are strided, or of other dtypes."""
    names = ("scale", "mode", "sparse", "weights", "closed", "padding")
    given: dict[str, Any] = dict(zip(names, (False, 0, False, None, False, -1)))
    given.update(zip(names, step.args[3:]))
    table, ids, offsets = step.args[:3]
    dtype = graph.buffers[table.buffer].dtype
    lists = [v for v in (ids, offsets, given["weights"]) if v is not None]
    if dtype not in ("f32", "f64") or any(v.stride != (1,) for v in lists):
        raise Illegal("this kind of bag")
    weights = given["weights"]
    kinds = [graph.buffers[v.buffer].dtype for v in (ids, offsets)]
    if (
        kinds[0] != kinds[1]
        or (weights and graph.buffers[weights.buffer].dtype != dtype)
        or table.stride[1] != 1
    ):
        raise Illegal("bags of these dtypes")
    return templates.BagProblem(
        offsets.shape[0] - bool(given["closed"]), ids.shape[0], table.shape[1], table.stride[0],
        ("sum", "mean", "max")[given["mode"]], dtype, weights is not None, bool(given["closed"]), given["padding"],
    )  # fmt: skip


def vector_bytes() -> int:
    """Width of this machine's vectors, which the templates' register tiles are chosen for."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": 64, "AVX2": 32}.get(capability, 16)


def _spread(values: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    from ke_gym.codegen.graph import contiguous_stride

    return contiguous_stride(shape)


def variable(name: str, size: int) -> Index:
    return of(Var(name, size)) if size != 1 else constant(0)


def unravel(flat: Index, shape: tuple[int, ...]) -> list[Index]:
    """The row-major index of which ``flat`` is the position."""
    parts, below = [], math.prod(shape)
    for size in shape:
        below //= size
        parts.append((flat // below) % size if size != 1 else constant(0))
    return parts


def contraction_of(graph: Graph, group: Group) -> Extern | None:
    """The product the group's kernel delivers: the only one, or the second one of attention."""
    found = [s for n in group.nodes if isinstance(s := graph.steps[n], Extern)]
    if len(found) > 2:
        raise Illegal("one contraction a kernel")
    return found[-1] if found else None


class Builder:
    """Builds the ``Contraction`` of a group; raises ``Illegal`` if its nodes do not fit around the product."""

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        self.graph, self.group, self.visible = graph, group, visible
        step = contraction_of(graph, group)
        assert step is not None
        extra = {b.name for b in step.outputs[1:]}
        if step.target not in KINDS or any(extra & set(graph.steps[u].reads) for u in graph.users[step.name]):
            raise Illegal("no template for this call")
        self.step = step
        self.product = step.outputs[0]
        self.nodes = {n: s for n in group.nodes if isinstance(s := graph.steps[n], Node)}
        self.problem = problem_of(graph, step, graph.precision)
        self.vector_bytes = vector_bytes()

    def build(self) -> Contraction:
        made = {self.product.name}
        after: dict[str, Node] = {}
        before: dict[str, Node] = {}
        for name, node in self.nodes.items():
            if made & set(node.reads):
                after[name] = node
                made.add(name)
            else:
                before[name] = node
        prologue = self._prologue(before)
        rows = [n for n in after.values() if not n.pointwise]
        if rows and not isinstance(self.problem, templates.GemmProblem):
            raise Illegal("reductions follow matrix products only")
        choices = self._choices(bool(rows))
        stores = self._epilogue(after)
        if not stores:
            raise Illegal("nothing is stored")
        operands = self._views()
        reads = self._reads(stores, prologue, operands)
        writes = tuple(self.graph.buffers[s.buffer] for s in stores)
        origins = (self.step.target.split(".")[1], *(n.origin for n in self.nodes.values()))
        return Contraction(
            writes[-1].name, self.step, self.problem, choices, operands, tuple(stores), prologue, reads, writes,
            self.group, tuple(dict.fromkeys(origins)), self.vector_bytes,
        )  # fmt: skip

    def _views(self) -> tuple[View, ...]:
        if isinstance(self.problem, templates.GemmProblem):
            return self.step.args[-2:]
        if not isinstance(self.problem, templates.BagProblem):
            return self.step.args[:2]
        weights = self.step.args[6:7] if self.problem.weighted else ()
        return (*self.step.args[:3], *weights)

    def _choices(self, in_order: bool) -> Choices:
        """The heuristic schedule with the group's own values; each value must be one of the template's choices."""
        if isinstance(self.problem, templates.GemmProblem):
            base: Any = templates.GemmSchedule.default(self.problem, self.vector_bytes, in_order)
            legal = templates.GemmSchedule.choices(self.problem, self.vector_bytes, in_order)
        else:
            template = _templates(self.problem)
            base = template.default(self.problem, self.vector_bytes)
            legal = template.choices(self.problem, self.vector_bytes)
        for knob, value in self.group.contraction:
            value = tuple(value) if isinstance(value, (list, tuple)) else value
            if value not in legal.get(knob, []):
                raise Illegal(f"{knob}={value} does not suit this contraction")
            base = dataclasses.replace(base, **{knob: value})
        return base  # type: ignore[no-any-return]

    # ---------------------------------------------------------------------------------------- epilogue

    def _place(self) -> tuple[Index, ...]:
        """The index of the product's element ``acc[j]`` in terms of the strip's variables."""
        p = self.problem
        if isinstance(p, templates.GemmProblem):
            return (
                *unravel(variable("batch", p.batches), p.batch),
                variable("row", p.m),
                variable("at", p.n),
            )
        if isinstance(p, templates.BagProblem):
            return (variable("row", p.bags), variable("at", p.dim))
        assert isinstance(p, templates.ConvProblem)
        spatial = unravel(variable("at", math.prod(p.out_size)), p.out_size)
        return (variable("batch", p.batch), variable("channel", p.out_channels), *spatial)

    def _epilogue(self, after: dict[str, Node]) -> list[Store]:
        place = self._place()
        values: dict[str, Expr] = {}
        indices: dict[str, tuple[Index, ...]] = {}
        made = self._made(place)
        if self.product.name in self.visible and self.product.stride != _contiguous(self.product.shape):
            raise Illegal("the product is stored in another order")
        stores = []
        if self.product.name in self.visible:
            stores.append(self._store(self.product.name, place, made, None))
        for name, node in after.items():
            binding = self._solve(node, place, indices)
            index = tuple(Rewriter(binding).index(of(v)) if v.size != 1 else constant(0) for v in node.vars)
            indices[name] = index

            def read(load: Load) -> Expr:
                if load.buffer == self.product.name:
                    if tuple(load.index) != place:
                        raise Illegal("the product is read elsewhere")
                    return made
                if load.buffer in values:
                    if load.index != indices[load.buffer]:
                        raise Illegal(f"{load.buffer} is read elsewhere")
                    return values[load.buffer]
                return Load(load.buffer, (self._flat(load.buffer, load.index),), load.dtype)

            value = Rewriter(binding, read).expr(node.expr)
            self._vectorizable(value)
            if node.pointwise:
                values[name] = value
                if name in self.visible:
                    stores.append(self._store(name, index, value, None))
            else:
                if name not in self.visible or node.scan is not None:
                    raise Illegal("a row's reduction is needed within the row")
                stores.append(self._store(name, index, value, node.reduction))
        return stores

    @property
    def _bias(self) -> View | None:
        """What the library's call adds to the product before it rounds."""
        if self.step.target == BIASED:
            return self.step.args[0]  # type: ignore[no-any-return]
        return self.step.args[2] if self.step.target == CONVOLUTION else None

    def _made(self, place: tuple[Index, ...]) -> Expr:
        """What the call makes of the sums of the element at ``place``."""
        dtype = compute_dtype(self.product.dtype)
        acc, bias = Load("acc", (of(STRIP),), dtype), self._bias
        if bias is None:
            return acc
        own = place[1:2] if self.step.target == CONVOLUTION else place[len(place) - len(bias.shape) :]
        at = constant(bias.offset)
        for index, size, stride in zip(own, bias.shape, bias.stride):
            at = at + (index * stride if size != 1 else constant(0))
        shift = Load(bias.buffer, (at,), self.graph.buffers[bias.buffer].dtype)
        return Op("add", (acc, cast(shift, dtype)), dtype)

    def _store(self, name: str, index: tuple[Index, ...], expr: Expr, op: str | None) -> Store:
        flat = self._flat(name, index)
        if op is None:
            self._vectorizable_index(flat)
        return Store(name, self.graph.buffers[name].dtype, flat, expr, op)

    def _flat(self, name: str, index: tuple[Index, ...]) -> Index:
        """The position in memory. The product's own place is one run, into however many dimensions it unravels."""
        buffer = self.graph.buffers[name]
        if buffer.shape == self.product.shape and buffer.stride == _contiguous(buffer.shape):
            p = self.problem
            if isinstance(p, templates.ConvProblem) and tuple(index) == self._place():
                size = math.prod(p.out_size)
                channel = variable("batch", p.batch) * p.out_channels + variable("channel", p.out_channels)
                return channel * size + variable("at", size)
        flat = constant(0)
        for i, s in zip(index, buffer.stride):
            flat = flat + i * s
        return flat

    def _solve(
        self, node: Node, place: tuple[Index, ...], indices: dict[str, tuple[Index, ...]]
    ) -> dict[Var, Index]:
        """The node's loops as functions of the product's index, from how it reads the product."""
        if any(n in self.nodes and n != self.product.name and n not in indices for n in node.reads):
            raise Illegal(f"{node.name} needs what is not there behind the product")
        if math.prod(v.size for v in (*node.vars, *node.rvars)) != math.prod(self.product.shape):
            raise Illegal(f"{node.name} has other elements than the product")
        binding: dict[Var, Index] = {}
        for load in [n for n in walk(node.expr) if isinstance(n, Load)]:
            target = place if load.buffer == self.product.name else indices.get(load.buffer)
            if target is None:
                continue
            for index, at in zip(load.index, target):
                size = 1
                for atom, coefficient in sorted(index.terms, key=lambda t: t[1]):
                    if not isinstance(atom, Var) or coefficient != size:
                        raise Illegal("the product is not read in its own order")
                    solved = (at // coefficient) % atom.size if atom.size > 1 else constant(0)
                    if binding.setdefault(atom, solved) != solved:
                        raise Illegal("the product is read twice")
                    size = coefficient * atom.size
        for var in (*node.vars, *node.rvars):
            if var.size != 1 and var not in binding:
                raise Illegal(f"{node.name} is larger than the product")
        if node.rvars:
            across = {getattr(a, "name", "") for r in node.rvars for a, _ in binding[r].terms}
            along = {n for v in node.vars if v in binding for n in walk(binding[v]) if isinstance(n, Var)}
            if across != {"at"} or any(v.name == "at" for v in along):
                raise Illegal("only whole rows are reduced")
        return binding

    def _vectorizable(self, expr: Expr) -> None:
        for node in walk(expr):
            if isinstance(node, Index):
                self._vectorizable_index(node)

    def _vectorizable_index(self, index: Index) -> None:
        for node in walk(index):
            if isinstance(node, Quotient) and any(
                isinstance(n, Var) and n.name == "at" for n in walk(node.index)
            ):
                raise Illegal("strips would be divided")

    # ---------------------------------------------------------------------------------------- prologue

    def _prologue(self, before: dict[str, Node]) -> Expr | None:
        if not before:
            return None
        if any(view.buffer in before for view in (*self._views()[1:], self._bias) if view is not None):
            raise Illegal("only the left operand is computed on the way")
        if not isinstance(self.problem, templates.GemmProblem):
            raise Illegal("only matrix products take a prologue")
        view = self._views()[0]
        if view.buffer not in before:
            raise Illegal("nothing makes the left operand")
        node = before[view.buffer]
        if any(n in self.visible for n in before) or any(not n.pointwise for n in before.values()):
            raise Illegal("the left operand is needed elsewhere")
        if view.offset or view.stride != _contiguous(view.shape) or math.prod(view.shape) != node.numel:
            raise Illegal("the left operand is a view")
        p = self.problem
        flat = (variable("batch", p.batches) * p.m + variable("row", p.m)) * p.k + variable("at", p.k)
        binding = dict(zip(node.vars, unravel(flat, node.shape)))
        resolved: dict[str, Expr] = {}

        def inline(load: Load) -> Expr:
            if load.buffer in before:
                inner = before[load.buffer]
                return Rewriter(dict(zip(inner.vars, load.index))).expr(resolved[load.buffer])
            return load

        for name, part in before.items():
            resolved[name] = Rewriter(load=inline).expr(part.expr)
        flatten = Rewriter(binding, self._flat_load)
        value = flatten.expr(resolved[node.name])
        self._vectorizable(value)
        return value

    def _flat_load(self, load: Load) -> Expr:
        return Load(load.buffer, (self._flat(load.buffer, load.index),), load.dtype)

    def _reads(
        self, stores: list[Store], prologue: Expr | None, operands: tuple[View, ...]
    ) -> tuple[Buffer, ...]:
        names = dict.fromkeys(v.buffer for v in operands if v.buffer not in self.nodes)
        roots = [s.expr for s in stores] + ([prologue] if prologue is not None else [])
        for node in walk(*roots):
            if isinstance(node, Load) and node.buffer != "acc":
                names[node.buffer] = None
            if isinstance(node, Indirect):
                raise Illegal("gathers around a product")
        return tuple(self.graph.buffers[n] for n in names)
