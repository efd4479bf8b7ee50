"""Contractions for the C++ emitter: problem + schedule + fused code text -> one C++ statement.

Matrix products, convolutions and attention are not printed as loop nests: the generated kernel calls a
blocked template of ``ke/gemm.h``, ``ke/conv.h`` or ``ke/attention.h`` and hands it the fused neighbours as
lambdas. For each contraction there are three things here:

- a *problem* (sizes, strides in elements, dtypes: all facts, no choices),
- a *schedule* (all choices, no facts): ``default(problem)`` is the heuristic one, ``choices(problem)`` the
  legal values of every knob for this problem, ``dataclasses.replace`` makes variants,
- an ``emit_*`` function that returns the text of one C++ statement.

Names the fused text may use (everything else in scope is captured by reference):

======================= ============================================================================
``emit_gemm`` epilogue  ``batch, row, col, count, acc``: ``acc[0..count)`` are the finished sums of columns
                        ``col .. col+count`` of row ``row`` of product ``batch`` (row-major index over
                        ``problem.batch``), of type ``problem.accumulator``
``emit_gemm`` prologue  ``batch, row, k, count, out``: must write the values ``k .. k+count`` of row ``row``
                        of A to ``out[0..count)`` (accumulator type); may be asked for an element twice
``emit_conv`` epilogue  ``batch, channel, pos, count, acc``: outputs ``pos .. pos+count`` of the flattened
                        output positions of channel ``channel`` (of all groups) of image ``batch``
``emit_conv`` prologue  an expression of ``value``, ``batch``, ``channel``, applied to every input element
                        that is read (padding stays zero)
``emit_attention``      ``batch, head, row, count, acc``: the ``count = dv`` outputs of query ``row``
======================= ============================================================================

Epilogues are called exactly once per output, by several threads at once. When ``schedule.rows_in_order``,
one thread delivers all strips of a GEMM row, in ascending ``col``: a running value kept per row (row
maximum, norm) then needs no lock. Kernels include ``HEADERS[...]`` and compile with ``-fopenmp`` as C++17.
``vector_bytes`` is 64 with AVX-512, 32 with AVX2, else 16: what the kernel's compiler flags give.
"""

from __future__ import annotations

from ke_gym.codegen._attention import AttentionProblem, AttentionSchedule, emit_attention
from ke_gym.codegen._bag import BagProblem, BagSchedule, emit_bag
from ke_gym.codegen._contraction_text import Knobs, Precision
from ke_gym.codegen._conv import ConvProblem, ConvSchedule, emit_conv
from ke_gym.codegen._gemm import GemmProblem, GemmSchedule, emit_gemm

HEADERS = {"gemm": "ke/gemm.h", "conv": "ke/conv.h", "attention": "ke/attention.h", "bag": "ke/bag.h"}

__all__ = [
    "HEADERS",
    "AttentionProblem",
    "AttentionSchedule",
    "BagProblem",
    "BagSchedule",
    "ConvProblem",
    "ConvSchedule",
    "GemmProblem",
    "GemmSchedule",
    "Knobs",
    "Precision",
    "emit_attention",
    "emit_bag",
    "emit_conv",
    "emit_gemm",
]
