"""A product of matrices whose tiles bulk copies bring into shared memory, swizzled, for Hopper's warpgroup products.

One warp asks for tiles, one or two warpgroups multiply those that have come. Language-independent.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ke_gym.codegen import pairs, products, windows
from ke_gym.codegen.convolutions import Convolution
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import BYTES, Expr, Index, Load, constant, of
from ke_gym.codegen.graph import View, contiguous_stride
from ke_gym.codegen.operands import Described, Shape, described, variables
from ke_gym.codegen.product_blocks import DEEP, FILL, SHARE, SPLITS
from ke_gym.codegen.products import Made, places_of, turned
from ke_gym.codegen.tensor_cores import Kernel, around
from ke_gym.codegen.tiles import chosen, depends, joined
from ke_gym.codegen.windows import LANGUAGE, REGISTERS, SHARED, needs_hopper

ROW = 128  # bytes of a swizzled row
SIDES = ("left", "right")
SUMS = 128  # registers of a thread for its part of a tile, at most
WORKING = 32  # and those it needs besides, at least
TRUNCATED = ("tf32", "bf16")  # policies that permit products of fp32 operands in TF32


@dataclass(frozen=True)
class Blocks:
    """Tiles of ``m`` x ``n``, ``k`` at a time, of which ``stages`` are in shared memory; ``warps`` that multiply.

    ``group`` rows of tiles are walked together, so that they share operands. ``split``: blocks that share a tile, each
    with its part of ``k``; a second kernel adds their sums up, always in the same order. ``persistent``: blocks that
    walk over all tiles (0: a block a tile). ``turned``: the transposed product. ``language``: a kernel in CUDA C++,
    whatever the others are in.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1
    persistent: int = 0
    turned: bool = False
    language: str = LANGUAGE


DRAFTS = (
    Blocks(128, 256, 64, 8, 3), Blocks(128, 128, 64, 8, 3), Blocks(128, 64, 64, 8, 4), Blocks(64, 64, 64, 4, 5),
    Blocks(64, 32, 64, 4, 6), Blocks(64, 16, 64, 4, 6),
)  # fmt: skip


@dataclass(frozen=True)
class Matmul(Kernel):
    """What one kernel does: the ``operands`` (batch, m, k) and (batch, k, n), fetched as ``tiles`` of three dimensions.

    Of an operand that is computed, or must be transposed for TF32, there is no tile: threads bring it, element by element.
    """

    blocks: Blocks
    operands: tuple[Expr, Expr]
    tiles: tuple[Described | None, Described | None]

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        shape, deep = self.shape, ROW // self.size
        choices: dict[str, list[Any]] = {
            "m": [m for m in (64, 128, 256) if m < 2 * max(shape.m, 33)],
            "n": [n for n in (16, 32, 64, 128, 256) if n < 2 * max(shape.n, 9)],
            "k": [deep, 2 * deep],
            "warps": [4, 8],
            "stages": [2, 3, 4, 5, 6],
            "split": [s for s in SPLITS if s == 1 or shape.k >= SHARE * s],
            "turned": [False, True],
            "language": [LANGUAGE],
        }
        if shape.m > self.blocks.m and shape.n > self.blocks.n:
            choices["group"] = [1, 4, 8, 16]
        if shape.batch * -(-shape.m // 64) * -(-shape.n // 16) > FILL:
            choices["persistent"] = [0, FILL, 2 * FILL]
        return choices

    @property
    def size(self) -> int:
        """Bytes of an operand's element."""
        return BYTES[self.shape.dtype]

    @property
    def turned(self) -> tuple[str, ...]:
        """The operands in which what is summed over is not contiguous."""
        return tuple(
            side for side, tile in zip(SIDES, self.tiles) if tile is not None and tile.axes[-1] != "k"
        )

    @property
    def threads(self) -> int:
        """Of a block: those that multiply, and a warp that asks for tiles, or four that bring them."""
        return 32 * (self.blocks.warps + (4 if None in self.tiles else 1))

    @property
    def heights(self) -> int:
        """How many times 64 rows a warpgroup takes."""
        return self.blocks.m // (16 * self.blocks.warps)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.shape.m // self.blocks.m), -(-self.shape.n // self.blocks.n)

    @property
    def count(self) -> int:
        """How many tiles there are, those of parts of ``k`` counted each."""
        return math.prod(self.grid) * self.shape.batch * self.blocks.split

    @property
    def steps(self) -> int:
        """Tiles along ``k``."""
        return -(-self.shape.k // self.blocks.k)

    @property
    def share(self) -> int:
        """How many of the steps a block takes."""
        return -(-self.steps // self.blocks.split)

    @property
    def sections(self) -> tuple[int, int, int]:
        """Bytes of shared memory: of a stage the left tile and the right one, and of results beside the stages.

        Blocks that take one tile each put the results where the operands were.
        """
        across = self.blocks.n if "right" not in self.turned else -(-self.blocks.n // 64) * 64
        results = self.blocks.m * self.blocks.n * 2 if self.sent and self.blocks.persistent else 0
        return self.blocks.m * self.blocks.k * self.size, across * self.blocks.k * self.size, results

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block, barriers included."""
        left, right, results = self.sections
        return self.blocks.stages * (left + right + 16) + results

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor is to hold at once: two, so that one multiplies while the other stores; or one.

        0: not even one fits. A quarter of the registers, and of the warps, belongs to each of its four schedulers.
        """
        sums, warps = self.heights * self.blocks.n // 2, self.threads // 32
        held = [REGISTERS // 4 // (32 * -(-blocks * warps // 4)) // 8 * 8 for blocks in (1, 2)]
        fitting = [min(each, 255) >= sums + WORKING for each in held]
        return next((b for b in (2, 1) if b * self.shared <= SHARED and fitting[b - 1]), 0)

    @property
    def order(self) -> Index:
        """Where an element of the product is if they follow each other."""
        batch, m, n = (of(v) if v.size != 1 else constant(0) for v in variables(self.shape)[:3])
        return joined((batch * self.shape.m + m) * self.shape.n + n)

    @cached_property
    def sent(self) -> bool:
        """Whether bulk copies can take the results away: one tensor of halves, in the order of the tiles."""
        halves = all(s.buffer.dtype in ("bf16", "f16") and s.place == self.order for s in self.stores)
        return len(self.stores) == 1 and halves and self.shape.n % 8 == 0 and self.blocks.n % 64 == 0

    @cached_property
    def paired(self) -> bool:
        """Whether a thread can store two neighbours at once: of one tensor of floats."""
        (store, *more) = self.stores
        return not more and store.buffer.dtype in ("f32", "bf16", "f16") and self.neighbours(store.place)

    def neighbours(self, place: Index) -> bool:
        """Whether an even column and the next one have an even place and the next one."""
        n = variables(self.shape)[2]
        rest = place - of(n)
        even = rest.const % 2 == 0 and not any(c % 2 for _, c in rest.terms)
        return self.shape.n % 2 == 0 and even and not depends(rest, n)


class Builder(products.Builder):
    """Builds the ``Pairs`` of a group of one product, or a convolution's ``Windowed``, or else a ``Matmul``; raises ``Illegal``
    if it is the library's."""

    def build(self) -> Any:
        convolves = self.step.target == products.CONVOLUTION
        with contextlib.suppress(Illegal):
            first = windows.Builder if convolves else pairs.Builder
            return first(self.graph, self.group, self.visible).build()
        needs_hopper(self.graph)
        if self.step.kwargs:
            raise Illegal("a scaled product as a product of matrices in CUDA C++")
        a, b = self.step.args[1:3] if self.step.target == products.BIASED else self.step.args[:2]
        dtypes = {self.graph.buffers[v.buffer].dtype for v in (a, b)}
        if len(dtypes) != 1 or not dtypes <= {"f32", "bf16", "f16"}:
            raise Illegal("operands of these dtypes")
        if dtypes == {"f32"} and self.graph.precision not in TRUNCATED:
            raise Illegal("products in full fp32 are the library's in CUDA C++")
        if self.product.stride != contiguous_stride(self.product.shape):
            raise Illegal("the product is stored in another order")
        made = self._windows(dtypes.pop()) if convolves else self._matrices(a, b, dtypes.pop())
        turn = dict(self.group.launch).get("turned", made[0].m < 64 <= made[0].n)
        shape, operands, index, value = turned(*made) if turn else made
        if shape.k < 16:
            raise Illegal("a product of thin operands")
        stores = tuple(self._stores(index, value, self._after()))
        if not stores or any(store.op for store in stores):
            raise Illegal("nothing is stored, or rows are reduced")
        drafted = Matmul(
            **around(self, [self.step], shape, stores, operands), operands=operands, tiles=tiled(operands, shape, convolves),
            blocks=replace(DRAFTS[-1], k=ROW // BYTES[shape.dtype]),
        )  # fmt: skip
        drafted = replace(drafted, blocks=replace(heuristic(drafted), turned=turn))
        return checked(replace(drafted, blocks=chosen(drafted.blocks, drafted.knobs(), self.group)))

    def _windows(self, dtype: str) -> Made:
        """A convolution as the product of its weights, as they lie, and what positions see: taps innermost."""
        call = Convolution.of(self.step)
        window, (count, *_) = call.window, call.w.shape
        deep = window.taps * window.channels
        if call.w.stride != contiguous_stride(call.w.shape):
            raise Illegal("weights that are stored in another order")
        shape = Shape(call.out[0], count, call.positions, deep, dtype)
        batch, m, n, k = (of(v) if v.size != 1 else constant(0) for v in variables(shape))
        left = self._element(View(call.w.buffer, (count, deep), (deep, 1), call.w.offset), (m, k))
        seen = self._points(call)
        right = (
            self._element(seen, (batch, k, n))
            if seen is not None
            else call.seen(self._element, batch, n, k // window.taps, k % window.taps)
        )
        places = (batch, m, *places_of(n, call.out[2:]))
        return shape, (left, right), places, self._biased(self.step.args[2], (m,))

    def _points(self, call: Convolution) -> View | None:
        """The input as a matrix for each image, where every position sees itself alone."""
        sizes = call.x.shape[2:]
        alone = call.window.taps == 1 and set(call.stride) == {1} and not any(call.padding)
        if not alone or call.x.stride[2:] != contiguous_stride(sizes) or call.x.buffer in self.nodes:
            return None
        return View(
            call.x.buffer, (*call.x.shape[:2], math.prod(sizes)), (*call.x.stride[:2], 1), call.x.offset
        )


def tiled(
    operands: tuple[Expr, Expr], shape: Shape, scattered: bool = False
) -> tuple[Described | None, Described | None]:
    """The operands as tensors of three dimensions, (batch, outer, inner), that bulk copies take tiles of.

    ``scattered``: one that lies otherwise in memory is brought element by element.
    """
    found: list[Described | None] = []
    for operand, axes in zip(operands, ("mk", "kn")):
        view, begin = None, 0
        if isinstance(operand, Load):
            begin = operand.index[0].const
            view = described(Load(operand.buffer, (operand.index[0] - begin,), operand.dtype), axes, shape, 1)
            apart = view is None or begin * BYTES[shape.dtype] % 16
            if apart and scattered:
                view = None
            elif apart:
                raise Illegal("an operand whose rows do not begin at multiples of 16 bytes")
        if view is None or (shape.dtype == "f32" and view.axes[-1] != "k"):
            found.append(None)
            continue
        if view.batch != "apart":
            batches = shape.batch if view.batch else 1
            rows, step = view.shape[0] // batches, view.stride[0]
            view = replace(view, shape=(batches, rows, view.shape[1]), stride=(rows * step, step, 1))
        found.append(replace(view, offset=begin))
    if found == [None, None]:
        raise Illegal("no operand is fetched")
    return found[0], found[1]


def checked(matmul: Matmul) -> Matmul:
    """``matmul``; raises ``Illegal`` if its blocks do not go together."""
    blocks = matmul.blocks
    if not 0 < matmul.heights * blocks.n // 2 <= SUMS or matmul.resident < 1:
        raise Illegal("tiles that do not suit the warps, or more than registers or shared memory hold")
    if blocks.split > 1 and blocks.persistent:
        raise Illegal("blocks that share tiles do not walk over them")
    if blocks.persistent and matmul.count <= blocks.persistent:
        raise Illegal("no more tiles than blocks")
    if matmul.share * (blocks.split - 1) >= matmul.steps:
        raise Illegal("parts with nothing to sum up")
    return matmul


def heuristic(matmul: Matmul) -> Blocks:
    """Large tiles where there are enough of them to fill the device, else smaller ones, or parts of ``k``."""
    shape, deep = matmul.shape, matmul.blocks.k
    most = max([s for s in SPLITS if shape.k >= DEEP * s], default=1)
    fitting = [b for b in DRAFTS if b.m < 2 * max(shape.m, 33) and b.n < 2 * max(shape.n, 9)] or [DRAFTS[-1]]
    drafts = [replace(matmul, blocks=replace(blocks, k=deep)) for blocks in fitting]
    found = next((draft for draft in drafts if draft.count * most >= FILL), drafts[-1])
    split = next((s for s in SPLITS if found.count * s >= FILL), most)
    persistent = FILL if found.count > 2 * FILL and found.blocks.n == 256 else 0
    return replace(found.blocks, split=min(split, most), persistent=persistent)
