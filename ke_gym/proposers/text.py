"""Rewrites of source that carries no schedule: named constants, launch parameters, compiler flags.

What can be changed in a text without understanding it. A knob is a place in the text and the values that may
stand there; a strategy is a choice of knobs by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ke_gym.strategies import Strategy

_CONSTANT = re.compile(
    r"(?P<head>\bconst(?:expr)?\s+(?:std::)?(?:int|long|unsigned|size_t|u?int(?:32|64)_t|auto)\s+"
    r"(?P<name>[A-Za-z_]\w*)\s*=\s*)(?P<value>\d+)(?P<tail>\s*;)"
)
_DEFINE = re.compile(
    r"(?P<head>^[ \t]*#define\s+(?P<name>[A-Z]\w*)[ \t]+)(?P<value>\d+)(?P<tail>[ \t]*$)", re.M
)
_LAUNCH = re.compile(
    r"(?P<head>\b(?P<name>num_warps|num_stages|[A-Z][A-Z0-9_]*)\s*=\s*)(?P<value>\d+)(?P<tail>\s*[,)])"
)
_CPP = re.compile(r"(?P<open>\blang\.cpp\(\s*r?(?P<q>'''|\"\"\").*?(?P=q))(?P<rest>[^()]*)\)", re.S)
_FLAGS = re.compile(r"flags\s*=\s*(['\"])(?P<flags>[^'\"]*)\1")

FAST_FLAGS = ("-ffast-math",)
FLAGS = "compiler_flags"  # the knob's name

# Which names a strategy turns, by what such constants are usually called.
_NAMES = {
    "tile_block": re.compile(r"tile|block|chunk|panel|^[MNK]B$|^B[MNK]$|_[MNK]$", re.I),
    "unroll_ilp": re.compile(r"unroll|accum|lanes|ilp", re.I),
    "prefetch_pipeline": re.compile(r"prefetch|stages|depth|ahead", re.I),
    "work_partition": re.compile(r"warps|threads|grain|rows_per|per_thread|split", re.I),
    "split_reduce": re.compile(r"split|parts", re.I),
    "vectorize": re.compile(r"vec|width|simd", re.I),
}
_STRATEGY_FLAGS = {
    "vectorize": ("-mprefer-vector-width=512", "-mprefer-vector-width=256"),
    "unroll_ilp": ("-funroll-loops",),
    "precision_math": FAST_FLAGS,
}
_TUNED_FLAGS = ("-O3", "-O2", *(flag for flags in _STRATEGY_FLAGS.values() for flag in flags))


@dataclass(frozen=True)
class Knob:
    """``name``, its present ``value``, the values it may take, and where it stands."""

    name: str
    value: int
    choices: tuple[int, ...]
    start: int
    end: int


def knobs(source: str) -> list[Knob]:
    """The numeric constants and launch parameters of a kernel module, in order; each name once."""
    found: dict[str, Knob] = {}
    for pattern in (_CONSTANT, _DEFINE, _LAUNCH):
        for match in pattern.finditer(source):
            value = int(match["value"])
            if match["name"] not in found and 1 <= value <= 1 << 20 and value & (value - 1) == 0:
                # Powers of two are choices somebody made; other numbers are usually the problem's own sizes.
                choices = tuple(v for v in (value // 4, value // 2, value, 2 * value, 4 * value) if v >= 1)
                start, end = match.span("value")
                found[match["name"]] = Knob(match["name"], value, tuple(dict.fromkeys(choices)), start, end)
    return sorted(found.values(), key=lambda knob: knob.start)


def space(source: str, fast_math: bool) -> dict[str, tuple[int | str, ...]]:
    """What tuning may turn: the knobs and, where there is one ``lang.cpp`` call, one flag of its compiler."""
    choices: dict[str, tuple[int | str, ...]] = {knob.name: knob.choices for knob in knobs(source)}
    present = flags(source)
    if present is not None:
        offered = [flag for flag in _TUNED_FLAGS if fast_math or flag not in FAST_FLAGS]
        sets = [present, *(_joined(present, flag) for flag in offered)]
        choices[FLAGS] = tuple(dict.fromkeys(" ".join(words) for words in sets))
    return choices


def setting(source: str) -> dict[str, int | str]:
    """Where ``source`` stands in its ``space``."""
    values: dict[str, int | str] = {knob.name: knob.value for knob in knobs(source)}
    present = flags(source)
    return values if present is None else values | {FLAGS: " ".join(present)}


def turned(source: str, values: Mapping[str, int | str]) -> str:
    """``source`` with these knobs set."""
    for knob in reversed(knobs(source)):
        if knob.name in values:
            source = f"{source[: knob.start]}{values[knob.name]}{source[knob.end :]}"
    if FLAGS in values:
        source = with_flags(source, tuple(str(values[FLAGS]).split()))
    return source


def flags(source: str) -> tuple[str, ...] | None:
    """The compiler flags of a module with one ``lang.cpp`` call, or None if it has none or several."""
    calls = list(_CPP.finditer(source))
    if len(calls) != 1:
        return None
    given = _FLAGS.search(calls[0]["rest"])
    return tuple(given["flags"].split()) if given else ()


def _joined(present: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """``present`` with ``flag``, which takes the place of one that says otherwise."""
    return (*(other for other in present if _stem(other) != _stem(flag)), flag)


def _stem(flag: str) -> str:
    return "-O" if re.fullmatch(r"-O\w*", flag) else flag.split("=")[0]


def with_flags(source: str, new: tuple[str, ...]) -> str:
    """``source`` whose one ``lang.cpp`` call has these flags."""
    call = next(_CPP.finditer(source))
    rest = re.sub(r",?\s*" + _FLAGS.pattern, "", call["rest"]).rstrip().rstrip(",")
    words = f", flags={' '.join(new)!r}" if new else ""
    return f"{source[: call.start()]}{call['open']}{rest}{words}){source[call.end() :]}"


def alternatives(source: str, strategy: Strategy, fast_math: bool) -> list[str]:
    """Every text that ``strategy`` can make of ``source``, the most promising first."""
    made: list[str] = []
    pattern = _NAMES.get(strategy.name)
    if pattern is not None:
        for knob in knobs(source):
            if pattern.search(knob.name):
                present_bits = knob.value.bit_length()
                nearest = sorted(knob.choices, key=lambda v: (abs(v.bit_length() - present_bits), -v))
                made += [turned(source, {knob.name: value}) for value in nearest if value != knob.value]
    present = flags(source)
    if present is not None:
        for flag in _STRATEGY_FLAGS.get(strategy.name, ()):
            if flag not in present and (fast_math or flag not in FAST_FLAGS):
                made.append(with_flags(source, _joined(present, flag)))
    return list(dict.fromkeys(text for text in made if text != source))


def repairs(source: str) -> list[str]:
    """Texts that undo what most often breaks a kernel: the last flag, the largest constants."""
    made = []
    present = flags(source)
    if present:
        made += [with_flags(source, present[:-1]), with_flags(source, ())]
    for knob in sorted(knobs(source), key=lambda knob: -knob.value):
        made += [turned(source, {knob.name: value}) for value in (knob.value // 2, knob.value // 4) if value]
    return list(dict.fromkeys(text for text in made if text != source))
