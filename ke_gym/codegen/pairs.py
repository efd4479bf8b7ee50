"""Products of a few rows with each other, one sample a warp. Language-independent.

What is summed over is contiguous in both operands, so that a thread's part of a tensor core's operand may be any of its
elements, if only both operands agree: each thread loads 16 bytes at a time into registers, and shared memory is not
needed. Where there are bulk copies, they bring a warp's next samples into shared memory instead, while it multiplies. A
second product, by a matrix that all samples share, may follow (pairwise interactions of features, compressed).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ke_gym.codegen import products
from ke_gym.codegen.attend import products_of
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import BYTES, Expr, Var, of
from ke_gym.codegen.graph import Extern, Graph, Node, View, contiguous_stride
from ke_gym.codegen.operands import Shape, variables
from ke_gym.codegen.product_blocks import FILL
from ke_gym.codegen.schedule import Group
from ke_gym.codegen.tensor_cores import Kernel, around
from ke_gym.codegen.tiles import chosen, joined
from ke_gym.codegen.windows import LANGUAGE, REGISTERS, SHARED, round_up

ROWS = 64  # of an operand, at most
WORDS = 128  # registers of a thread for the operands, at most
SHARED_WORDS = 64  # and for the matrix that samples share
STEP = 32  # elements of a row that a quad of threads loads at once
BULK = ("sm_90", "sm_90a", "sm_100a")  # GPUs that have bulk copies, and this much shared memory
PART = 64  # elements of a row of a swizzled tile: 128 bytes
SUMS = 72  # registers of a thread for sums, at most, where bulk copies bring the operands
# Those it needs besides sums, the shared matrix and a step's operands to compile without spills (as NVRTC does),
# and those it needs more if rows do not all have sums at once.
WORKING, AGAIN = 20, 36
RESERVED = 1 << 10  # bytes of shared memory that a block takes besides its own


@dataclass(frozen=True)
class Blocks:
    """``warps`` of a block, each of which takes one sample after the other; ``persistent`` blocks, at most.

    ``loads``: "pointers" (a sample is loaded into registers) or "descriptors" (bulk copies bring it into one of its
    warp's ``stages`` of shared memory).
    """

    warps: int
    persistent: int
    stages: int = 1
    loads: str = "pointers"
    language: str = LANGUAGE


@dataclass(frozen=True)
class Pairs(Kernel):
    """What one kernel does: ``left`` (samples, rows, k) by ``right`` (samples, rows, k), then by ``after`` (rows, columns).

    ``shape`` is that of the first product; ``matrix`` an expression of ``n`` and ``c``, an element of ``after``.
    ``fetched``: whether bulk copies can bring the operands.
    """

    blocks: Blocks
    left: View
    right: View
    after: View | None
    matrix: Expr | None
    fetched: bool

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        return {
            "warps": [1, 2, 4, 8, *([16] if self.bulk else [])],
            "persistent": [FILL * n for n in (1, 2, 4, 8)],
            "stages": [1, 2, 3, 4] if self.bulk else [1],
            "loads": ["pointers", "descriptors"] if self.fetched else ["pointers"],
            "language": [LANGUAGE],
        }

    @property
    def same(self) -> bool:
        """Whether both operands are the same rows."""
        return self.left == self.right

    @property
    def columns(self) -> int:
        """Of the result."""
        return self.shape.n if self.after is None else self.after.shape[1]

    @property
    def ordered(self) -> bool:
        """Whether the result is one tensor of halves, written as it is computed."""
        batch, m, c = (
            of(Var("batch", self.shape.batch)),
            of(Var("m", self.shape.m)),
            of(Var("c", self.columns)),
        )
        order = joined((batch * self.shape.m + m) * self.columns + c)
        return (
            len(self.stores) == 1
            and BYTES[self.stores[0].buffer.dtype] == 2
            and self.stores[0].place == order
        )

    @property
    def words(self) -> tuple[int, int]:
        """Registers of a thread for the operands, and for the shared matrix."""
        rows = eights(self.shape.m) + (0 if self.same else eights(self.shape.n))
        shared = 0 if self.after is None else 2 * -(-self.shape.n // 16) * eights(self.columns)
        return rows * self.shape.k // STEP * 4, shared

    @property
    def bulk(self) -> bool:
        """Whether bulk copies bring the operands."""
        return self.blocks.loads == "descriptors"

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.blocks.warps

    @property
    def tiles(self) -> tuple[int, int]:
        """Bytes of shared memory for ``PART`` columns of each operand; none for the right one if it is the left one."""
        left, right = (round_up(rows * PART * 2, 1024) for rows in (self.shape.m, self.shape.n))
        return left, 0 if self.same else right

    @property
    def slot(self) -> int:
        """Bytes of shared memory for a sample."""
        return sum(self.tiles) * -(-self.shape.k // PART)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block, barriers included."""
        return self.blocks.warps * self.blocks.stages * (self.slot + 8) if self.bulk else 0

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor is to hold at once, at least; 0: the compiler chooses."""
        return self.blocks.persistent // FILL if self.bulk else 0

    @property
    def height(self) -> int:
        """How many times 16 rows have sums at once, where bulk copies bring the operands."""
        times, wide = -(-self.shape.m // 16), 4 * eights(self.shape.n)
        return max(h for h in range(1, times + 1) if times % h == 0 and (h == 1 or h * wide <= SUMS))

    @property
    def once(self) -> bool:
        """Whether all rows have sums at once."""
        return 16 * self.height >= self.shape.m

    @property
    def fits(self) -> bool:
        """Whether a multiprocessor's shared memory and registers hold what bulk copies bring and what is made of it."""
        columns = eights(self.shape.n)
        operands = 4 * -(-columns // 2) + (0 if self.same and self.once else 4)
        working = WORKING + (0 if self.once else AGAIN)
        held = 4 * self.height * columns + self.words[1] + operands + working
        room = self.resident * (self.shared + RESERVED) <= SHARED + RESERVED
        return room and held <= min(REGISTERS // (self.threads * self.resident), 255)


class Builder(products.Builder):
    """Builds the ``Pairs`` of a group of one product or two; raises ``Illegal`` if they are no such ones."""

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        self.graph, self.group, self.visible = graph, group, visible
        self.first, *rest = products_of(graph, group.nodes)
        self.step: Extern = rest[0] if rest else self.first
        self.nodes = {n: s for n in group.nodes if isinstance(s := graph.steps[n], Node)}
        self.product, self.window, self.laid = self.step.outputs[0], None, None
        self.made = {self.product.name: self.acc}
        if len(rest) > 1 or self.first.target != "aten.bmm.default" or self.first.kwargs or self.step.kwargs:
            raise Illegal("products of matrices are the library's in CUDA C++")

    def build(self) -> Any:
        left, turned = self.first.args
        right = View(
            turned.buffer, (turned.shape[0], turned.shape[2], turned.shape[1]),
            (turned.stride[0], turned.stride[2], turned.stride[1]), turned.offset,
        )  # fmt: skip
        kinds = {self.graph.buffers[v.buffer].dtype for v in (left, right)}
        if len(kinds) != 1 or not kinds <= {"bf16", "f16"} or {left.buffer, right.buffer} & set(self.nodes):
            raise Illegal("operands of these dtypes, or computed ones")
        shape = Shape(left.shape[0], left.shape[1], right.shape[1], left.shape[2], kinds.pop())
        if not all(self._aligned(view) for view in (left, right)) or shape.k % STEP:
            raise Illegal("rows that are no whole vectors")
        after = self._after_first(shape) if self.step is not self.first else None
        columns = shape.n if after is None else after.shape[1]
        later = self._after()
        if len(later) < len(self.nodes):
            raise Illegal("an operand is computed")
        batch, m, c = (of(Var(*v)) for v in (("batch", shape.batch), ("m", shape.m), ("c", columns)))
        index = (batch * shape.m + m, c) if len(self.product.shape) == 2 else (batch, m, c)
        stores = tuple(self._stores(index, self.acc, later))
        if any(store.op for store in stores):
            raise Illegal("rows are reduced")
        if not stores or self.product.stride != contiguous_stride(self.product.shape):
            raise Illegal("results in another order, or none")
        matrix = self._element(after, (of(variables(shape)[2]), c)) if after is not None else None
        more = (matrix, matrix) if matrix is not None else (self.acc, self.acc)
        first = tuple(dict.fromkeys((left.buffer, right.buffer)))
        drafted = Pairs(
            **around(self, (self.first, self.step), shape, stores, more, first),
            blocks=Blocks(4, 4 * FILL), left=left, right=right, after=after, matrix=matrix,
            fetched=self.graph.arch in BULK and all(min(view.stride) > 0 for view in (left, right)),
        )  # fmt: skip
        if max(shape.m, shape.n) > ROWS or drafted.words[0] > WORDS or drafted.words[1] > SHARED_WORDS:
            raise Illegal("more rows than registers hold")
        if dict(self.group.launch).get("loads") != "pointers":
            drafted = brought(drafted)
        found = replace(drafted, blocks=chosen(drafted.blocks, drafted.knobs(), self.group))
        if found.bulk and not found.fits:
            raise Illegal("more than shared memory or registers hold")
        return found

    def _aligned(self, view: View) -> bool:
        """Whether rows are contiguous and begin at multiples of 16 bytes."""
        return view.stride[2] == 1 and not any(n % 8 for n in (*view.stride[:2], view.offset))

    def _after_first(self, shape: Shape) -> View:
        """The matrix by which the first product's rows are multiplied."""
        between, matrix = self.step.args[:2]
        made = self.first.outputs[0]
        rows = View(made.name, (shape.batch * shape.m, shape.n), (shape.n, 1), 0)
        if (
            self.step.target != "aten.mm.default"
            or between != rows
            or made.stride != contiguous_stride(made.shape)
        ):
            raise Illegal("products that do not follow each other")
        if self.visible & {made.name, self.first.name} or matrix.buffer in self.nodes:
            raise Illegal("what lies between the products is needed elsewhere")
        if self.graph.buffers[matrix.buffer].dtype != shape.dtype:
            raise Illegal("products of different dtypes")
        return View(matrix.buffer, matrix.shape, matrix.stride, matrix.offset)


def brought(pairs: Pairs) -> Pairs:
    """``pairs`` with its samples brought by bulk copies, with as many warps and copies under way as fit; as it is, if they
    cannot bring them."""
    if not pairs.fetched:
        return pairs
    for warps in (16, 8, 4, 2, 1):
        for stages in (2, 1):
            draft = replace(pairs, blocks=Blocks(warps, FILL, stages, "descriptors"))
            if draft.fits and (warps == 1 or pairs.shape.batch >= FILL * warps):
                return draft
    return pairs


def eights(size: int) -> int:
    """How many tiles of eight rows or columns hold ``size``."""
    return -(-size // 8)
