"""Products of a few rows with each other, one sample a warp: everything stays in registers. Language-independent.

What is summed over is contiguous in both operands, so that a thread's part of a tensor core's operand may be any of its
elements, if only both operands agree: each thread loads 16 bytes at a time, and shared memory is not needed. A second
product, by a matrix that all samples share, may follow (pairwise interactions of features, compressed).
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
from ke_gym.codegen.windows import LANGUAGE

ROWS = 64  # of an operand, at most
WORDS = 128  # registers of a thread for the operands, at most
SHARED_WORDS = 64  # and for the matrix that samples share
STEP = 32  # elements of a row that a quad of threads loads at once


@dataclass(frozen=True)
class Blocks:
    """``warps`` of a block, each of which takes one sample after the other; ``persistent`` blocks, at most."""

    warps: int
    persistent: int
    language: str = LANGUAGE


@dataclass(frozen=True)
class Pairs(Kernel):
    """What one kernel does: ``left`` (samples, rows, k) by ``right`` (samples, rows, k), then by ``after`` (rows, columns).

    ``shape`` is that of the first product; ``matrix`` an expression of ``n`` and ``c``, an element of ``after``.
    """

    blocks: Blocks
    left: View
    right: View
    after: View | None
    matrix: Expr | None

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        return {"warps": [1, 2, 4, 8], "persistent": [FILL * n for n in (1, 2, 4, 8)], "language": [LANGUAGE]}

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
        )  # fmt: skip
        if max(shape.m, shape.n) > ROWS or drafted.words[0] > WORDS or drafted.words[1] > SHARED_WORDS:
            raise Illegal("more rows than registers hold")
        return replace(drafted, blocks=chosen(drafted.blocks, drafted.knobs(), self.group))

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


def eights(size: int) -> int:
    """How many tiles of eight rows or columns hold ``size``."""
    return -(-size // 8)
