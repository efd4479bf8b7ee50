"""What a product's kernel reads: an operand's element by its index, its tiles by a descriptor, or a copy in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import BYTES, Expr, Index, Load, Rewriter, Var, constant
from ke_gym.codegen.graph import Graph, Node, View, contiguous_stride
from ke_gym.codegen.tiles import joined


@dataclass(frozen=True)
class Shape:
    """``batch`` products of ``m`` x ``k`` by ``k`` x ``n``, of operands in ``dtype``."""

    batch: int
    m: int
    n: int
    k: int
    dtype: str


def variables(shape: Shape) -> tuple[Var, Var, Var, Var]:
    """Batch, row and column of the product, and what is summed over."""
    return Var("batch", shape.batch), Var("m", shape.m), Var("n", shape.n), Var("k", shape.k)


@dataclass(frozen=True)
class Described:
    """An operand as a tensor descriptor: a view of ``buffer``, its outer and inner dimension named in ``axes``.

    ``batch``: how the products of a batch are told apart: "" (they share the operand), "stacked" (one below the
    other, in one view of two dimensions) or "apart" (a third dimension, the outermost). ``offset``: where in the buffer
    the view begins.
    """

    buffer: str
    axes: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    batch: str = ""
    offset: int = 0


def described(operand: Expr, axes: str, shape: Shape, depth: int) -> Described | None:
    """The operand as a tensor descriptor; None unless it is a view with one contiguous dimension, the other
    strides multiples of 16 bytes, that begins where its buffer does. ``depth``: elements of ``k`` in a tile."""
    if not isinstance(operand, Load):
        return None
    (index,) = operand.index
    sizes = {var.name: var.size for var in variables(shape)}
    step = {var.name: index.coefficient(var) for var in variables(shape)}
    inner = next((axis for axis in axes if step[axis] == 1 and sizes[axis] > 1), None)
    if inner is None or index.const or len(index.terms) != sum(c != 0 for c in step.values()):
        return None
    outer = axes.replace(inner, "")
    strides = [step[outer], *([step["batch"]] if step["batch"] else [])]
    if sizes[outer] == 1 or any(s <= 0 or s * BYTES[operand.dtype] % 16 for s in strides):
        return None
    rows, columns = sizes[outer], sizes[inner]
    if not step["batch"]:
        return Described(operand.buffer, outer + inner, (rows, columns), (step[outer], 1))
    # A tile that reaches into the next product is harmless along rows and columns, whose results are not stored.
    if step["batch"] == rows * step[outer] and (outer != "k" or rows % depth == 0):
        stacked = (shape.batch * rows, columns)
        return Described(operand.buffer, outer + inner, stacked, (step[outer], 1), "stacked")
    apart = (shape.batch, rows, columns)
    return Described(operand.buffer, outer + inner, apart, (step["batch"], step[outer], 1), "apart")


def across(operand: Expr, shape: Shape) -> bool:
    """Whether the operand is in memory, but what is summed over is not contiguous there."""
    k = variables(shape)[3]
    return isinstance(operand, Load) and shape.k > 1 and operand.index[0].coefficient(k) != 1


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
