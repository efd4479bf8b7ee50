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
                        of A to ``out[0..count)`` (accumulator type)
``emit_conv`` epilogue  ``batch, channel, pos, count, acc``: outputs ``pos .. pos+count`` of the flattened
                        output positions of channel ``channel`` (of all groups) of image ``batch``
``emit_conv`` prologue  an expression of ``value``, ``batch``, ``channel``, applied to every input element
                        that is read (padding stays zero)
``emit_attention``      ``batch, head, row, count, acc``: the ``count = dv`` outputs of query ``row``
======================= ============================================================================

Epilogues are called exactly once per output, by several threads at once. When ``schedule.rows_in_order``,
one thread delivers all strips of a GEMM row, in ascending ``col``: a running value kept per row (row
maximum, norm) then needs no lock. Kernels include ``HEADERS[...]`` and compile with ``-fopenmp`` as C++17.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import indent
from typing import Any, Literal

HEADERS = {"gemm": "ke/gemm.h", "conv": "ke/conv.h", "attention": "ke/attention.h"}

Precision = Literal["strict", "tf32", "bf16"]
Knobs = dict[str, list[Any]]

_ACCUMULATORS = {"f64": "double", "i32": "int32_t", "i64": "int64_t"}
_THREAD_FLOPS = 100_000  # below this much work a parallel region costs more than it saves


def _fits(mr: int, nr: int, vector_bytes: int, item: int) -> bool:
    """Whether an mr x nr tile leaves registers for a row of B and a broadcast."""
    vectors = nr * item // vector_bytes
    registers = 32 if vector_bytes == 64 else 16
    return nr * item % vector_bytes == 0 and vectors * (mr + 1) + 1 <= registers


def _tiles(vector_bytes: int, item: int) -> list[tuple[int, int]]:
    """Register tiles (mr, nr) worth trying, the best for large problems first."""
    lanes = vector_bytes // item
    found = [(mr, v * lanes) for v in (2, 3, 1, 4) for mr in range(28, 0, -1)]
    return [t for t in found if _fits(*t, vector_bytes, item)]


def _braces(values: Sequence[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def _statement(call: str, arguments: Sequence[str], epilogue: str, parameters: str, flags: str = "") -> str:
    body = indent(epilogue.strip("\n"), "      ")
    head = ", ".join([*arguments, f"[&]({parameters}) {{"])
    return f"{call}({head}\n{body}\n    }}{flags});"


# --- matrix products ------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemmProblem:
    """C[batch, m, n] = A[batch, m, k] @ B[batch, k, n].

    ``a_strides`` and ``b_strides`` are in elements, of rank ``len(batch) + 2`` (0 where an operand is
    broadcast over a batch dimension). Dtypes are the IR's names ("f32", "bf16", ...). ``nn.Linear`` is
    ``b_strides=(1, k)``. ``precision="bf16"`` permits rounding the operands to bfloat16.
    """

    m: int
    n: int
    k: int
    a_strides: tuple[int, ...]
    b_strides: tuple[int, ...]
    batch: tuple[int, ...] = ()
    a_dtype: str = "f32"
    b_dtype: str = "f32"
    precision: Precision = "strict"

    @property
    def batches(self) -> int:
        return math.prod(self.batch)

    @property
    def accumulator(self) -> str:
        """C++ type of the sums, and of ``acc`` in the epilogue."""
        return _ACCUMULATORS.get(self.a_dtype, "float")

    @property
    def flops(self) -> int:
        return 2 * self.batches * self.m * self.n * self.k


@dataclass(frozen=True)
class GemmSchedule:
    """Choices for a matrix product.

    ``tile`` is the register tile (rows, columns); ``kc`` the steps of k between two spills of the sums
    (smaller is more accurate); ``mc`` and ``nc`` the rows and columns of one task, counted in
    register tiles, 0 for all of them; ``matrix_unit`` uses bf16 dot-product instructions; ``parallel`` the
    thread pool.
    """

    tile: tuple[int, int] = (14, 32)
    kc: int = 192
    mc: int = 8
    nc: int = 0
    matrix_unit: bool = False
    parallel: bool = True

    @property
    def rows_in_order(self) -> bool:
        """Whether one thread delivers all strips of a row, columns ascending."""
        return self.nc == 0

    @staticmethod
    def choices(problem: GemmProblem, vector_bytes: int = 64) -> Knobs:
        """Legal values of each knob; any combination is legal."""
        item = 8 if problem.accumulator in ("double", "int64_t") else 4
        return {
            "tile": _tiles(vector_bytes, item),
            "kc": [64, 128, 192, 256, 512],
            "mc": [0, 2, 4, 8, 16],
            "nc": [0, 4, 16],
            "matrix_unit": [False, True] if problem.precision == "bf16" else [False],
            "parallel": [True, False],
        }

    @staticmethod
    def default(problem: GemmProblem, vector_bytes: int = 64) -> GemmSchedule:
        item = 8 if problem.accumulator in ("double", "int64_t") else 4
        tile = min(_tiles(vector_bytes, item), key=lambda t: _waste(t, problem.m, problem.n))
        return GemmSchedule(tile=tile, parallel=problem.flops > _THREAD_FLOPS)


def _waste(tile: tuple[int, int], m: int, n: int) -> float:
    """Cost of covering m x n with register tiles, in loads and multiply-adds of full tiles."""
    mr, nr = tile
    return math.ceil(m / mr) * math.ceil(n / nr) * (mr * nr + 4 * nr + 16 * mr)


def _matrix(name: str, strides: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """``ke::matrix(...)`` with an offset function if the operand varies over the batch."""
    row, col = strides[-2:]
    terms, below = [], math.prod(batch)
    for size, stride in zip(batch, strides[:-2]):
        below //= size
        if size > 1 and stride:
            index = "batch" if below == 1 else f"batch / {below}"
            index = index if size * below == math.prod(batch) else f"{index} % {size}"
            terms.append(f"{index} * {stride}" if " " not in index else f"({index}) * {stride}")
    offset = f", [](int64_t batch) {{ return {' + '.join(terms)}; }}" if terms else ""
    return f"ke::matrix({name}, {row}, {col}{offset})"


def emit_gemm(
    problem: GemmProblem, schedule: GemmSchedule, a: str, b: str, epilogue: str, prologue: str | None = None
) -> str:
    """The statement that computes the product. ``a`` and ``b`` are C++ pointer expressions to element 0;
    with a ``prologue`` (see the module's table) ``a`` is not used."""
    p, s = problem, schedule
    compute = "ke::bf16_pair" if s.matrix_unit else p.accumulator
    mr, nr = s.tile
    tile = f"ke::Tile<{compute}, {mr}, {nr}, {s.kc}, {s.mc * mr}, {s.nc * nr}>"
    left = _matrix(a, p.a_strides, p.batch)
    if prologue is not None:
        body = indent(prologue.strip("\n"), "      ")
        left = (
            f"\n    [&](int64_t batch, int64_t row, int64_t k, int64_t count,"
            f" {p.accumulator}* __restrict out) {{\n{body}\n    }}"
        )
    flags = [
        not any(strides[:-2]) and (prologue is None or which == "b")
        for which, strides in (("a", p.a_strides), ("b", p.b_strides))
    ]
    tail = "".join(f", {str(f).lower()}" for f in [*flags, s.parallel])
    return _statement(
        f"ke::gemm<{tile}>",
        [f"{{{p.batches}, {p.m}, {p.n}, {p.k}}}", left, _matrix(b, p.b_strides, p.batch)],
        epilogue,
        f"int64_t batch, int64_t row, int64_t col, int64_t count, const {p.accumulator}* __restrict acc",
        tail,
    )


# --- convolution ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvProblem:
    """Convolution of rank 1 to 3, torch's layout: x[batch, in_channels, *size] (strides in elements),
    w[out_channels, in_channels / groups, *kernel] contiguous, zero padding on both sides."""

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
        return _ACCUMULATORS.get(self.x_dtype, "float")

    @property
    def pointwise(self) -> bool:
        """Whether every output sees exactly the input element at its own (evenly strided) position."""
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
    convolution, depthwise too), ``pointwise`` with the image itself (1x1, if ``problem.pointwise``). The other
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
        item = 8 if problem.accumulator in ("double", "int64_t") else 4
        return {
            "form": ["pointwise", "shift"] if problem.pointwise else ["shift"],
            "tile": _tiles(vector_bytes, item),
            "kc": [64, 128, 192, 256, 512],
            "nc": [2, 4, 8, 16],
            "matrix_unit": [False, True] if problem.precision == "bf16" else [False],
            "parallel": [True, False],
        }

    @staticmethod
    def default(problem: ConvProblem, vector_bytes: int = 64) -> ConvSchedule:
        item = 8 if problem.accumulator in ("double", "int64_t") else 4
        m, n = problem.out_channels // problem.groups, math.prod(problem.out_size)
        tile = min(_tiles(vector_bytes, item), key=lambda t: _waste(t, m, n))
        return ConvSchedule(
            form="pointwise" if problem.pointwise else "shift",
            tile=tile,
            parallel=problem.flops > _THREAD_FLOPS,
        )


def emit_conv(
    problem: ConvProblem, schedule: ConvSchedule, x: str, w: str, epilogue: str, prologue: str | None = None
) -> str:
    """The statement that computes the convolution; ``x`` and ``w`` are C++ pointer expressions."""
    p, s = problem, schedule
    compute = "ke::bf16_pair" if s.matrix_unit else p.accumulator
    mr, nr = s.tile
    tail = f", {str(s.parallel).lower()}"
    if prologue:
        tail += f", [&]({p.accumulator} value, int64_t batch, int64_t channel) {{ return {prologue}; }}"
    if s.form == "pointwise":
        call = f"ke::conv_pointwise<ke::Tile<{compute}, {mr}, {nr}, {s.kc}, 0, {s.nc * nr}>>"
        shape = f"{p.batch}, {p.in_channels}, {p.out_channels}, {p.groups}, {math.prod(p.size)}, "
        shape += _braces([*p.x_strides[:2], p.x_strides[-1]])
    else:
        call = f"ke::conv<ke::Tile<{compute}, {mr}, {nr}, {s.kc}, 0, 0>, {len(p.size)}>"
        sizes = (p.size, p.kernel, p.stride, p.padding, p.dilation, p.x_strides)
        shape = _braces([p.batch, p.in_channels, p.out_channels, p.groups, *map(_braces, sizes)])
    return _statement(
        call,
        [shape, x, w],
        epilogue,
        f"int64_t batch, int64_t channel, int64_t pos, int64_t count, const {p.accumulator}* __restrict acc",
        tail,
    )


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionProblem:
    """softmax(q k^T * scale + mask) v over q[batch, heads, queries, d], k[batch, kv_heads, keys, d],
    v[batch, kv_heads, keys, dv]; strides in elements over (batch, head, row, column). Query head h reads
    key head h // (heads / kv_heads). ``mask_strides`` (broadcast: 0): an additive float mask, or a bool mask
    (pointer to bool) keeps where true. ``causal``: query i sees keys 0..i (torch's rule). Rows
    with no key to see are NaN, as torch.softmax has it, or 0 (``empty_rows="zero"``), as
    scaled_dot_product_attention has it. Only for f32, bf16 and f16 (sums and weights are float)."""

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
    def flops(self) -> int:
        return 2 * self.batch * self.heads * self.queries * self.keys * (self.d + self.dv)


@dataclass(frozen=True)
class AttentionSchedule:
    """Choices for attention.

    A block of scores has ``tile * tiles`` rows (queries of all heads that share keys) and ``keys`` columns; it
    should stay in L1. ``tile`` is the rows of the register tile. ``splits`` cuts the keys so that few rows and
    heads still use all threads (decoding).
    """

    tile: int = 14
    tiles: int = 2
    keys: int = 128
    splits: int = 1
    parallel: bool = True

    @staticmethod
    def choices(problem: AttentionProblem, vector_bytes: int = 64) -> Knobs:
        most = 14 if vector_bytes == 64 else 6
        rows = problem.heads // problem.kv_heads * problem.queries
        return {
            "tile": [t for t in range(most, 0, -1) if t <= rows],
            "tiles": [t for t in (1, 2, 4) if (t - 1) * most < rows],
            "keys": [64, 128, 256],
            "splits": [1, 2, 4] if rows <= 64 else [1],
            "parallel": [True, False],
        }

    @staticmethod
    def default(problem: AttentionProblem, vector_bytes: int = 64) -> AttentionSchedule:
        most = 14 if vector_bytes == 64 else 6
        rows = problem.heads // problem.kv_heads * problem.queries
        products = problem.batch * problem.kv_heads
        return AttentionSchedule(
            tile=min(most, rows),
            tiles=1 if rows <= most else 2,
            splits=4 if rows <= 64 and products < 8 else 1,
            parallel=problem.flops > _THREAD_FLOPS,
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
) -> str:
    """The statement that computes attention; ``q``, ``k``, ``v`` and ``mask`` are C++ pointer expressions."""
    p, s = problem, schedule
    shape = _braces([p.batch, p.heads, p.kv_heads, p.queries, p.keys, p.d, p.dv])
    arguments = [shape, _heads(q, p.q_strides), _heads(k, p.k_strides), _heads(v, p.v_strides)]
    arguments.append(_heads(mask, p.mask_strides) if mask and p.mask_strides else "ke::NoMask()")
    empty = '__builtin_nanf("")' if p.empty_rows == "nan" else "0.0f"
    arguments += [f"float({p.scale!r})", str(p.causal).lower(), empty, str(s.splits), str(s.parallel).lower()]
    return _statement(
        f"ke::attention<{s.tile}, {s.tiles}, {s.keys}>",
        arguments,
        epilogue,
        "int64_t batch, int64_t head, int64_t row, int64_t count, const float* __restrict acc",
    )
