"""Product, softmax, product as one kernel of a GPU: scores never leave the chip. Language-independent.

Dao et al., "FlashAttention", 2022; the softmax is the online one of Milakov and Gimelshein, 2018. What lies between
the first product and the softmax (scale, bias, masks) is any pointwise expression of the score; operands may be
pointwise nodes of their own (repeated key heads, casts), read element by element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ke_gym.codegen import causality
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    BYTES,
    Const,
    Expr,
    Index,
    Load,
    Op,
    Rewriter,
    Search,
    Var,
    constant,
    of,
    walk,
)
from ke_gym.codegen.graph import Buffer, Extern, Graph, Node, View, contiguous_stride
from ke_gym.codegen.operands import element, position
from ke_gym.codegen.product_blocks import precisions
from ke_gym.codegen.schedule import Group
from ke_gym.codegen.tiles import chosen, depends, joined
from ke_gym.languages.plan import GRID_LIMITS

KIND = "aten.bmm.default"
WITHIN = 16  # most queries of different heads in one tile
WIDEST = 256  # elements of one query, key or value that a tile holds whole


@dataclass(frozen=True)
class Shape:
    """``batch`` times: ``queries`` x ``d`` by ``d`` x ``keys``, and ``queries`` x ``keys`` by ``keys`` x ``dv``."""

    batch: int
    queries: int
    keys: int
    d: int
    dv: int
    dtype: str


@dataclass(frozen=True)
class Blocks:
    """``m`` queries per program, ``n`` keys at a time. ``precision`` as in ``product_blocks.Blocks``."""

    m: int
    n: int
    warps: int
    stages: int
    precision: str = "ieee"


@dataclass(frozen=True)
class Flash:
    """What one kernel does. ``scores``: the softmax's argument, in terms of ``score`` (its load has no index).

    ``visible``: keys from ``query + visible`` on are masked, so that only their values' NaN and infinities count;
    ``open`` is the argument for the others.
    """

    name: str
    shape: Shape
    blocks: Blocks
    operands: tuple[Expr, Expr, Expr]
    scores: Expr
    score: Load
    place: Index
    visible: int | None
    open: Expr
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    bytes: int
    group: Group
    origins: tuple[str, ...]
    policy: str

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        choices: dict[str, list[Any]] = {
            "m": [b for b in (16, 32, 64, 128) if b < 2 * max(self.shape.queries, 9)],
            "n": [16, 32, 64, 128],
            "warps": [2, 4, 8],
            "stages": [1, 2, 3],
        }
        if self.shape.dtype == "f32":
            choices["precision"] = precisions(self.policy)
        return choices

    @property
    def beyond(self) -> str:
        """Where it is kept which values of a block of keys are NaN or infinite."""
        return f"{self.name}_beyond"


def variables(shape: Shape) -> dict[str, Var]:
    """Batch, query, key, and the elements of a query and of a value."""
    sizes = {"batch": shape.batch, "m": shape.queries, "n": shape.keys, "d": shape.d, "e": shape.dv}
    return {name: Var(name, size) for name, size in sizes.items()}


class Builder:
    """Builds the ``Flash`` of a group of two products; raises ``Illegal`` if there is no softmax between them."""

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        self.graph, self.group, self.visible = graph, group, visible
        self.nodes = {n: s for n in group.nodes if isinstance(s := graph.steps[n], Node)}
        steps = [s for n in group.nodes if isinstance(s := graph.steps[n], Extern)]
        if len(steps) != 2 or any(s.target != KIND for s in steps):
            raise Illegal("one product a kernel, or two around a softmax")
        self.first, self.second = steps
        self.score = Load(self.first.outputs[0].name, (), "f32")
        self.resolved: dict[str, Expr] = {}

    def build(self) -> Flash:
        q, k = self.first.args[0], self.first.args[1]
        p, v = self.second.args[0], self.second.args[1]
        out = self.second.outputs[0]
        if self.visible - {out.name, self.second.name}:
            raise Illegal("what lies between the products is needed elsewhere")
        dtypes = {self.graph.buffers[view.buffer].dtype for view in (q, k, v)}
        if len(dtypes) != 1 or not dtypes <= {"f32", "bf16", "f16"}:
            raise Illegal("operands of these dtypes")
        if len(q.shape) != 3 or p.shape != (*q.shape[:2], k.shape[2]) or v.shape[1] != p.shape[2]:
            raise Illegal("products that do not follow each other")
        shape = Shape(q.shape[0], q.shape[1], k.shape[2], q.shape[2], v.shape[2], dtypes.pop())
        if (
            max(shape.d, shape.dv) > WIDEST
            or min(shape.d, shape.dv, shape.keys) < 16
            or shape.batch > GRID_LIMITS[1]
        ):
            raise Illegal("operands too wide or too thin for one tile")
        if out.stride != contiguous_stride(out.shape):
            raise Illegal("the result is stored in another order")
        for name, node in self.nodes.items():
            self.resolved[name] = Rewriter(load=self._inline).expr(node.expr)
        where = {name: of(var) if var.size != 1 else constant(0) for name, var in variables(shape).items()}
        scores = _multiplied(self._softmax(p, shape, where))
        operands = (
            self._operand(q, (where["batch"], where["m"], where["d"])),
            self._operand(k, (where["batch"], where["d"], where["n"])),
            self._operand(v, (where["batch"], where["n"], where["e"])),
        )
        place = joined((where["batch"] * shape.queries + where["m"]) * shape.dv + where["e"])
        shape, operands, scores, place = _together(shape, operands, scores, place)
        reads = self._reads((scores, *operands))
        origins = ("attention", *(n.origin for n in self.nodes.values()))
        drafted = Flash(
            out.name, shape, heuristic(shape, self.graph.precision), operands, scores, self.score, place,
            *_visible(scores, variables(shape)), reads, (out,),
            sum(b.numel * BYTES[b.dtype] for b in (*reads, out)), self.group, tuple(dict.fromkeys(origins)),
            self.graph.precision,
        )  # fmt: skip
        return self._finished(drafted)

    def _finished(self, drafted: Flash) -> Flash:
        """The kernel with the group's own blocks."""
        blocks = chosen(drafted.blocks, drafted.knobs(), self.group)
        if blocks.m * blocks.n < 32 * blocks.warps:
            raise Illegal("tiles that do not suit the warps")
        return replace(drafted, blocks=blocks)

    def _inline(self, load: Load) -> Expr:
        node = self.nodes.get(load.buffer)
        if node is None or not node.pointwise:
            return load
        return Rewriter(dict(zip(node.vars, load.index))).expr(self.resolved[load.buffer])

    def _softmax(self, p: View, shape: Shape, where: dict[str, Index]) -> Expr:
        """The argument of the softmax that the second product's left operand is; ``Illegal`` if it is none."""
        node = self.nodes.get(p.buffer)
        if node is None or p.offset or p.stride != contiguous_stride(p.shape):
            raise Illegal("nothing makes the second product's left operand")
        row = where["batch"] * shape.queries + where["m"]
        flat = row * shape.keys + where["n"]

        def read(load: Load) -> Expr:
            place = joined(position(load.index, self.graph.buffers[load.buffer].stride))
            own = self.nodes.get(load.buffer)
            if load.buffer == self.score.buffer or own is not None:
                if place != joined(flat if load.buffer == self.score.buffer else row):
                    raise Illegal("scores are read in another order")
                return self.score if own is None else Load(load.buffer, (), "f32")
            return Load(load.buffer, (place,), load.dtype)

        def value(part: Node, position: Index) -> Expr:
            binding: dict[Var, Index] = {}
            step = 1
            for var in reversed(part.vars):
                binding[var] = (position // step) % var.size if var.size != 1 else constant(0)
                step *= var.size
            if step != math.prod((shape.batch, shape.queries, 1 if part.rvars else shape.keys)):
                raise Illegal(f"{part.name} is no part of a softmax")
            for var in part.rvars:
                binding[var] = where["n"]
            return Rewriter(binding, read).expr(self.resolved[part.name])

        reductions = {
            r: n for n, s in self.nodes.items() if (r := s.reduction) is not None and s.scan is None
        }
        if set(reductions) != {"max", "sum"} or sum(not s.pointwise for s in self.nodes.values()) != 2:
            raise Illegal("no softmax between the products")
        top, total = (self.nodes[reductions[op]] for op in ("max", "sum"))
        if any([v.size for v in part.rvars if v.size != 1] != [shape.keys] for part in (top, total)):
            raise Illegal("no softmax over the keys")
        scores = value(top, row)
        shifted = Op("exp", (Op("sub", (scores, Load(top.name, (), "f32")), "f32"),), "f32")
        sum_ = Load(total.name, (), "f32")
        inverse = Op("div", (Const(1.0, "f32"), sum_), "f32")
        forms = (Op("div", (shifted, sum_), "f32"), Op("mul", (shifted, inverse), "f32"))
        if value(total, row) is not shifted or value(node, flat) not in forms:
            raise Illegal("no softmax between the products")
        return scores

    def _operand(self, view: View, index: tuple[Index, ...]) -> Expr:
        expr = element(self.graph, self.nodes, view, index)
        if isinstance(expr, Op) and expr.name == "cast" and isinstance(expr.args[0], Load):
            (load,) = expr.args
            if load.dtype == self.graph.buffers[view.buffer].dtype:
                return load  # a copy of halves: widened only to be narrowed again
        return expr

    def _reads(self, roots: tuple[Expr, ...]) -> tuple[Buffer, ...]:
        names = dict.fromkeys(
            n.buffer for n in walk(*roots) if isinstance(n, (Load, Search)) and n.buffer != self.score.buffer
        )
        if any(name in self.nodes for name in names):
            raise Illegal("an operand is reduced")
        return tuple(self.graph.buffers[name] for name in names)


def _together(
    shape: Shape, operands: tuple[Expr, Expr, Expr], scores: Expr, place: Index
) -> tuple[Shape, tuple[Expr, Expr, Expr], Expr, Index]:
    """Single queries that share keys and values, as grouped heads do, as the rows of one tile: these are read once."""
    if shape.queries > 1:
        return shape, operands, scores, place
    batch = variables(shape)["batch"]
    for heads in (h for h in range(WITHIN, 1, -1) if shape.batch % h == 0):
        packed = replace(shape, batch=shape.batch // heads, queries=heads)
        names = variables(packed)
        number = of(names["batch"]) * heads if packed.batch > 1 else constant(0)
        rewriter = Rewriter({batch: number + of(names["m"])})
        query, *shared = (rewriter.expr(operand) for operand in operands)
        if not any(depends(operand, names["m"]) for operand in shared):
            return packed, (query, shared[0], shared[1]), rewriter.expr(scores), joined(rewriter.index(place))
    return shape, operands, scores, place


def _multiplied(scores: Expr) -> Expr:
    """The scores with divisions by a number, such as the root of ``d``, as products: one division costs several."""
    if not isinstance(scores, Op):
        return scores
    args = tuple(_multiplied(arg) for arg in scores.args)
    if scores.name == "div" and scores.dtype == "f32" and isinstance(args[1], Const) and args[1].value:
        return Op("mul", (args[0], Const(1.0 / args[1].value, "f32")), "f32")
    return Op(scores.name, args, scores.dtype)


def _visible(scores: Expr, names: dict[str, Var]) -> tuple[int | None, Expr]:
    """The least ``k`` such that ``scores`` is -inf wherever ``key >= query + k``, and what it is elsewhere."""
    found = causality.limits(scores, of(names["m"]), of(names["n"]))
    return min(found, key=lambda one: one[0], default=(None, scores))


def heuristic(shape: Shape, policy: str) -> Blocks:
    half = shape.dtype != "f32"
    precision = "ieee" if half else {"strict": "tf32x3", "tf32": "tf32", "bf16": "bf16"}[policy]
    if shape.queries <= 16:
        return Blocks(16, 64, 4, 2, precision)
    wide = max(shape.d, shape.dv)
    if half:
        return Blocks(64, 64, 4, 3 if wide <= 128 else 2, precision)
    if wide > 128:
        return Blocks(32, 32, 4, 2, precision)
    return Blocks(128, 64, 8, 1 if wide > 64 else 2, precision)
