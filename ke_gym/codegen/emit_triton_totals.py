"""What programs have each reduced a part of -> the kernel in Triton that puts the parts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ke_gym.codegen.tiles import identity
from ke_gym.codegen.triton_text import TYPES, literal

SIZES = {"PARTS": 64, "BLOCK": 32}
"""Parts that are put together at a time, and columns a program does so for."""
COMBINE = {"sum": "added", "prod": "multiplied", "max": "max_nan", "min": "min_nan"}


@dataclass(frozen=True)
class Total:
    """``result`` at ``place`` (of ``col``) is ``op`` over the first axis of ``parts``, which are of ``dtype``."""

    result: str
    parts: str
    op: str
    dtype: str
    stored: str
    place: str


def print_totals(totals: Sequence[Total], count: int, columns: int, used: set[str]) -> list[str]:
    """The body of the kernel, line by line; there are ``count`` parts of ``columns`` each."""
    ok = f"(col < {columns})" if columns % SIZES["BLOCK"] else ""
    loaded = " & ".join(
        [*([ok] if ok else []), *([f"(first + part < {count})"] if count % SIZES["PARTS"] else [])]
    )
    lines = [
        "part = tl.arange(0, PARTS)[:, None]",
        "col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]",
    ]
    starts = [literal(identity(total.op, total.dtype).value, total.dtype) for total in totals]
    for k, (total, start) in enumerate(zip(totals, starts)):
        lines.append(f"acc{k} = tl.full([PARTS, BLOCK], {start}, {TYPES[total.dtype]})")
    lines.append(f"for first in range(0, {count}, PARTS):")
    for k, (total, start) in enumerate(zip(totals, starts)):
        used.add(COMBINE[total.op])
        mask = f", mask={loaded}, other={start}" if loaded else ""
        value = f"tl.load({total.parts} + (first + part) * {columns} + col{mask})"
        lines.append(f"    acc{k} = {COMBINE[total.op]}(acc{k}, {value})")
    for k, total in enumerate(totals):
        value = f"tl.reduce(acc{k}, 0, {COMBINE[total.op]}, keep_dims=True)"
        kind = f".to({TYPES[total.stored]})" if total.dtype != total.stored else ""
        tail = f", mask={ok}" if ok else ""
        lines.append(f"tl.store({total.result} + {total.place}, {value}{kind}{tail})")
    return lines
