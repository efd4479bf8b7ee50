"""A product and the pointwise nodes around it, as one kernel of a GPU. Language-independent.

Programs take tiles of the product; the epilogue sees finished tiles in registers instead of a tensor in memory.
Operands are expressions of their index: a strided view, pointwise nodes that nothing else needs, or the windows of a
convolution (``convolutions``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ke_gym.codegen.contract import contraction_of
from ke_gym.codegen.convolutions import Convolution, Laid, Window
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
    cast,
    constant,
    of,
    walk,
)
from ke_gym.codegen.graph import Buffer, Extern, Graph, Node, View, contiguous_stride
from ke_gym.codegen.operands import Described, Shape, across, described, element, position, variables
from ke_gym.codegen.product_blocks import (
    FILL,
    SHARE,
    SMALLEST,
    SPECIAL,
    SPLITS,
    UNROLLED,
    Blocks,
    heuristic,
    precisions,
)
from ke_gym.codegen.schedule import Group
from ke_gym.codegen.tiles import chosen, depends, joined
from ke_gym.languages.plan import GRID_LIMITS

if TYPE_CHECKING:
    from ke_gym.codegen.thin_products import Thin

CONVOLUTION = "aten.convolution.default"
BIASED = "aten.addmm.default"
KINDS = ("aten.mm.default", "aten.bmm.default", BIASED, CONVOLUTION)
SIDES = ("left", "right")
PARTED = ("tf32x3", "bf16")
"""Precisions whose operands can be made ready before they are multiplied."""


@dataclass(frozen=True)
class Store:
    """``buffer[place] = expr`` for each element of a tile; ``index``: the place in a result of the product's shape.

    With ``op``, what it gives along the rows of the product, each tile a part of it; these run along ``axis`` of the
    tile ("n", or "m" of the transposed product).
    """

    buffer: Buffer
    place: Index
    expr: Expr
    index: tuple[Index, ...] = ()
    op: str = ""
    axis: str = "n"


@dataclass(frozen=True)
class Product:
    """What one kernel does. ``operands`` are what is multiplied, ``taken`` where the kernel finds it."""

    name: str
    shape: Shape
    blocks: Blocks
    operands: tuple[Expr, Expr]
    window: Window | None
    stores: tuple[Store, ...]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    bytes: int
    group: Group
    origins: tuple[str, ...]
    policy: str
    weights: frozenset[str] = frozenset()
    convolves: bool = False
    laid: Laid | None = None
    thin: Thin | None = None
    """A product that is added to every tile of this one."""

    def knobs(self) -> dict[str, list[Any]]:
        """Values of the launch's knobs that make another kernel here."""
        offered = self.choices()
        if self.blocks.precision not in PARTED:
            offered.pop("ready", None)
        if not self.parted:
            offered.pop("sums", None)
        return offered

    def choices(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs, those among them that change nothing beside the others."""
        shape = self.shape
        choices: dict[str, list[Any]] = {
            "m": [b for b in (16, 32, 64, 128, 256) if b < 2 * max(shape.m, 9)],
            "n": [b for b in (16, 32, 64, 128, 256) if b < 2 * max(shape.n, 9)],
            "k": self.depths,
            "warps": [2, 4, 8],
            "stages": [1, 2, 3, 4, 5],
            "split": [s for s in SPLITS if s == 1 or (shape.k >= SHARE * s and self.thin is None)],
        }
        if shape.m > self.blocks.m and shape.n > self.blocks.n:
            choices["group"] = [1, 4, 8, 16]
        if shape.batch * -(-shape.m // 16) * -(-shape.n // 16) > FILL:
            choices["persistent"] = [0, FILL, 2 * FILL]
        if any(self.described):
            choices["loads"] = ["pointers", "descriptors"]
        if any(self.packable):
            choices["packed"] = [False, True]
        window = self.window
        if window is not None and window.taps <= UNROLLED and window.channels % self.depths[0] == 0:
            choices["unroll"] = [False, True]
            if window.pairs is not None:
                choices["words"] = [False, True]
        if self.convolves:  # in fp32 and the order of the input, the library's own are several times as fast
            library = shape.dtype == "f32" and window is not None
            choices["channels_last"] = [True] if library else [False, True]
        if window is None and self.laid is None:
            choices["turned"] = [False, True]
            fetched = all(self.described) and all(isinstance(operand, Load) for operand in self.taken)
            if fetched and self.thin is None and shape.dtype != "f32" and min(shape.m, shape.n) >= 64:
                choices["specialized"] = [False, True]
        if shape.dtype == "f32":
            choices["precision"] = precisions(self.policy)
            if any(self.shared):
                choices["ready"] = [False, True]
                choices["sums"] = [1, 2, 4]
        return choices

    @property
    def packable(self) -> tuple[bool, bool]:
        """Which operands a copy would put in order: a convolution's weights, and matrices in fp32."""
        left, right = (across(operand, self.shape) for operand in self.operands)
        single = self.shape.dtype == "f32"
        return left and (single or self.window is not None), right and single

    @property
    def packed(self) -> dict[str, Expr]:
        """The sides ("left", "right") that are copied first, and what of."""
        sides = zip(SIDES, self.operands, self.packable)
        packed, laid = self.blocks.packed, self.laid
        if laid is not None:
            sides = zip(SIDES, (self.operands[0], laid.source), (packed and self.packable[0], not laid.copy))
            return {s: operand for s, operand, copied in sides if copied or s in self.ready}
        return {s: operand for s, operand, copied in sides if (packed and copied) or s in self.ready}

    def copied(self, side: str) -> Shape:
        """The sizes by which a copy is made: of the right operand ``n`` by ``k``, of the left ``m`` by ``k``."""
        return self.laid.shape if self.laid is not None and side == "right" else self.shape

    @property
    def shared(self) -> tuple[bool, bool]:
        """Which operands are one matrix for all products of a batch, in memory."""
        batch = variables(self.shape)[0]
        left, right = (isinstance(o, Load) and not depends(o, batch) for o in self.operands)
        return left, right

    @property
    def weighed(self) -> bool:
        """Whether a weight can be made ready."""
        pairs = zip(self.operands, self.shared)
        held = any(one and isinstance(o, Load) and o.buffer in self.weights for o, one in pairs)
        return held and self.shape.dtype == "f32" and self.blocks.precision in PARTED

    @property
    def ready(self) -> tuple[str, ...]:
        """The side that is copied into what is multiplied: both TF32 parts of it, or bf16.

        A convolution's input with its channels innermost is a copy of another kind, and a matrix per image.
        """
        if not self.blocks.ready or self.blocks.precision not in PARTED or self.shape.dtype != "f32":
            return ()
        sides = {side: operand for side, operand, one in zip(SIDES, self.operands, self.shared) if one}
        if self.laid is not None:
            sides.pop("right", None)
        weights = [s for s, o in sides.items() if isinstance(o, Load) and o.buffer in self.weights]
        return tuple(weights or sides)[-1:]

    @property
    def parted(self) -> str:
        """The side whose TF32 parts lie one after the other in its copy; "" if there is none."""
        return "".join(self.ready) if self.blocks.precision == "tf32x3" else ""

    def kind(self, side: str) -> str:
        """The dtype of a packed operand's copy."""
        return "bf16" if side in self.ready and not self.parted else self.shape.dtype

    def standing(self, ready: frozenset[str]) -> list[str]:
        """The sides whose copies depend on nothing but tensors that are ``ready``."""
        return [s for s, o in self.packed.items() if isinstance(o, Load) and o.buffer in ready]

    def copy(self, side: str) -> str:
        """Where a packed operand lies."""
        return (
            self.laid.copy
            if self.laid is not None and side == "right" and self.laid.copy
            else f"{self.name}_{side}"
        )

    @property
    def parts(self) -> str:
        """Where the parts' sums lie."""
        return f"{self.name}_parts"

    @property
    def taken(self) -> tuple[Expr, Expr]:
        """The operands as the kernel reads them."""
        batch, m, n, k = (of(v) if v.size != 1 else constant(0) for v in variables(self.shape))
        found = []
        for side, operand, row, rows in zip(SIDES, self.operands, (m, n), (self.shape.m, self.shape.n)):
            if self.laid is not None and side == "right":
                operand = self.laid.read(self.copy(side), n, k)
            elif side in self.packed:
                row = row + batch * rows if depends(operand, variables(self.shape)[0]) else row
                operand = Load(self.copy(side), (joined(row * self.shape.k + k),), self.kind(side))
            found.append(operand)
        return found[0], found[1]

    @property
    def described(self) -> tuple[Described | None, Described | None]:
        """Both operands as tensor descriptors, where they can be."""
        left, right = self.taken
        depth = self.blocks.k
        found = described(left, "mk", self.shape, depth), described(right, "kn", self.shape, depth)
        return _both(found[0], self.parted == "left"), _both(found[1], self.parted == "right")

    @property
    def depths(self) -> list[int]:
        """Blocks of ``k``; of a convolution, those that stay within a tap, if there are any."""
        within = [b for b in (16, 32, 64, 128) if self.window is not None and self.window.channels % b == 0]
        return within or [16, 32, 64, 128]

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.shape.m // self.blocks.m), -(-self.shape.n // self.blocks.n)

    @property
    def share(self) -> int:
        """How much of ``k`` a program sums up."""
        steps = -(-self.shape.k // self.blocks.k)
        return -(-steps // self.blocks.split) * self.blocks.k


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
        self.window: Window | None = None
        self.laid: Laid | None = None
        self.made: dict[str, Expr] = {self.product.name: self.acc}

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
        turn = self._turns(made) and self.window is None and self.laid is None
        if turn:
            made = turned(*made)
        shape, operands, index, value = made
        if shape.k < 16 or shape.batch > GRID_LIMITS[1]:
            raise Illegal("a product of thin operands, or too many")
        after = self._after()
        stores = self._stores(index, value, after)
        if not stores:
            raise Illegal("nothing is stored")
        stores, thin = self._beside(shape, stores, turn)
        reads = self._reads(stores, (*operands, *(thin.operands if thin is not None else ())))
        writes = tuple(store.buffer for store in stores)
        total = sum(x.numel * BYTES[x.dtype] for x in (*reads, *writes))
        origins = (self.step.target.split(".")[1], *(n.origin for n in self.nodes.values()))
        drafted = Product(
            writes[-1].name, shape, SMALLEST, operands, self.window, tuple(stores), reads, writes, total, self.group,
            tuple(dict.fromkeys(origins)), self.graph.precision, self.graph.weights,
            self.step.target == CONVOLUTION, self.laid, thin,
        )  # fmt: skip
        drafted = replace(drafted, blocks=replace(heuristic(drafted), turned=turn))
        blocks = chosen(drafted.blocks, drafted.choices(), self.group)
        words = blocks.words and blocks.packed and blocks.split == 1 and blocks.n >= 32
        blocks = replace(blocks, words=words, unroll=blocks.unroll and blocks.split == 1)
        if blocks.specialized:
            blocks = self._specialized(blocks)
        if blocks.m * blocks.n > 1 << 15 or blocks.m * blocks.n < 32 * blocks.warps * 2:
            raise Illegal("tiles that do not suit the warps")
        if blocks.split > 1 and blocks.persistent:
            raise Illegal("programs that share tiles do not walk over them")
        finished = replace(drafted, blocks=blocks)
        sums = blocks.sums if finished.parted else 1
        finished = replace(finished, blocks=replace(blocks, ready=bool(finished.ready), sums=sums))
        if blocks.persistent and shape.batch * math.prod(finished.tiles) <= blocks.persistent:
            raise Illegal("no more tiles than programs")
        if any(store.op for store in stores) and (blocks.split > 1 or blocks.words or self.laid is not None):
            raise Illegal("rows are reduced where tiles are finished")
        if finished.share * (blocks.split - 1) >= shape.k:
            raise Illegal("parts with nothing to sum up")
        return finished

    def _specialized(self, blocks: Blocks) -> Blocks:
        """The blocks with what specialized warps need, where nobody has asked for something else."""
        asked = dict(self.group.launch)
        blocks = replace(blocks, **{name: value for name, value in SPECIAL.items() if name not in asked})  # type: ignore[arg-type]
        walk = blocks.persistent and blocks.split == 1 and blocks.loads == "descriptors" and blocks.stages > 1
        if not walk or (blocks.m, blocks.warps) != (64, 4) or not 64 <= blocks.n <= 128 or blocks.k < 32:
            raise Illegal("warps are not specialized for such tiles")
        return blocks

    def _beside(self, shape: Shape, stores: list[Store], turn: bool) -> tuple[list[Store], Thin | None]:
        """The stores without a product that is added to this one, and that product (``thin_products``)."""
        return stores, None

    def _turns(self, made: Made) -> bool:
        """Whether to make the transposed product: of TF32 parts, the right operand's must lie along ``k``."""
        given = dict(self.group.launch).get("turned")
        if given is not None:
            return bool(given)
        shape, (left, right) = made[:2]
        parts = shape.dtype == "f32" and self.graph.precision == "strict" and min(shape.m, shape.n) >= 64
        return parts and across(right, shape) and isinstance(left, Load) and not across(left, shape)

    def _after(self) -> dict[str, Node]:
        """The nodes that read the product, directly or not; the others make its operands."""
        made, after = set(self.made), {}
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
        index = (m, n) if len(self.product.shape) == 2 else (batch, m, n)
        return shape, (left, right), index, bias

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
        call, last = Convolution.of(self.step), dict(self.group.launch).get("channels_last", False)
        window = call.window
        if dtype == "f32" and window.taps > 1 and not last:
            raise Illegal("a convolution in fp32")
        if last:
            return self._channels_last(call, dtype)
        shape = Shape(call.out[0], call.out[1], call.positions, window.taps * window.channels, dtype)
        batch, m, n, k = (of(v) if v.size != 1 else constant(0) for v in variables(shape))
        if window.taps > 1:
            plain = call.even and call.x.buffer not in self.nodes
            self.window = replace(window, pairs=call if plain else None)
        left = call.weight(self._element, m, k)
        right = call.input(self._element, batch, n, k)
        return (
            shape,
            (left, right),
            (batch, m, *places_of(n, call.out[2:])),
            self._biased(self.step.args[2], (m,)),
        )

    def _channels_last(self, call: Convolution, dtype: str) -> Made:
        """The positions of all images one after the other, which read a copy of the input."""
        if call.x.buffer in self.nodes:
            raise Illegal("the input is computed where it is read")
        window = call.window
        self.laid = call.laid(self._element, dtype)
        self.window = window if window.taps > 1 else None
        shape = Shape(1, call.out[1], call.out[0] * call.positions, window.taps * window.channels, dtype)
        _, m, n, k = (of(v) if v.size != 1 else constant(0) for v in variables(shape))
        operands = call.weight(self._element, m, k), call.input(self._element, n // call.positions, n, k)
        index = (n // call.positions, m, *places_of(n, call.out[2:]))
        return shape, operands, index, self._biased(self.step.args[2], (m,))

    def _element(self, view: View, index: tuple[Index, ...]) -> Expr:
        """The element of an operand at ``index``."""
        return element(self.graph, self.nodes, view, index)

    def _stores(self, index: tuple[Index, ...], acc: Expr, after: dict[str, Node]) -> list[Store]:
        """``index`` is where a tile's element lies in the product."""
        flat = joined(position(index, contiguous_stride(self.product.shape)))
        resolved: dict[str, Expr] = {}

        def inline(load: Load) -> Expr:
            if load.buffer in resolved:
                inner = self.nodes[load.buffer]
                if load.buffer in after and not inner.pointwise:
                    raise Illegal(f"{load.buffer} is needed when it is finished")
                return Rewriter(dict(zip(inner.vars, load.index))).expr(resolved[load.buffer])
            return load

        def read(load: Load) -> Expr:
            place = joined(position(load.index, self.graph.buffers[load.buffer].stride))
            if load.buffer in self.made:
                if place != flat:
                    raise Illegal("the product is read in another order")
                return acc if load.buffer == self.product.name else self.made[load.buffer]
            return Load(load.buffer, (place,), load.dtype)

        stores = []
        if self.product.name in self.visible or self.step.name in self.visible:
            stores.append(Store(self.product, flat, acc, index))
        for name, node in self.nodes.items():
            resolved[name] = Rewriter(load=inline).expr(node.expr)
            if name in after and not node.pointwise:
                place, binding, axis = self._row(node, index)
                expr = Rewriter(binding, read).expr(resolved[name])
                stores.append(Store(self.graph.buffers[name], place, expr, (), node.reduction or "", axis))
                continue
            if name in after and node.numel != self.product.numel:
                raise Illegal(f"{name} is no epilogue of the product")
            if name in after and name in self.visible:
                binding, step = {}, 1
                for var in reversed(node.vars):
                    binding[var] = (flat // step) % var.size if var.size != 1 else constant(0)
                    step *= var.size
                alike = node.shape == self.product.shape
                if self.laid is not None and alike:  # no remainders of large numbers
                    binding = dict(zip(node.vars, index))
                expr = Rewriter(binding, read).expr(resolved[name])
                stores.append(Store(self.graph.buffers[name], flat, expr, index if alike else ()))
        return stores

    def _row(self, node: Node, index: tuple[Index, ...]) -> tuple[Index, dict[Var, Index], str]:
        """Where the value of a product's row lies, the loops of the node that reduces it, and the tile's axis."""
        shape, along = self.product.shape, index[-1].terms
        reduced = [r for r in node.rvars if r.size != 1]
        if node.scan is not None or node.reduction not in ("sum", "max", "min") or len(reduced) != 1:
            raise Illegal(f"{node.name} is no epilogue of the product")
        var = along[0][0] if len(along) == 1 and index[-1] == of(along[0][0]) else None
        if (
            not isinstance(var, Var)
            or reduced[0].size != shape[-1]
            or node.numel * shape[-1] != self.product.numel
        ):
            raise Illegal(f"{node.name} reduces no rows of the product")
        place = joined(position(index[:-1], contiguous_stride(shape[:-1])))
        binding, step = {r: index[-1] if r is reduced[0] else constant(0) for r in node.rvars}, 1
        for own in reversed(node.vars):
            binding[own] = (place // step) % own.size if own.size != 1 else constant(0)
            step *= own.size
        return place, binding, var.name

    def _reads(self, stores: list[Store], operands: tuple[Expr, ...]) -> tuple[Buffer, ...]:
        names: dict[str, None] = {}
        for node in walk(*operands, *(store.expr for store in stores)):
            if isinstance(node, (Load, Search)) and node.buffer != self.product.name:
                names[node.buffer] = None
        if any(name in self.nodes for name in names):
            raise Illegal("a node is needed in memory")
        return tuple(self.graph.buffers[name] for name in names)


def _both(view: Described | None, parted: bool) -> Described | None:
    """The descriptor of both parts of an operand, one below the other."""
    if view is None or not parted:
        return view
    return replace(view, shape=(2 * view.shape[0], view.shape[1]))


Made = tuple[Shape, tuple[Expr, Expr], tuple[Index, ...], Expr]
"""The product's sizes, its operands, its element's index in the result, and its value with the bias."""


def places_of(n: Index, sizes: tuple[int, ...]) -> list[Index]:
    """Where the position ``n`` lies in each spatial dimension."""
    return [(n // math.prod(sizes[d + 1 :])) % size for d, size in enumerate(sizes)]


def turned(shape: Shape, operands: tuple[Expr, Expr], index: tuple[Index, ...], value: Expr) -> Made:
    """The transposed product: rows become columns."""
    _, m, n, _ = variables(shape)
    after = replace(shape, m=shape.n, n=shape.m)
    _, rows, columns, _ = variables(after)
    change = Rewriter({m: of(columns), n: of(rows)})
    left, right = (change.expr(operand) for operand in operands)
    return after, (right, left), change.indices(index), change.expr(value)


def widened(expr: Expr) -> Expr:
    """In the dtype that halves are computed in."""
    return cast(expr, "f32")
