"""Attention: see :mod:`ke_gym.codegen.contraction`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ke_gym.codegen._contraction_text import THREAD_FLOPS, Knobs, braces, call, closure, flag


@dataclass(frozen=True)
class AttentionProblem:
    """softmax(q k^T * scale + mask) v, for q[batch, heads, queries, d], k[batch, kv_heads, keys, d] and
    v[batch, kv_heads, keys, dv] of f32, bf16 or f16 (sums and weights are float).

    Strides are in elements, over (batch, head, row, column). Query head h reads key head
    h // (heads / kv_heads). A mask (``mask_strides``, 0 where broadcast) is additive, or, if it points to
    bool, keeps where true. ``causal``: query i sees keys 0..i (torch's rule). Rows with no key to see are
    NaN, as torch.softmax has it, or with ``empty_rows="zero"`` 0, as scaled_dot_product_attention has it.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    d: int
    dv: int
    q_strides: tuple[int, int, int, int]
    k_strides: tuple[int, int, int, int]
    v_strides: tuple[int, int, int, int]
    scale: float
    causal: bool = False
    mask_strides: tuple[int, int, int, int] | None = None
    empty_rows: Literal["nan", "zero"] = "nan"

    @property
    def rows(self) -> int:
        """Queries of all heads that share keys."""
        return self.heads // self.kv_heads * self.queries

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.heads * self.queries * self.keys * (self.d + self.dv)


@dataclass(frozen=True)
class AttentionSchedule:
    """Choices for attention.

    A block of scores has ``tile * tiles`` rows (queries of all heads that share keys) and ``keys`` columns;
    it should stay in L1. ``tile`` is the rows of the register tile. ``splits`` cuts the keys so that few rows
    and heads still use all threads (decoding).
    """

    tile: int = 14
    tiles: int = 2
    keys: int = 128
    splits: int = 1
    parallel: bool = True

    @staticmethod
    def choices(problem: AttentionProblem, vector_bytes: int = 64) -> Knobs:
        """Legal values of each knob; every combination is legal."""
        most = 14 if vector_bytes == 64 else 6
        return {
            "tile": list(range(min(most, problem.rows), 0, -1)),
            "tiles": [t for t in (1, 2, 4) if (t - 1) * most < problem.rows],
            "keys": [64, 128, 256],
            "splits": [1, 2, 4] if problem.rows <= 64 else [1],
            "parallel": [True, False],
        }

    @staticmethod
    def default(problem: AttentionProblem, vector_bytes: int = 64) -> AttentionSchedule:
        """A good schedule by rules of thumb."""
        most = 14 if vector_bytes == 64 else 6
        return AttentionSchedule(
            tile=min(most, problem.rows),
            tiles=1 if problem.rows <= most else 2,
            splits=4 if problem.rows <= 64 and problem.batch * problem.kv_heads < 8 else 1,
            parallel=problem.flops > THREAD_FLOPS,
        )


def _heads(name: str, strides: tuple[int, ...]) -> str:
    return f"ke::heads({name}, {', '.join(map(str, strides))})"


def emit_attention(
    problem: AttentionProblem,
    schedule: AttentionSchedule,
    q: str,
    k: str,
    v: str,
    epilogue: str,
    mask: str | None = None,
    score: str | None = None,
) -> str:
    """The statement that computes attention; ``q``, ``k``, ``v`` and ``mask`` are C++ pointer expressions.

    With ``score``, the body of a function that changes ``count`` products ``acc`` of a query ``row`` with the keys
    from ``key`` on, that is all there is to scale and mask.
    """
    p, s = problem, schedule
    parameters = "int64_t batch, int64_t head, int64_t row, int64_t count, const float* __restrict acc"
    if score is not None:
        masking = closure(
            "int64_t batch, int64_t head, int64_t row, int64_t first_key, int64_t count, float* __restrict acc",
            score,
        )
    else:
        masking = _heads(mask, p.mask_strides) if mask and p.mask_strides else "ke::NoMask()"
    arguments = [
        braces([p.batch, p.heads, p.kv_heads, p.queries, p.keys, p.d, p.dv]),
        _heads(q, p.q_strides),
        _heads(k, p.k_strides),
        _heads(v, p.v_strides),
        masking,
        f"/*scale*/ float({p.scale!r})",
        flag("causal", p.causal),
        "/*rows that see no key*/ " + ('__builtin_nanf("")' if p.empty_rows == "nan" else "0.0f"),
        f"/*splits*/ {s.splits}",
        flag("parallel", s.parallel),
        closure(parameters, epilogue),
    ]
    return call(f"ke::attention</*MR*/ {s.tile}, /*tiles*/ {s.tiles}, /*keys*/ {s.keys}>", arguments)
