"""A convolution along one axis whose input lies in shared memory, a row for each position: a tap is a shift by rows.

Memory is contiguous along positions, tensor cores want what is summed over (channels) contiguous: a block transposes
each tile of the input once. Weights stay in shared memory while the block walks over tiles. Language-independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ke_gym.codegen import products
from ke_gym.codegen.convolutions import Convolution
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import BYTES, Expr, Var, of
from ke_gym.codegen.graph import HOPPER, Graph, View, contiguous_stride
from ke_gym.codegen.operands import Shape, variables
from ke_gym.codegen.product_blocks import FILL
from ke_gym.codegen.tensor_cores import Kernel, around
from ke_gym.codegen.tiles import chosen, joined

SHARED = 227 << 10  # bytes of shared memory that a block may have
WIDEST = 248  # positions and halo of a tile: bulk copies take up to 256, some of them padding
LANGUAGE = "cuda"  # that has the instructions
REGISTERS = 65536  # of a multiprocessor
WORKING = 26  # of a thread, besides its sums
STAGED = 2  # transposed tiles: one is multiplied while the next is made


@dataclass(frozen=True)
class Blocks:
    """A block of threads computes ``m`` output channels at ``n`` positions, tile after tile.

    ``loads``: "descriptors" (bulk copies of tiles, ``stages`` of them under way) or "pointers" (element by element).
    ``persistent``: blocks that share the tiles. ``apart``: results do not take the place of the tile that they were
    made from, so that the warpgroups need not wait for each other. ``language``: a kernel in CUDA C++, whatever the
    others are in.
    """

    m: int
    n: int
    stages: int
    persistent: int
    loads: str
    apart: bool = False
    language: str = LANGUAGE


@dataclass(frozen=True)
class Windowed(Kernel):
    """What one kernel does.

    ``weight`` is an expression of ``m``, ``tap`` and ``c``, ``input`` of ``batch``, ``c`` and position ``p``, wherever
    there is one: everything else is zero. ``source`` is the input as a tensor in memory.
    """

    call: Convolution
    blocks: Blocks
    weight: Expr
    input: Expr
    source: View | None

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        count = self.tiles[1] * self.shape.batch
        return {
            "m": [m for m in (64, 128, 192) if m < self.shape.m + 64],
            "n": list(dict.fromkeys(self._positions(parts) for parts in self._parts())),
            "stages": [1, 2, 3],
            "persistent": [FILL, *([2 * FILL] if count > FILL else [])],
            "language": [LANGUAGE],
            "apart": [False, True] if self.sent else [False],
            "loads": ["pointers", "descriptors"] if self.fetched else ["pointers"],
        }

    def _parts(self) -> range:
        least = -(-self.shape.n // self._most)
        return range(least, 2 * least + 1)

    def _positions(self, parts: int) -> int:
        """Positions of a tile where a sample has so many: an odd number of eights, which spreads over all banks."""
        return min(odd(-(-self.shape.n // parts)), self._most)

    @property
    def _most(self) -> int:
        """Positions of the largest tile."""
        eights = (WIDEST - self.halo - 7) // 8
        return 8 * (eights - 1 + eights % 2)

    @property
    def halo(self) -> int:
        """Positions that a tile's last window reaches beyond the tile."""
        return (self.call.w.shape[2] - 1) * self.call.dilation[0]

    @property
    def lead(self) -> int:
        """Positions that a copied tile begins early: bulk copies begin at multiples of 16 bytes."""
        return -self.call.padding[0] % 8 if self.blocks.loads == "descriptors" else 0

    @property
    def fetched(self) -> bool:
        """Whether bulk copies can bring the input's tiles: its rows begin at multiples of 16 bytes."""
        return self.source is not None and not any(s % 8 for s in self.source.stride[:-1])

    @property
    def sent(self) -> bool:
        """Whether bulk copies can take the results away."""
        batch, m, n = (of(v) for v in variables(self.shape)[:3])
        order = joined((batch * self.shape.m + m) * self.shape.n + n)
        halves = all(BYTES[store.buffer.dtype] == 2 and store.place == order for store in self.stores)
        return len(self.stores) == 1 and halves and self.shape.n % 8 == 0

    @property
    def depth(self) -> int:
        """Channels, with zeros for those that fill up a step of 16."""
        return -(-self.call.w.shape[1] // 16) * 16

    @property
    def span(self) -> int:
        """Rows of a transposed tile: its positions, the halo, and those that it begins early."""
        return -(-(self.blocks.n + self.halo + self.lead) // 8) * 8

    @property
    def width(self) -> int:
        """Elements of a row of a tile as it is copied: an odd number of eights."""
        return odd(self.span)

    @property
    def threads(self) -> int:
        """Of a block: a warpgroup for each 64 output channels, and one that brings tiles."""
        return 128 * (self.blocks.m // 64 + 1)

    @property
    def height(self) -> int:
        """Output channels of a block, as far as there are any: steps of 16."""
        return min(self.blocks.m, -(-self.shape.m // 16) * 16)

    @property
    def tiles(self) -> tuple[int, int]:
        """Blocks along output channels, and tiles along the positions of a sample."""
        return -(-self.shape.m // self.blocks.m), -(-self.shape.n // self.blocks.n)

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """Bytes of shared memory for the weights, one copied tile, one transposed tile, and results apart from it."""
        weights = self.call.window.taps * self.depth * (self.height + 1) * 2
        copied = self.depth * self.width * 2 if self.blocks.loads == "descriptors" else 0
        results = self.height * self.blocks.n * 2 if self.sent else 0
        tile = self.depth * self.span * 2
        if self.blocks.apart:
            return round_up(weights, 128), copied, tile, results
        return round_up(weights, 128), copied, max(tile, results), 0

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block, barriers included, and all that the products read of.

        These take 64 rows of weights where there are fewer: what they make of the others is dropped.
        """
        weights, copied, staged, results = self.sections
        tiles = self.blocks.stages * copied + STAGED * staged
        steps = self.call.window.taps * self.depth // 8
        read = ((steps - 1) * (self.height + 1) + self.blocks.m) * 16
        return max(weights + tiles + results + 8 * (self.blocks.stages + 2 * STAGED), read)


class Builder(products.Builder):
    """Builds the ``Windowed`` of a group; raises ``Illegal`` if it is no such convolution."""

    def build(self) -> Any:
        if self.step.target != products.CONVOLUTION or self.step.kwargs:
            raise Illegal("in CUDA C++, products of matrices are the library's")
        needs_hopper(self.graph)
        call = Convolution.of(self.step)
        dtypes = {self.graph.buffers[v.buffer].dtype for v in (call.x, call.w)}
        if len(call.out) != 3 or call.stride != (1,) or len(dtypes) != 1 or not dtypes <= {"bf16", "f16"}:
            raise Illegal("a convolution of this kind in CUDA C++")
        if self.product.stride != contiguous_stride(self.product.shape):
            raise Illegal("the product is stored in another order")
        window = call.window
        shape = Shape(call.out[0], call.out[1], call.positions, window.taps * window.channels, dtypes.pop())
        batch, m, n = (of(v) for v in variables(shape)[:3])
        tap, c, p = (
            of(Var(*v)) for v in (("tap", window.taps), ("c", window.channels), ("p", call.x.shape[2]))
        )
        value = self._biased(self.step.args[2], (m,))
        stores = self._stores((batch, m, n), value, self._after())
        if not stores or any(store.op for store in stores):
            raise Illegal("nothing is stored, or rows are reduced")
        weight, given = self._element(call.w, (m, c, tap)), self._element(call.x, (batch, c, p))
        whole = call.x.stride == contiguous_stride(call.x.shape) and call.x.offset == 0
        plain = (
            whole
            and call.x.buffer not in self.nodes
            and self.graph.buffers[call.x.buffer].numel == math.prod(call.x.shape)
        )
        drafted = Windowed(
            **around(self, [self.step], shape, stores, (weight, given)), call=call,
            blocks=Blocks(64, 8, 2, FILL, "pointers"), weight=weight, input=given, source=call.x if plain else None,
        )  # fmt: skip
        if drafted.depth > 256 or drafted.halo > WIDEST - 16 - 7 or min(window.channels, shape.m) < 16:
            raise Illegal("a convolution of this size in CUDA C++")
        drafted = replace(drafted, blocks=heuristic(drafted))
        blocks = chosen(drafted.blocks, drafted.knobs(), self.group)
        finished = replace(drafted, blocks=blocks)
        if finished.shared > SHARED or blocks.n // 2 + WORKING > REGISTERS // finished.threads:
            raise Illegal("more than shared memory or registers hold")
        return finished


def needs_hopper(graph: Graph) -> None:
    """Raises ``Illegal`` if the GPU that ``graph`` is for has no warpgroup products."""
    if graph.arch != HOPPER:
        raise Illegal(f"warpgroup products are instructions of {HOPPER}, not of {graph.arch}")


def heuristic(windowed: Windowed) -> Blocks:
    """All output channels and whole samples if they fit; as many copies under way as there is room for."""
    knobs = windowed.knobs()
    loads = knobs["loads"][-1]
    drafts = [
        Blocks(m, n, stages, FILL, loads)
        for m in sorted((m for m in knobs["m"] if m <= 128), reverse=True)
        for n in knobs["n"]
        for stages in (2, 1)
    ]
    fitting = (blocks for blocks in drafts if replace(windowed, blocks=blocks).shared <= SHARED)
    return next(fitting, drafts[-1])


def odd(size: int) -> int:
    """The least odd number of eights that holds ``size``."""
    eights = -(-size // 8)
    return 8 * (eights + 1 - eights % 2)


def round_up(size: int, step: int) -> int:
    """The least multiple of ``step`` that is not smaller."""
    return -(-size // step) * step
