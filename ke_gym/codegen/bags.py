"""Bags of embedding rows as one kernel of a GPU: a program a bag. Language-independent.

Sums and means only: what a bag's maximum does with NaN is left to the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ke_gym.codegen.contract import bag_problem, contraction_of
from ke_gym.codegen.contraction import BagProblem
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import BYTES
from ke_gym.codegen.graph import Buffer, Graph, View
from ke_gym.codegen.schedule import Group
from ke_gym.codegen.tiles import chosen, power_above

KINDS = ("aten._embedding_bag.default", "aten._embedding_bag_forward_only.default")
WIDE = 1024  # columns of a row up to which one program takes them all


@dataclass(frozen=True)
class Blocks:
    """``rows`` of the table are fetched at a time, ``columns`` of them by one program of ``warps``."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Bag:
    """``out[bag]``, the sum or mean of the rows that ids from ``offsets[bag]`` to the next offset name.

    ``operands``: table, ids, offsets and, if rows are weighted, weights.
    """

    name: str
    problem: BagProblem
    operands: tuple[View, ...]
    blocks: Blocks
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    bytes: int
    group: Group
    origins: tuple[str, ...] = ("embedding_bag",)

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.blocks.warps

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        whole = power_above(self.problem.dim)
        return {
            "rows": [1, 2, 4, 8, 16, 32, 64],
            "columns": sorted({min(whole, c) for c in (64, 128, 256, 512, WIDE)}),
            "warps": [1, 2, 4, 8],
        }


class Builder:
    """Builds the ``Bag`` of a group; raises ``Illegal`` for what is left to the library."""

    def __init__(self, graph: Graph, group: Group, visible: frozenset[str]) -> None:
        self.graph, self.group = graph, group
        step = contraction_of(graph, group)
        assert step is not None
        others = {b.name for b in step.outputs[1:]}
        wanted = {*graph.outputs, *(r for user in graph.users[step.name] for r in graph.steps[user].reads)}
        if len(group.nodes) > 1 or others & wanted:
            raise Illegal("a bag's kernel gives its sum and nothing else")
        self.step = step

    def build(self) -> Bag:
        problem, out = bag_problem(self.graph, self.step), self.step.outputs[0]
        if problem.mode == "max" or problem.dtype != "f32":
            raise Illegal("this kind of bag")
        given = [*self.step.args[:3], *(self.step.args[6:7] if problem.weighted else ())]
        reads = tuple(self.graph.buffers[view.buffer] for view in given)
        columns = min(power_above(problem.dim), WIDE)
        blocks = Blocks(max(1024 // columns, 4), columns, 4)
        # The rows that are named, not the table, are read.
        total = problem.total * problem.dim * 4 + sum(b.numel * BYTES[b.dtype] for b in (*reads[1:], out))
        drafted = Bag(out.name, problem, tuple(given), blocks, reads, (out,), total, self.group)
        blocks = chosen(blocks, drafted.knobs(), self.group)
        if not 32 * blocks.warps <= blocks.rows * blocks.columns <= 1 << 14:
            raise Illegal("blocks that do not suit the warps")
        return Bag(out.name, problem, tuple(given), blocks, reads, (out,), total, self.group)
