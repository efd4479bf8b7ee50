"""The ``extern "C"`` kernels that a C++ source defines, read from its text."""

from __future__ import annotations

import bisect
import ctypes
import re
from dataclasses import dataclass
from typing import Any

import torch

POINTEES: dict[str, torch.dtype] = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "int8_t": torch.int8,
    "int16_t": torch.int16,
    "int32_t": torch.int32,
    "int64_t": torch.int64,
    "uint8_t": torch.uint8,
    "bool": torch.bool,
}
"""What a kernel's pointers may point to, by C type as plans spell it."""

SCALARS: dict[str, Any] = {
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    "int8_t": ctypes.c_int8,
    "int16_t": ctypes.c_int16,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
}
"""What a kernel may take by value, by C type as plans spell it."""

_SPELLINGS = {
    "signed char": "int8_t",
    "unsigned char": "uint8_t",
    "short": "int16_t",
    "short int": "int16_t",
    "int": "int32_t",
    "signed": "int32_t",
    "signed int": "int32_t",
    "unsigned": "uint32_t",
    "unsigned int": "uint32_t",
    "long": "int64_t",
    "long int": "int64_t",
    "long long": "int64_t",
    "long long int": "int64_t",
    "ptrdiff_t": "int64_t",
    "ssize_t": "int64_t",
    "unsigned long": "uint64_t",
    "unsigned long long": "uint64_t",
    "size_t": "uint64_t",
    "_Float16": "half",
    "ke::half": "half",
    "ke::bf16": "bf16",
    **{f"std::{name}": name for name in (*SCALARS, "int8_t")},
    "std::size_t": "uint64_t",
    "std::ptrdiff_t": "int64_t",
}


@dataclass(frozen=True)
class Parameter:
    """One parameter: ``ctype`` is the C type as plans spell it ("float", "const float*", "int64_t")."""

    name: str
    ctype: str
    problem: str = ""
    """Why no argument can be passed to it, or ""."""

    @property
    def pointer(self) -> bool:
        return self.ctype.endswith("*")

    @property
    def writes(self) -> bool:
        return self.pointer and not self.ctype.startswith("const ")

    @property
    def pointee(self) -> torch.dtype:
        """The dtype of the tensors that a pointer takes."""
        return POINTEES[self.ctype.removeprefix("const ").removesuffix("*")]


@dataclass(frozen=True)
class Declaration:
    """One kernel: its name, parameters, return type and the lines of the source (from 1) that define it."""

    name: str
    parameters: tuple[Parameter, ...]
    returns: str
    lines: tuple[int, int]


_COMMENT = re.compile(
    r"""//[^\n]*|/\*.*?\*/|R"(?P<tag>[^(\s]*)\(.*?\)(?P=tag)"|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""",
    re.DOTALL,
)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.MULTILINE)
_ATTRIBUTE = re.compile(r"__attribute__\s*\(\(.*?\)\)|\[\[.*?\]\]|\balignas\s*\(.*?\)", re.DOTALL)
_QUALIFIER = re.compile(
    r"\b(?:__restrict__|__restrict|restrict|volatile|inline|static|extern|noexcept|struct)\b"
)


def _blank(text: str, keep: str = "") -> str:
    """Blanks of the same length, so that positions and line numbers stay."""
    return re.sub(r"[^\n]", " ", text) if text != keep else text


def _code(source: str) -> str:
    text = _COMMENT.sub(lambda m: _blank(m[0], keep='"C"'), source)
    text = _DIRECTIVE.sub(lambda m: _blank(m[0]), text)
    return _ATTRIBUTE.sub(lambda m: _blank(m[0]), text)


def parse(source: str) -> dict[str, Declaration]:
    """Every function that the source defines as ``extern "C"``, alone or in a block, by name.

    Macros are not expanded: a kernel whose declaration comes from a macro is not seen.
    """
    text = _code(source)
    starts = [0, *(m.end() for m in re.finditer("\n", text))]
    found: dict[str, Declaration] = {}
    for linkage in re.finditer(r'\bextern\s*"C"\s*', text):
        position = linkage.end()
        if text[position : position + 1] == "{":
            span = (position + 1, _closing(text, position))
        else:
            span = (position, len(text))
        for declared, (begin, end) in _functions(text, *span, many=text[position : position + 1] == "{"):
            lines = bisect.bisect_right(starts, begin), bisect.bisect_right(starts, end)
            found[declared.name] = Declaration(declared.name, declared.parameters, declared.returns, lines)
    return found


_HEAD = re.compile(r"(?P<returns>[\w\s:*&<>]*?)\b(?P<name>[A-Za-z_]\w*)\s*\(|[{};]")


def _functions(text: str, begin: int, end: int, many: bool) -> list[tuple[Declaration, tuple[int, int]]]:
    found = []
    position = begin
    while position < end and (head := _HEAD.search(text, position, end)):
        position = head.end()
        if head["name"]:
            close = _closing(text, head.end() - 1)
            after = re.compile(r"[\s\w]*").match(text, close + 1)
            position = after.end() if after else close + 1
            if text[position : position + 1] == "{":
                stop = _closing(text, position)
                returns = " ".join(_QUALIFIER.sub(" ", head["returns"]).replace("*", " * ").split())
                parameters = _parameters(text[head.end() : close])
                found.append(
                    (Declaration(head["name"], parameters, returns, (0, 0)), (head.start("name"), stop))
                )
                position = stop + 1
        elif head[0] == "{":
            position = _closing(text, head.start()) + 1
        if not many:
            break
    return found


def _closing(text: str, opening: int) -> int:
    """Where the bracket opened at ``opening`` closes; the end of the text if it never does."""
    left, right = text[opening], {"(": ")", "{": "}"}[text[opening]]
    depth = 0
    for match in re.compile(f"[{re.escape(left + right)}]").finditer(text, opening):
        depth += 1 if match[0] == left else -1
        if depth == 0:
            return match.start()
    return len(text)


def _parameters(text: str) -> tuple[Parameter, ...]:
    pieces = [piece for piece in text.split(",") if piece.strip()]
    if [piece.strip() for piece in pieces] == ["void"]:
        return ()
    return tuple(_parameter(piece, index) for index, piece in enumerate(pieces, 1))


def _parameter(text: str, index: int) -> Parameter:
    spelled = " ".join(text.split())
    pointered = re.sub(r"(\w+)\s*\[[^]]*\]", r"* \1", text.split("=")[0])  # float x[] is float* x
    words = re.findall(r"[A-Za-z_]\w*(?:::\w+)*|\S", _QUALIFIER.sub(" ", pointered))
    stars = words.count("*")
    split = words.index("*") if stars else len(words)
    base = [word for word in words[:split] if word != "const"]
    after = [word for word in words[split:] if word not in ("*", "const")]
    if not stars and len(base) > 1 and _canonical(base) is None:
        base, after = base[:-1], base[-1:]
    name = after[0] if after else f"argument{index}"
    kind = _canonical(base)
    known = kind is not None and kind in (POINTEES if stars else SCALARS)
    if stars > 1 or not known or len(after) > 1:
        return Parameter(name, spelled, f"type {spelled!r} is not one that can be passed")
    const = "const " if stars and "const" in words[:split] else ""
    return Parameter(name, f"{const}{kind}{'*' if stars else ''}")


def _canonical(words: list[str]) -> str | None:
    spelled = " ".join(words)
    kind = _SPELLINGS.get(spelled, spelled)
    return kind if kind in POINTEES or kind in SCALARS else None
