"""A product and the pointwise nodes around it, as one kernel of a GPU. Language-independent.

Programs take tiles of the product; the epilogue sees finished tiles in registers instead of a tensor in memory.
Operands are expressions of their index: a strided view, pointwise nodes that nothing else needs, or, for a
convolution, the window that a row of the product sees (Chetlur et al., "cuDNN", 2014: implicit GEMM).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ke_gym.codegen.contract import contraction_of
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
    cast,
    constant,
    in_range,
    of,
    walk,
)
from ke_gym.codegen.graph import Buffer, Extern, Graph, Node, View, contiguous_stride
from ke_gym.codegen.schedule import Group
from ke_gym.codegen.tiles import chosen, joined

CONVOLUTION = "aten.convolution.default"
BIASED = "aten.addmm.default"
KINDS = ("aten.mm.default", "aten.bmm.default", BIASED, CONVOLUTION)
FILL = 132  # programs that keep every multiprocessor busy
# A product with a side this short waits for memory: tf32x3 costs it nothing, and TF32's errors (the hardware
# truncates) no longer add up along a chain of such products.
SKINNY = 32
SHARE = 128  # least of the summed dimension that is worth a program of its own


@dataclass(frozen=True)
class Shape:
    """``batch`` products of ``m`` x ``k`` by ``k`` x ``n``, of operands in ``dtype``."""

    batch: int
    m: int
    n: int
    k: int
    dtype: str


@dataclass(frozen=True)
class Blocks:
    """Tiles of ``m`` x ``n``, ``k`` at a time; ``group`` rows of tiles walked together, so that they share operands.

    ``precision`` is what fp32 operands are multiplied in: "ieee", "tf32x3" (three products that add up to nearly
    fp32), "tf32", or "bf16". ``split``: programs that share a tile, each with its part of ``k``; a second kernel adds
    their sums up, always in the same order. ``persistent``: programs that walk over all tiles (0: a program a tile).
    ``loads``: "pointers", or "descriptors" where bulk copies fetch tiles of an operand (TMA).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    precision: str = "ieee"
    split: int = 1
    persistent: int = 0
    loads: str = "pointers"


@dataclass(frozen=True)
class Described:
    """An operand as a tensor descriptor: a view of ``buffer``, its outer and inner dimension named in ``axes``.

    With ``batched``, the batch is a third dimension, the outermost.
    """

    buffer: str
    axes: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def batched(self) -> bool:
        return len(self.shape) == 3


@dataclass(frozen=True)
class Store:
    """``buffer[place] = expr`` for each element of a tile."""

    buffer: Buffer
    place: Index
    expr: Expr


@dataclass(frozen=True)
class Product:
    """What one kernel does."""

    name: str
    shape: Shape
    blocks: Blocks
    operands: tuple[Expr, Expr]
    stores: tuple[Store, ...]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    bytes: int
    group: Group
    origins: tuple[str, ...]
    policy: str

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        shape = self.shape
        choices: dict[str, list[Any]] = {
            "m": [b for b in (16, 32, 64, 128, 256) if b < 2 * max(shape.m, 9)],
            "n": [b for b in (16, 32, 64, 128, 256) if b < 2 * max(shape.n, 9)],
            "k": [16, 32, 64, 128],
            "warps": [2, 4, 8],
            "stages": [1, 2, 3, 4, 5],
            "split": [s for s in (1, 2, 4, 8, 16, 32) if s == 1 or shape.k >= SHARE * s],
        }
        if shape.m > self.blocks.m and shape.n > self.blocks.n:
            choices["group"] = [1, 4, 8, 16]
        if shape.batch * -(-shape.m // 16) * -(-shape.n // 16) > FILL:
            choices["persistent"] = [0, FILL, 2 * FILL]
        if any(self.described):
            choices["loads"] = ["pointers", "descriptors"]
        if shape.dtype == "f32":
            choices["precision"] = precisions(self.policy)
        return choices

    @property
    def described(self) -> tuple[Described | None, Described | None]:
        """Both operands as tensor descriptors, where they can be."""
        return described(self.operands[0], "mk", self.shape), described(self.operands[1], "kn", self.shape)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.shape.m // self.blocks.m), -(-self.shape.n // self.blocks.n)

    @property
    def share(self) -> int:
        """How much of ``k`` a program sums up."""
        steps = -(-self.shape.k // self.blocks.k)
        return -(-steps // self.blocks.split) * self.blocks.k


def variables(shape: Shape) -> tuple[Var, Var, Var, Var]:
    """Batch, row and column of the product, and what is summed over."""
    return Var("batch", shape.batch), Var("m", shape.m), Var("n", shape.n), Var("k", shape.k)


def precisions(policy: str) -> list[str]:
    """What products of fp32 operands may be computed in, by the task's precision policy."""
    allowed = {"strict": ["ieee", "tf32x3"], "tf32": ["tf32", "tf32x3", "ieee"]}
    return allowed.get(policy, ["bf16", "tf32", "tf32x3", "ieee"])


def described(operand: Expr, axes: str, shape: Shape) -> Described | None:
    """The operand as a tensor descriptor; None unless it is a view with one contiguous dimension, the other
    strides multiples of 16 bytes, that begins where its buffer does."""
    if not isinstance(operand, Load):
        return None
    (index,) = operand.index
    batch, *rest = variables(shape)
    sizes = {var.name: var.size for var in rest}
    step = {var.name: index.coefficient(var) for var in (batch, *rest)}
    inner = next((axis for axis in axes if step[axis] == 1 and sizes[axis] > 1), None)
    if inner is None or index.const or len(index.terms) != sum(c != 0 for c in step.values()):
        return None
    outer = axes.replace(inner, "")
    strides = [step[outer], *([step["batch"]] if step["batch"] else [])]
    if sizes[outer] == 1 or any(s <= 0 or s * BYTES[shape.dtype] % 16 for s in strides):
        return None
    extents = (sizes[outer], sizes[inner])
    if not step["batch"]:
        return Described(operand.buffer, outer + inner, extents, (step[outer], 1))
    return Described(operand.buffer, outer + inner, (shape.batch, *extents), (step["batch"], step[outer], 1))


class Builder:
    """Builds the ``Product`` of a group; raises ``Illegal`` if its nodes do not fit behind the product."""

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        self.graph, self.group, self.visible = graph, group, visible
        step = contraction_of(graph, group)
        assert step is not None
        if step.target not in KINDS:
            raise Illegal("no kernel for this product")
        self.step: Extern = step
        self.nodes = {n: s for n in group.nodes if isinstance(s := graph.steps[n], Node)}
        self.product = step.outputs[0]

    def build(self) -> Product:
        a, b = self.step.args[1:3] if self.step.target == BIASED else self.step.args[:2]
        dtypes = {self.graph.buffers[v.buffer].dtype for v in (a, b)}
        if self.step.kwargs:
            raise Illegal("a scaled product")
        if len(dtypes) != 1 or not dtypes <= {"f32", "bf16", "f16"}:
            raise Illegal("operands of these dtypes")
        if self.product.stride != contiguous_stride(self.product.shape):
            raise Illegal("the product is stored in another order")
        dtype = dtypes.pop()
        made = self._convolution(dtype) if self.step.target == CONVOLUTION else self._matrices(a, b, dtype)
        shape, operands, place, value = made
        if shape.k < 16 or shape.batch > 65535:
            raise Illegal("a product of thin operands, or too many")
        after = self._after()
        stores = self._stores(place, value, after)
        if not stores:
            raise Illegal("nothing is stored")
        reads = self._reads(stores, operands)
        writes = tuple(store.buffer for store in stores)
        total = sum(x.numel * BYTES[x.dtype] for x in (*reads, *writes))
        origins = (self.step.target.split(".")[1], *(n.origin for n in self.nodes.values()))
        drafted = Product(
            writes[-1].name, shape, heuristic(shape, self.graph.precision), operands, tuple(stores), reads, writes,
            total, self.group, tuple(dict.fromkeys(origins)), self.graph.precision,
        )  # fmt: skip
        blocks = chosen(drafted.blocks, drafted.knobs(), self.group)
        if blocks.m * blocks.n > 1 << 15 or blocks.m * blocks.n < 32 * blocks.warps * 2:
            raise Illegal("tiles that do not suit the warps")
        if blocks.split > 1 and blocks.persistent:
            raise Illegal("programs that share tiles do not walk over them")
        finished = replace(drafted, blocks=blocks)
        if blocks.persistent and shape.batch * math.prod(finished.tiles) <= blocks.persistent:
            raise Illegal("no more tiles than programs")
        if finished.share * (blocks.split - 1) >= shape.k:
            raise Illegal("parts with nothing to sum up")
        return finished

    def _after(self) -> dict[str, Node]:
        """The nodes that read the product, directly or not; the others make its operands."""
        made, after = {self.product.name}, {}
        for name, node in self.nodes.items():
            if made & set(node.reads):
                after[name] = node
                made.add(name)
            elif name in self.visible or not node.pointwise:
                raise Illegal(f"{name} is needed elsewhere")
        return after

    def _matrices(self, a: View, b: View, dtype: str) -> Made:
        shape = Shape(math.prod(a.shape[:-2]), a.shape[-2], b.shape[-1], a.shape[-1], dtype)
        batch, m, n, k = (of(v) if v.size != 1 else constant(0) for v in variables(shape))
        left = self._element(a, (batch, m, k)[-len(a.shape) :])
        right = self._element(b, (batch, k, n)[-len(b.shape) :])
        bias = self._biased(self.step.args[0], (m, n)) if self.step.target == BIASED else self.acc
        return shape, (left, right), joined((batch * shape.m + m) * shape.n + n), bias

    @property
    def acc(self) -> Load:
        """The product's element, as the epilogue sees it."""
        return Load(self.product.name, (), "f32")

    def _biased(self, bias: View | None, index: tuple[Index, ...]) -> Expr:
        if bias is None:
            return self.acc
        own = tuple(
            i if size != 1 else constant(0)
            for i, size in zip(index[len(index) - len(bias.shape) :], bias.shape)
        )
        return Op("add", (self.acc, widened(self._element(bias, own))), "f32")

    def _convolution(self, dtype: str) -> Made:
        """Rows of the product are output positions, columns output channels, summed over input windows."""
        x, w, bias, stride, padding, dilation, transposed, _, groups = self.step.args
        if transposed or groups != 1 or dtype == "f32":  # in fp32 the library's own are several times as fast
            raise Illegal("this kind of convolution")
        out, rank = self.product.shape, len(x.shape) - 2
        stride, padding, dilation = (_spread(values, rank) for values in (stride, padding, dilation))
        positions = math.prod(out[2:])
        shape = Shape(1, out[0] * positions, out[1], math.prod(w.shape[1:]), dtype)
        _, m, n, k = (of(v) if v.size != 1 else constant(0) for v in variables(shape))
        taps = math.prod(w.shape[2:])
        index, inside = [m // positions, k // taps], []
        for d in range(rank):
            at = (m // math.prod(out[3 + d :])) % out[2 + d]
            tap = (k // math.prod(w.shape[3 + d :])) % w.shape[2 + d]
            index.append(at * stride[d] + tap * dilation[d] - padding[d])
            inside.append(in_range(index[-1], 0, x.shape[2 + d]))
        left = self._element(x, tuple(index))
        for test in inside:
            if not (isinstance(test, Const) and test.value):
                left = Op("where", (test, left, Const(0.0, left.dtype)), left.dtype)
        weights = tuple((k // math.prod(w.shape[d + 1 :])) % w.shape[d] for d in range(1, len(w.shape)))
        right = self._element(w, (n, *weights))
        place = ((m // positions) * out[1] + n) * positions + m % positions
        return shape, (left, right), joined(place), self._biased(bias, (n,))

    def _element(self, view: View, index: tuple[Index, ...]) -> Expr:
        """The element of an operand at ``index``."""
        return element(self.graph, self.nodes, view, index)

    def _stores(self, flat: Index, acc: Expr, after: dict[str, Node]) -> list[Store]:
        resolved: dict[str, Expr] = {}

        def inline(load: Load) -> Expr:
            if load.buffer in resolved:
                inner = self.nodes[load.buffer]
                return Rewriter(dict(zip(inner.vars, load.index))).expr(resolved[load.buffer])
            return load

        def read(load: Load) -> Expr:
            place = joined(position(load.index, self.graph.buffers[load.buffer].stride))
            if load.buffer == self.product.name:
                if place != flat:
                    raise Illegal("the product is read in another order")
                return acc
            return Load(load.buffer, (place,), load.dtype)

        stores = []
        if self.product.name in self.visible or self.step.name in self.visible:
            stores.append(Store(self.product, flat, acc))
        for name, node in self.nodes.items():
            if name in after and (not node.pointwise or node.numel != self.product.numel):
                raise Illegal(f"{name} is no epilogue of the product")
            resolved[name] = Rewriter(load=inline).expr(node.expr)
            if name in after and name in self.visible:
                binding, step = {}, 1
                for var in reversed(node.vars):
                    binding[var] = (flat // step) % var.size if var.size != 1 else constant(0)
                    step *= var.size
                expr = Rewriter(binding, read).expr(resolved[name])
                stores.append(Store(self.graph.buffers[name], flat, expr))
        return stores

    def _reads(self, stores: list[Store], operands: tuple[Expr, Expr]) -> tuple[Buffer, ...]:
        names: dict[str, None] = {}
        for node in walk(*operands, *(store.expr for store in stores)):
            if isinstance(node, (Load, Search)) and node.buffer != self.product.name:
                names[node.buffer] = None
        if any(name in self.nodes for name in names):
            raise Illegal("a node is needed in memory")
        return tuple(self.graph.buffers[name] for name in names)


Made = tuple[Shape, tuple[Expr, Expr], Index, Expr]
"""The product's sizes, its operands, where its element lies in the result, and its value with the bias."""


def widened(expr: Expr) -> Expr:
    """In the dtype that halves are computed in."""
    return cast(expr, "f32")


def position(index: tuple[Index, ...], stride: tuple[int, ...]) -> Index:
    """The element of a buffer at ``index``."""
    total = constant(0)
    for i, s in zip(index, stride):
        total = total + i * s
    return total


def element(graph: Graph, nodes: Mapping[str, Node], view: View, index: tuple[Index, ...]) -> Expr:
    """The element of a view at ``index``: from memory, or computed if one of ``nodes`` makes it."""
    place = position(index, view.stride) + view.offset
    if view.buffer not in nodes:
        return Load(view.buffer, (joined(place),), graph.buffers[view.buffer].dtype)

    def inline(load: Load) -> Expr:
        if load.buffer not in nodes:
            return Load(
                load.buffer, (joined(position(load.index, graph.buffers[load.buffer].stride)),), load.dtype
            )
        node = nodes[load.buffer]
        if not node.pointwise:
            raise Illegal("an operand is reduced")
        return Rewriter(dict(zip(node.vars, load.index)), inline).expr(node.expr)

    node = nodes[view.buffer]
    binding = tuple(
        (place // stride) % size if size != 1 else constant(0)
        for stride, size in zip(contiguous_stride(node.shape), node.shape)
    )
    return inline(Load(view.buffer, binding, node.dtype))


def _spread(values: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def heuristic(shape: Shape, policy: str) -> Blocks:
    """Large tiles where there are enough of them to fill the device, else smaller ones."""
    half = shape.dtype != "f32"
    precision = "ieee" if half else {"strict": "tf32x3", "tf32": "tf32", "bf16": "bf16"}[policy]
    if precision == "tf32" and min(shape.m, shape.n, shape.k) <= SKINNY:
        precision = "tf32x3"
    deep = 64 if half or precision == "bf16" else 32
    drafts = [
        Blocks(128, 256, 64, 8, 3) if deep == 64 else Blocks(128, 64, 32, 4, 3),
        Blocks(128, 128, deep, 8, 3),
        Blocks(128, 64, deep, 4, 3),
        Blocks(64, 64, deep, 4, 4),
        Blocks(32, 64, 64, 4, 4),
        Blocks(16, 32, 128, 4, 4),
    ]
    fitting = [b for b in drafts if b.m < 2 * max(shape.m, 9) and b.n < 2 * max(shape.n, 17)] or drafts[-1:]
    for blocks in fitting:
        programs = shape.batch * -(-shape.m // blocks.m) * -(-shape.n // blocks.n)
        if programs >= FILL:
            break
    return replace(blocks, precision=precision)
