"""A model's answer: search/replace edits of the parent, or a whole module, or the reason why it is neither.

The edit format is the one most models know from their training::

    <<<<<<< SEARCH
    the present lines, exactly
    =======
    the lines instead
    >>>>>>> REPLACE
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from ke_gym.proposers.base import Kind

_BLOCK = re.compile(
    r"^[ \t]*<{5,9} ?SEARCH[ \t]*\n(?P<old>.*?)^[ \t]*={5,9}[ \t]*\n(?P<new>.*?)^[ \t]*>{5,9} ?REPLACE[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"^[ \t]*(<{5,9} ?SEARCH|>{5,9} ?REPLACE)", re.MULTILINE)
_FENCE = re.compile(
    r"^(?P<mark>`{3,}|~{3,})[ \t]*(?P<tag>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=mark)[ \t]*$", re.M | re.S
)
_OPEN = re.compile(r"^(`{3,}|~{3,})[ \t]*(python|py)?[ \t]*\n(?P<body>.*)\Z", re.MULTILINE | re.DOTALL)
_MODULE = re.compile(r"^(def forward\b|class ModelNew\b)", re.MULTILINE)
_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
PYTHON = ("", "python", "py", "python3")


@dataclass(frozen=True)
class Edit:
    """Replace ``old``, which must occur once, by ``new``."""

    old: str
    new: str


@dataclass(frozen=True)
class Answer:
    """What a model wrote: a module's whole ``source``, or ``edits``; one of them is empty."""

    source: str = ""
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Flaw:
    """What is wrong with an answer, in a sentence that the model is told."""

    kind: Kind
    reason: str


def parse(text: str) -> Answer | Flaw:
    """The answer in a model's words. Thoughts in ``<think>`` tags are left out."""
    text = _THOUGHT.sub("", text).replace("\r\n", "\n")
    if "</think>" in text:  # servers differ in where they cut the opening tag
        text = text.rpartition("</think>")[2]
    if not text.strip():
        return Flaw("empty", "the answer is empty")
    blocks = list(_BLOCK.finditer(text))
    if blocks:
        if len(_MARK.findall(text)) != 2 * len(blocks):
            return Flaw("edit", "a SEARCH/REPLACE block is not complete")
        edits = tuple(Edit(block["old"], block["new"]) for block in blocks)
        if any(not edit.old.strip() for edit in edits):
            return Flaw("edit", "the SEARCH part of a block is empty; quote the lines to be replaced")
        return Answer(edits=edits)
    if _MARK.search(text):
        return Flaw("edit", "a SEARCH/REPLACE block is not complete")
    modules = [m for m in _FENCE.finditer(text) if m["tag"].lower() in PYTHON and _MODULE.search(m["body"])]
    if modules:
        return Answer(textwrap.dedent(modules[-1]["body"]))  # who corrects himself does so further down
    if _MODULE.search(text) and "```" not in text:
        return Answer(textwrap.dedent(text))
    other = sorted({m["tag"] for m in _FENCE.finditer(text)} - {*PYTHON})
    if other:
        return Flaw("prose", f"the answer holds {', '.join(other)} code, but no Python kernel module")
    opened = _OPEN.search(text)
    if opened and _MODULE.search(opened["body"]):
        return Flaw("truncated", "the code block of the answer does not end")
    if any(True for _ in _FENCE.finditer(text)):
        return Flaw("prose", "no code block of the answer defines forward(...) or class ModelNew")
    return Flaw("prose", "the answer holds no code")


def apply(edits: tuple[Edit, ...], source: str) -> str | Flaw:
    """``source`` after the edits, one after the other; the flaw names the first that does not fit."""
    for number, edit in enumerate(edits, 1):
        found = _find(source, edit.old)
        if isinstance(found, str):
            return Flaw("edit", f"block {number}: {found}")
        start, end, indent = found
        source = source[:start] + textwrap.indent(edit.new, indent) + source[end:]
    return source


def _find(source: str, old: str) -> tuple[int, int, str] | str:
    """Where ``old`` stands (and how much deeper it is indented there), or why it is nowhere or unclear.

    Lines must agree up to trailing blanks, and all may be indented alike by more than was quoted.
    """
    lines = source.splitlines(keepends=True)
    wanted = [line.rstrip() for line in old.strip("\n").split("\n")]
    have = [line.rstrip() for line in lines]
    for indented in (False, True):
        hits = []
        for at in range(len(have) - len(wanted) + 1):
            indent = _indent(have[at : at + len(wanted)], wanted) if indented else ""
            if indent is not None and have[at : at + len(wanted)] == [indent + w if w else w for w in wanted]:
                hits.append((at, indent))
        if len(hits) > 1:
            return f"its SEARCH part occurs {len(hits)} times; quote more lines, so that it occurs once"
        if hits:
            at, indent = hits[0]
            start = sum(map(len, lines[:at]))
            return start, start + sum(map(len, lines[at : at + len(wanted)])), indent
    near = next((w.strip() for w in wanted if w.strip() and w not in have), "")
    return f"its SEARCH part does not occur in the source (first line that does not: {near[:100]!r})"


def _indent(have: list[str], wanted: list[str]) -> str | None:
    """The blanks by which the first non-empty line is indented more than it was quoted."""
    for line, want in zip(have, wanted):
        if want:
            return line[: -len(want)] if line.endswith(want) and not line[: -len(want)].strip() else None
    return None
