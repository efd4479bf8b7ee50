"""What the compiler said about vectorizing each loop, by kernel and line."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ke_gym.languages.declarations import parse

_GCC = re.compile(r"kernel\.cpp:(\d+):(\d+): (optimized|missed):\s+(.*)")
_CLANG = re.compile(r"kernel\.cpp:(\d+):(\d+): remark: (.*)")
_LIMIT = 60
# What GCC says of loops around other loops, which it would only ever vectorize in the innermost.
_OUTER = ("loop nest containing", "multiple nested loops", "inner-loop count not invariant", "outer-loop")


@dataclass(frozen=True)
class Remark:
    """One loop: ``line`` of the C++ source (from 1), its kernel or "", vector bytes (0: scalar), and why."""

    line: int
    kernel: str
    width: int
    message: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "vectorized": self.width > 0}


def read_gcc(text: str, source: str) -> tuple[Remark, ...]:
    """Remarks from ``-fopt-info-vec-optimized-missed``: one per loop, the widest vectors if vectorized."""
    widths: dict[int, int] = {}
    missed: dict[int, str] = {}
    loop = 0
    for line in text.splitlines():
        if not (match := _GCC.match(line)):
            continue
        number, message = int(match[1]), match[4]
        if match[3] == "optimized":
            if width := re.match(r"loop vectorized using (\d+) byte", message):
                widths[number] = max(widths.get(number, 0), int(width[1]))
        elif message.startswith("couldn't vectorize loop"):
            loop = number
            missed.setdefault(loop, "")
        elif message.startswith("not vectorized:") and loop in missed and not missed[loop]:
            missed[loop] = message.removeprefix("not vectorized:").strip()
    missed = {line: reason for line, reason in missed.items() if not reason.startswith(_OUTER)}
    return _remarks(widths, missed, source)


def read_clang(text: str, source: str) -> tuple[Remark, ...]:
    """Remarks from ``-Rpass=loop-vectorize`` and its kin; Clang counts elements: taken as four bytes."""
    widths: dict[int, int] = {}
    missed: dict[int, str] = {}
    for line in text.splitlines():
        if not (match := _CLANG.match(line)):
            continue
        number, message = int(match[1]), re.sub(r" \[-R.*\]$", "", match[3])
        if width := re.search(r"vectorized loop \(vectorization width: (\d+)", message):
            widths[number] = max(widths.get(number, 0), 4 * int(width[1]))
        elif message.startswith("loop not vectorized"):
            reason = message.removeprefix("loop not vectorized").strip(": ")
            missed[number] = missed.get(number) or reason
    return _remarks(widths, missed, source)


def _remarks(widths: dict[int, int], missed: dict[int, str], source: str) -> tuple[Remark, ...]:
    kernels = parse(source).values()

    def kernel(line: int) -> str:
        return next((k.name for k in kernels if k.lines[0] <= line <= k.lines[1]), "")

    found = [Remark(n, kernel(n), w, f"vectorized using {w} byte vectors") for n, w in widths.items()]
    found += [
        Remark(n, kernel(n), 0, f"not vectorized: {reason or 'no reason given'}")
        for n, reason in missed.items()
        if n not in widths
    ]
    return tuple(sorted(found, key=lambda r: r.line)[:_LIMIT])
