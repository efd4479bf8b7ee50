"""Matrix products: see :mod:`ke_gym.codegen.contraction`."""

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
        return accumulator(self.a_dtype)

    @property
    def flops(self) -> int:
        return 2 * self.batches * self.m * self.n * self.k

    def streams(self, vector_bytes: int) -> bool:
        """Whether the columns of B are contiguous, or its rows and each long enough for a tile."""
        row, col = self.b_strides[-2:]
        return row == 1 or (col == 1 and self.n >= 4 * vector_bytes // ITEM_BYTES[self.accumulator])


@dataclass(frozen=True)
class GemmSchedule:
    """Choices for a matrix product.

    ``form``: ``tiled`` packs both operands into panels; ``stream`` reads B once and in place, for few rows
    (its tile follows from the problem; ``tile`` to ``matrix_unit`` are knobs of ``tiled``). ``tile`` is the
    register tile (rows, columns); ``kc`` the steps of k between two spills of the sums (smaller is more
    accurate); ``mc`` and ``nc`` the rows and columns of one task, counted in register tiles, 0 for all of
    them; ``matrix_unit`` uses bf16 dot-product instructions. ``parallel`` uses the thread pool.
    """

    form: Literal["tiled", "stream"] = "tiled"
    tile: tuple[int, int] = (14, 32)
    kc: int = 192
    mc: int = 8
    nc: int = 0
    matrix_unit: bool = False
    parallel: bool = True

    @property
    def rows_in_order(self) -> bool:
        """Whether one thread delivers all strips of a row, columns ascending."""
        return self.form == "tiled" and self.nc == 0

    @staticmethod
    def choices(problem: GemmProblem, vector_bytes: int = 64, rows_in_order: bool = False) -> Knobs:
        """Legal values of each knob; every combination is legal (and in order, if ``rows_in_order``)."""
        stream = problem.streams(vector_bytes) and problem.m <= 64 and not rows_in_order
        return {
            "form": ["tiled", "stream"] if stream else ["tiled"],
            "tile": register_tiles(vector_bytes, ITEM_BYTES[problem.accumulator]),
            "kc": [64, 128, 192, 256, 512],
            "mc": [0, 2, 4, 8, 16],
            "nc": [0] if rows_in_order else [0, 1, 2, 4, 16],
            "matrix_unit": matrix_units(problem.precision, problem.a_dtype, problem.b_dtype),
            "parallel": [True, False],
        }

    @staticmethod
    def default(problem: GemmProblem, vector_bytes: int = 64, rows_in_order: bool = False) -> GemmSchedule:
        """A good schedule by rules of thumb; ``rows_in_order`` asks for that guarantee."""
        p = problem
        tile = best_tile(p.m, p.n, vector_bytes, ITEM_BYTES[p.accumulator])
        parallel = p.flops > THREAD_FLOPS
        few_rows = p.m <= (16 if p.b_strides[-2] == 1 else 32)
        if few_rows and p.streams(vector_bytes) and not rows_in_order:
            return GemmSchedule(form="stream", tile=tile, parallel=parallel)
        if p.batches >= 4 and p.m * p.n * p.k <= 1 << 26:
            mc, nc = 0, 0  # a task is a whole product
        elif p.m <= min(p.n, 512) and not rows_in_order:
            mc, nc = 0, 2  # A packed for all, B packed where it is used
        else:
            mc, nc = 8, 0
        return GemmSchedule(tile=tile, mc=mc, nc=nc, parallel=parallel)


def _matrix(name: str, strides: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """``ke::matrix(...)`` with an offset function if the operand varies over the batch."""
    row, col = strides[-2:]
    terms, below = [], math.prod(batch)
    for size, stride in zip(batch, strides[:-2]):
        outermost = below == math.prod(batch)
        below //= size
        if size == 1 or stride == 0:
            continue
        index = "batch" if below == 1 else f"batch / {below}"
        index = index if outermost else f"{index} % {size}"
        terms.append(f"({index}) * {stride}" if " " in index else f"{index} * {stride}")
    offset = f", [](int64_t batch) {{ return {' + '.join(terms)}; }}" if terms else ""
    return f"ke::matrix({name}, {row}, {col}{offset})"


def emit_gemm(
    problem: GemmProblem,
    schedule: GemmSchedule,
    a: str,
    b: str,
    epilogue: str,
    prologue: str | None = None,
    vector_bytes: int = 64,
) -> str:
    """The statement that computes the product. ``a`` and ``b`` are C++ pointer expressions to element 0;
    with a ``prologue`` ``a`` is not used. ``vector_bytes`` must be that of the compiler flags."""
    p, s, acc = problem, schedule, problem.accumulator
    left = _matrix(a, p.a_strides, p.batch)
    if prologue is not None:
        parameters = f"int64_t batch, int64_t row, int64_t k, int64_t count, {acc}* __restrict out"
        left = closure(parameters, prologue)
    parameters = f"int64_t batch, int64_t row, int64_t col, int64_t count, const {acc}* __restrict acc"
    a_broadcast = not any(p.a_strides[:-2]) and (prologue is None or p.batches == 1)
    arguments = [
        braces([p.batches, p.m, p.n, p.k]),
        left,
        _matrix(b, p.b_strides, p.batch),
        closure(parameters, epilogue),
        flag("A broadcast", a_broadcast),
    ]
    if s.form == "stream":
        return call(_stream_template(p, vector_bytes), [*arguments, flag("parallel", s.parallel)])
    compute = "ke::bf16_pair" if s.matrix_unit else acc
    arguments += [flag("B broadcast", not any(p.b_strides[:-2])), flag("parallel", s.parallel)]
    return call(f"ke::gemm<{tile_type(compute, s.tile, s.kc, s.mc, s.nc)}>", arguments)


def _stream_template(problem: GemmProblem, vector_bytes: int) -> str:
    """The streaming template for this layout of B, with as many sums as registers hold."""
    most_rows, sums = (8, 24) if vector_bytes == 64 else (4, 12)
    rows = math.ceil(problem.m / math.ceil(problem.m / most_rows))
    acc = problem.accumulator
    if problem.b_strides[-2] == 1:
        return f"ke::gemm_dot<{acc}, /*MR*/ {rows}, /*columns*/ {min(8, sums // rows)}>"
    columns = min(4, sums // rows) * vector_bytes // ITEM_BYTES[acc]
    return f"ke::gemm_stream<{acc}, /*MR*/ {rows}, /*NR*/ {columns}, /*KC*/ 32>"
