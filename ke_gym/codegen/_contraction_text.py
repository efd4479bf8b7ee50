"""C++ text and register tiles: what the three kinds of contraction share."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from textwrap import dedent, indent
from typing import Any, Literal

Precision = Literal["strict", "tf32", "bf16"]
Knobs = dict[str, list[Any]]

THREAD_FLOPS = 100_000  # below this much work a parallel region costs more than it saves
ITEM_BYTES = {"float": 4, "double": 8, "int32_t": 4, "int64_t": 8}  # of an accumulator


def accumulator(dtype: str) -> str:
    """C++ type of the sums over operands of this dtype ("bf16" and "f16" are summed in float)."""
    return {"f64": "double", "i32": "int32_t", "i64": "int64_t"}.get(dtype, "float")


def register_tiles(vector_bytes: int, item: int) -> list[tuple[int, int]]:
    """Register tiles (rows, columns) that leave registers for a row of B and a broadcast."""
    registers = 32 if vector_bytes == 64 else 16
    lanes = vector_bytes // item
    return [(mr, v * lanes) for v in (2, 3, 1, 4) for mr in range(28, 0, -1) if mr * v + v + 1 <= registers]


def matrix_units(precision: Precision, *dtypes: str) -> list[bool]:
    """Whether dot products of bf16 may be used: operands are bf16, or floats that may be rounded to it."""
    exact = set(dtypes) == {"bf16"}
    return [False, True] if exact or (precision == "bf16" and accumulator(dtypes[0]) == "float") else [False]


def best_tile(m: int, n: int, vector_bytes: int, item: int) -> tuple[int, int]:
    """The tile that covers m x n with the least time per step of k.

    A step issues mr * v multiply-adds, mr broadcasts and v loads, the latter from L2 at a quarter of that rate;
    fewer than 8 sums wait for the latency of the multiply-add.
    """

    def cost(tile: tuple[int, int]) -> float:
        mr, nr = tile
        v = nr * item // vector_bytes
        return math.ceil(m / mr) * math.ceil(n / nr) * (max(mr * v, mr + v, 4 * v, 8) + 1 + mr * v / 64)

    return min(register_tiles(vector_bytes, item), key=cost)


def braces(values: Sequence[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def flag(name: str, value: bool) -> str:
    return f"/*{name}*/ {str(value).lower()}"


def tile_type(compute: str, tile: tuple[int, int], kc: int, mc: int, nc: int) -> str:
    """``ke::Tile<...>``; mc and nc count register tiles."""
    mr, nr = tile
    return f"ke::Tile<{compute}, /*MR*/ {mr}, /*NR*/ {nr}, /*KC*/ {kc}, /*MC*/ {mc * mr}, /*NC*/ {nc * nr}>"


def closure(parameters: str, body: str) -> str:
    """A C++ lambda; parameters that the body does not use stay unnamed."""
    kept = []
    for parameter in parameters.split(", "):
        kind, _, name = parameter.rpartition(" ")
        kept.append(parameter if re.search(rf"\b{name}\b", body) else kind)
    text = indent(dedent(body).strip("\n"), "  ")
    return f"[&]({', '.join(kept)}) {{\n{text}\n}}"


def call(function: str, arguments: Sequence[str]) -> str:
    """A statement with one argument a line."""
    lines = ",\n".join(indent(argument, "    ") for argument in arguments)
    return f"{function}(\n{lines});"
