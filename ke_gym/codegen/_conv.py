"""Convolutions: see :mod:`ke_gym.codegen.contraction`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ke_gym.codegen._contraction_text import (
    ITEM_BYTES,
    THREAD_FLOPS,
    Knobs,
    Precision,
    accumulator,
    best_tile,
    braces,
    call,
    closure,
    flag,
    matrix_units,
    register_tiles,
    tile_type,
)


@dataclass(frozen=True)
class ConvProblem:
    """Convolution of rank 1 to 3 in torch's layout, zero-padded by ``padding`` on both sides.

    x[batch, in_channels, *size] has ``x_strides`` (elements); w[out_channels, in_channels / groups, *kernel]
    is contiguous. ``size``, ``kernel``, ``stride``, ``padding`` and ``dilation`` have one entry a dimension.
    """

    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    x_strides: tuple[int, ...]
    groups: int = 1
    x_dtype: str = "f32"
    w_dtype: str = "f32"
    precision: Precision = "strict"

    @property
    def out_size(self) -> tuple[int, ...]:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(self.size, self.kernel, self.stride, self.padding, self.dilation)
        )

    @property
    def accumulator(self) -> str:
        """C++ type of the sums, and of ``acc`` in the epilogue."""
        return accumulator(self.x_dtype)

    @property
    def pointwise(self) -> bool:
        """Whether every output sees exactly the input element at its own, evenly strided, position."""
        strides = self.x_strides[2:]
        even = all(a == b * n for a, b, n in zip(strides, strides[1:], self.size[1:]))
        plain = all((k, s, p) == (1, 1, 0) for k, s, p in zip(self.kernel, self.stride, self.padding))
        return plain and even

    @property
    def flops(self) -> int:
        taps = self.in_channels // self.groups * math.prod(self.kernel)
        return 2 * self.batch * self.out_channels * math.prod(self.out_size) * taps


@dataclass(frozen=True)
class ConvSchedule:
    """Choices for a convolution.

    ``form``: ``shift`` multiplies the weights with shifted views of a padded copy of each image (any
    convolution, depthwise too), ``pointwise`` with the image itself (if ``problem.pointwise``). The other
    knobs are those of :class:`GemmSchedule` for m = out_channels / groups, n = output positions; ``nc`` is
    the columns of one task of the pointwise form, in register tiles.
    """

    form: Literal["shift", "pointwise"] = "shift"
    tile: tuple[int, int] = (14, 32)
    kc: int = 192
    nc: int = 4
    matrix_unit: bool = False
    parallel: bool = True

    @staticmethod
    def choices(problem: ConvProblem, vector_bytes: int = 64) -> Knobs:
        """Legal values of each knob; every combination is legal."""
        return {
            "form": ["pointwise", "shift"] if problem.pointwise else ["shift"],
            "tile": register_tiles(vector_bytes, ITEM_BYTES[problem.accumulator]),
            "kc": [64, 128, 192, 256, 512],
            "nc": [2, 4, 8, 16],
            "matrix_unit": matrix_units(problem.precision, problem.x_dtype, problem.w_dtype),
            "parallel": [True, False],
        }

    @staticmethod
    def default(problem: ConvProblem, vector_bytes: int = 64) -> ConvSchedule:
        """A good schedule by rules of thumb."""
        p = problem
        rows, positions = p.out_channels // p.groups, math.prod(p.out_size)
        return ConvSchedule(
            form="pointwise" if p.pointwise else "shift",
            tile=best_tile(rows, positions, vector_bytes, ITEM_BYTES[p.accumulator]),
            parallel=p.flops > THREAD_FLOPS,
        )


def emit_conv(
    problem: ConvProblem, schedule: ConvSchedule, x: str, w: str, epilogue: str, prologue: str | None = None
) -> str:
    """The statement that computes the convolution; ``x`` and ``w`` are C++ pointer expressions."""
    p, s, acc = problem, schedule, problem.accumulator
    compute = "ke::bf16_pair" if s.matrix_unit else acc
    parameters = f"int64_t batch, int64_t channel, int64_t pos, int64_t count, const {acc}* __restrict acc"
    arguments = [x, w, closure(parameters, epilogue), flag("parallel", s.parallel)]
    if prologue is not None:
        body = f"return {prologue};"
        arguments.append(closure(f"{acc} value, int64_t batch, int64_t channel", body))
    if s.form == "pointwise":
        counts = [p.batch, p.in_channels, p.out_channels, p.groups, math.prod(p.size)]
        strides = braces([*p.x_strides[:2], p.x_strides[-1]])
        tile = tile_type(compute, s.tile, s.kc, 0, s.nc)
        return call(f"ke::conv_pointwise<{tile}>", [", ".join(map(str, counts)), strides, *arguments])
    sizes = (p.size, p.kernel, p.stride, p.padding, p.dilation, p.x_strides)
    shape = braces([p.batch, p.in_channels, p.out_channels, p.groups, *map(braces, sizes)])
    tile = tile_type(compute, s.tile, s.kc, 0, 0)
    return call(f"ke::conv<{tile}, {len(p.size)}>", [shape, *arguments])
