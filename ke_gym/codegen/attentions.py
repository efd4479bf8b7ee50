"""Attention on Hopper's tensor cores: what ``flash`` computes, by warpgroups that keep scores and weights in registers.

Shah et al., "FlashAttention-3", 2024: tiles of queries, keys and values come by bulk copies; the scores of one block of
keys are multiplied while those of the block before become weights. Language-independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ke_gym.codegen import flash
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Expr, Index, Indirect, Load, Var, bounds, of, walk
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.graph import Buffer
from ke_gym.codegen.tiles import chosen, depends, power_above
from ke_gym.codegen.windows import LANGUAGE, SHARED, needs_hopper, round_up

ROW = 64  # elements of a row of a swizzled tile: 128 bytes
GROUP = 64  # queries of a warpgroup
OUTER = 3  # dimensions of a tensor map besides rows and columns, at most
# By the warpgroups that multiply: registers of a thread that brings tiles, and of one that multiplies.
REGISTERS = {1: (0, 255), 2: (24, 240), 3: (32, 160)}
WORKING = {
    1: 42,
    2: 42,
    3: 30,
}  # those besides scores, weights and sums that it takes to compile without spills


@dataclass(frozen=True)
class Blocks(flash.Blocks):
    """``stages`` tiles of keys and as many of values under way; ``warps`` are four for every 64 queries, and four more
    that bring them. ``turns``: while one warpgroup multiplies, the others make weights of scores."""

    turns: bool = False
    language: str = LANGUAGE


@dataclass(frozen=True)
class Tile:
    """An operand as bulk copies see it: dimensions ``at`` that products of the batch are found by, rows, and columns."""

    buffer: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    at: tuple[Index, ...]


@dataclass(frozen=True)
class Attention(Flash):
    """What one kernel does; ``tiles`` are queries, keys and values."""

    blocks: Blocks
    tiles: tuple[Tile, Tile, Tile]

    def knobs(self) -> dict[str, list[Any]]:
        """Legal values of the launch's knobs here."""
        most = 192 if self.wide[1] <= 128 else 128
        return {
            "m": [m for m in (64, 128, 192) if m < self.shape.queries + GROUP and m <= most],
            "n": [32, 64, 80, 96, 112, 128, 144, 160, 176],
            "stages": [1, 2, 3, 4],
            "turns": [False, True],
            "language": [LANGUAGE],
        }

    @property
    def groups(self) -> int:
        """Warpgroups that multiply."""
        return self.blocks.m // GROUP

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.blocks.warps

    @property
    def wide(self) -> tuple[int, int]:
        """Elements of a query and of a value in shared memory: whole rows of swizzled tiles, zeros beyond."""
        return round_up(self.shape.d, ROW), round_up(self.shape.dv, ROW)

    @property
    def sections(self) -> tuple[int, int, int]:
        """Bytes of shared memory for the queries, one tile of keys, and one of values."""
        d, dv = self.wide
        return 2 * self.blocks.m * d, 2 * self.blocks.n * d, 2 * self.blocks.n * dv

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block, with a barrier for the queries, and two for each other tile."""
        queries, keys, values = self.sections
        return queries + self.blocks.stages * (keys + values) + 8 * (1 + 4 * self.blocks.stages)

    @property
    def ragged(self) -> bool:
        """Whether the last block of keys is not whole."""
        return self.shape.keys % self.blocks.n != 0

    @property
    def count(self) -> int:
        """Blocks of keys."""
        return -(-self.shape.keys // self.blocks.n)

    @property
    def words(self) -> int:
        """Words of 32 bits that have one for each element of a value; a power of two."""
        return power_above(-(-self.shape.dv // 32))

    @property
    def flags(self) -> Buffer:
        """Where it is kept which elements of a block's values are not all finite."""
        shape = (self.shape.batch, self.count, self.words)
        return Buffer(self.beyond, shape, (self.count * self.words, self.words, 1), "i32")


class Builder(flash.Builder):
    """Builds the ``Attention`` of a group of two products; raises ``Illegal``, with the reason, for the library's."""

    def _finished(self, drafted: Flash) -> Attention:
        needs_hopper(self.graph)
        shape = drafted.shape
        if shape.dtype == "f32" or drafted.writes[0].dtype not in ("f16", "bf16"):
            raise Illegal("attention in single precision is the library's in CUDA C++")
        if shape.dv % 8:
            raise Illegal("values that are no whole vectors")
        names = flash.variables(shape)
        tiles = [
            self._tile(operand, names[row], names[column], list(names.values()))
            for operand, row, column in zip(drafted.operands, "mnn", "dde")
        ]
        known = {field.name: getattr(drafted, field.name) for field in fields(drafted)}
        found = Attention(**known | {"blocks": heuristic(drafted), "tiles": tuple(tiles)})
        blocks = chosen(found.blocks, found.knobs(), self.group)
        found = replace(found, blocks=replace(blocks, warps=4 * (blocks.m // GROUP + 1)))
        held = 3 * blocks.n // 4 + found.wide[1] // 2 + WORKING[found.groups]
        if held > REGISTERS[found.groups][1] or found.shared > SHARED:
            raise Illegal("more than registers or shared memory hold")
        return found

    def _tile(self, operand: Expr, row: Var, column: Var, variables: Sequence[Var]) -> Tile:
        if not isinstance(operand, Load):
            raise Illegal("an operand is computed")
        (index,) = operand.index
        outer = [(atom, step) for atom, step in index.terms if atom not in (row, column)]
        inner = [v for v in variables if v.name != "batch"]
        if index.coefficient(column) != 1 or any(depends(a, v) for a, _ in outer for v in inner):
            raise Illegal("an operand whose rows are not contiguous")
        if any(isinstance(n, Indirect) for a, _ in outer for n in walk(a)):
            raise Illegal("an operand that is gathered")
        along = index.coefficient(row) if row.size > 1 else round_up(column.size, 8)
        stride = (*(step for _, step in outer), along, 1)
        if any(step <= 0 or step % 8 for step in stride[:-1]) or index.const % 8 or len(outer) > OUTER:
            raise Illegal("rows that bulk copies do not find")
        sizes = (*(bounds(of(atom))[1] + 1 for atom, _ in outer), row.size, column.size)
        last = index.const + sum((size - 1) * step for size, step in zip(sizes, stride))
        if last >= self.graph.buffers[operand.buffer].extent:
            raise Illegal("an operand that reaches beyond its tensor")
        return Tile(operand.buffer, sizes, stride, index.const, tuple(of(atom) for atom, _ in outer))


def heuristic(drafted: Flash) -> Blocks:
    """Two warpgroups and 128 keys; one where there are few queries, 64 keys where the operands are wide."""
    shape = drafted.shape
    wide = round_up(shape.dv, ROW)
    m = 64 if shape.queries <= 64 else 128
    n = 128 if max(wide, shape.d) <= 128 else 64
    return Blocks(m, n, 4 * (m // GROUP + 1), 2, turns=wide <= 128)
