"""Bags of embedding rows: see :mod:`ke_gym.codegen.contraction`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ke_gym.codegen._contraction_text import Knobs, accumulator, braces, call, closure, flag


@dataclass(frozen=True)
class BagProblem:
    """out[bag] = sum, mean or max of the rows ``table[ids[i]]`` for i from ``offsets[bag]`` to the next offset.

    ``table`` [rows, dim] of f32 or f64 has contiguous rows ``row_stride`` apart. ``weighted``: each row is
    multiplied by its id's weight first (sums only). ``closed``: the offsets end with the number of ids.
    Ids equal to ``padding`` count for nothing; -1 for none. Empty bags are 0.
    """

    bags: int
    total: int
    dim: int
    row_stride: int
    mode: Literal["sum", "mean", "max"]
    dtype: str = "f32"
    weighted: bool = False
    closed: bool = False
    padding: int = -1

    @property
    def accumulator(self) -> str:
        """C++ type of ``acc`` in the epilogue."""
        return accumulator(self.dtype)


@dataclass(frozen=True)
class BagSchedule:
    """``ahead``: how many ids ahead rows are fetched; ``share``: bags a thread takes at a time."""

    ahead: int = 12
    share: int = 64
    parallel: bool = True

    @staticmethod
    def choices(problem: BagProblem, vector_bytes: int = 64) -> Knobs:
        """Legal values of each knob; every combination is legal."""
        return {"ahead": [0, 4, 8, 12, 16, 32], "share": [1, 16, 64, 256], "parallel": [True, False]}

    @staticmethod
    def default(problem: BagProblem, vector_bytes: int = 64) -> BagSchedule:
        """A good schedule by rules of thumb."""
        return BagSchedule(
            share=max(1, min(64, problem.bags // 16)), parallel=problem.total * problem.dim > 1 << 16
        )


def emit_bag(problem: BagProblem, schedule: BagSchedule, operands: Sequence[str], epilogue: str) -> str:
    """The statement that reduces the bags; ``operands``: C++ pointers to table, ids, offsets and any weights."""
    p, s = problem, schedule
    table, ids, offsets, *weights = operands
    parameters = f"int64_t row, int64_t col, int64_t count, const {p.accumulator}* __restrict acc"
    arguments = [
        braces([p.bags, p.total, p.dim, p.row_stride]),
        table,
        ids,
        offsets,
        weights[0] if weights else f"static_cast<const {p.accumulator}*>(nullptr)",
        flag("offsets end with the total", p.closed),
        f"/*padding*/ {p.padding}",
        f"/*share*/ {s.share}",
        flag("parallel", s.parallel),
        closure(parameters, epilogue),
    ]
    return call(f"ke::embedding_bag<ke::Bag::{p.mode}, /*ahead*/ {s.ahead}>", arguments)
