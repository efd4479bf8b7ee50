"""A model's answer: search/replace edits of the parent, or a whole module, or the reason why it is neither.

The edit format is the one most models know from their training::

    <<<<<<< SEARCH
    the present lines, exactly
    =======
    the lines instead
    >>>>>>> REPLACE

Answers are read line by line, each line once, however odd they are.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import NamedTuple

from ke_gym.proposers.base import Kind

_SEARCH = re.compile(r"[ \t]*<{5,9} ?SEARCH[ \t]*\Z")
_MIDDLE = re.compile(r"[ \t]*={5,9}[ \t]*\Z")
_REPLACE = re.compile(r"[ \t]*>{5,9} ?REPLACE[ \t]*\Z")
_MARK = re.compile(r"[ \t]*(<{5,9} ?SEARCH|>{5,9} ?REPLACE)")
_FENCE = re.compile(r"(?P<indent> {0,3})(?P<mark>`{3,}(?=[^`]*\Z)|~{3,})[ \t]*(?P<tag>[\w+-]*)(?P<rest>.*)\Z")
_MODULE = re.compile(r"^(def forward\b|class ModelNew\b)", re.MULTILINE)
_THOUGHT = re.compile(r"<(?P<end>/?)think(?:ing)?>")
_LONGEST_MARK = 9
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


class _Block(NamedTuple):
    """A fenced block: its language, its text, and whether its fence is closed."""

    tag: str
    body: str
    closed: bool


def parse(text: str, cut: bool = False) -> Answer | Flaw:
    """The answer in a model's words. Thoughts in ``<think>`` tags are left out, also one that does not end.

    ``cut``: the answer is not complete, and a module counts only if its fence is closed.
    """
    text = _said(text.replace("\r\n", "\n").replace("\ufeff", ""))
    if not text.strip():
        return Flaw("empty", "the answer is empty")
    lines = text.split("\n")
    edits = _edits(lines)
    if edits is None:
        return Flaw("edit", "a SEARCH/REPLACE block is not complete")
    if edits:
        if any(not edit.old.strip() for edit in edits):
            return Flaw("edit", "the SEARCH part of a block is empty; quote the lines to be replaced")
        return Answer(edits=tuple(edits))
    blocks = _blocks(lines)
    modules = [b for b in blocks if b.tag in PYTHON and _MODULE.search(b.body)]
    whole = [b.body for b in modules if b.closed]
    if whole:
        return Answer(whole[-1])  # who corrects himself does so further down
    if _MODULE.search(text) and "```" not in text and not cut:
        return Answer(textwrap.dedent(text))
    if modules:
        return Flaw("truncated", "the code block of the answer does not end")
    closed = [b for b in blocks if b.closed]
    other = sorted({b.tag for b in closed} - {*PYTHON})
    if other:
        return Flaw("prose", f"the answer holds {', '.join(other)[:200]} code, but no Python kernel module")
    if closed:
        return Flaw("prose", "no code block of the answer defines forward(...) or class ModelNew")
    return Flaw("prose", "the answer holds no code")


def _said(text: str) -> str:
    """The text without thoughts."""
    kept: list[str] = []
    start, thinking = 0, False
    for tag in _THOUGHT.finditer(text):
        if tag["end"]:
            if not thinking:  # servers differ in where they cut the opening tag
                kept.clear()
            start, thinking = tag.end(), False
        elif not thinking:
            kept.append(text[start : tag.start()])
            thinking = True
    return "".join(kept) + ("" if thinking else text[start:])


def _edits(lines: list[str]) -> list[Edit] | None:
    """The search/replace blocks; None if one is not complete."""
    edits: list[Edit] = []
    old: list[str] | None = None
    new: list[str] | None = None
    for line in lines:
        if _MARK.match(line):
            if old is None and _SEARCH.match(line):
                old = []
            elif old is not None and new is not None and _REPLACE.match(line):
                edits.append(Edit("".join(old), "".join(new)))
                old = new = None
            else:
                return None
        elif new is not None:
            new.append(line + "\n")
        elif old is not None:
            if _MIDDLE.match(line):
                new = []
            else:
                old.append(line + "\n")
    return edits if old is None else None


def _blocks(lines: list[str]) -> list[_Block]:
    """The fenced blocks; the first fence that nothing closes is the last block, down to the end."""
    fences = [_FENCE.match(line) for line in lines]
    # The last line that closes a fence of this sign, indentation and length.
    last: dict[tuple[str, int, int], int] = {}
    for number, fence in enumerate(fences):
        if fence and not (fence["tag"] or fence["rest"].strip()):
            last[_kind(fence)] = number
    blocks: list[_Block] = []
    opened: re.Match[str] | None = None
    start, unclosed = 0, -1
    for number, fence in enumerate(fences):
        if fence is None:
            continue
        if opened is not None:
            if not (fence["tag"] or fence["rest"].strip()) and _closes(_kind(fence), _kind(opened)):
                blocks.append(_block(opened, lines[start:number], closed=True))
                opened = None
        elif any(at > number and _closes(kind, _kind(fence)) for kind, at in last.items()):
            opened, start = fence, number + 1
        elif unclosed < 0 and fence["tag"].lower() in PYTHON:
            unclosed = number
    end = fences[unclosed] if unclosed >= 0 else None
    if end is not None:
        blocks.append(_block(end, lines[unclosed + 1 :], closed=False))
    return blocks


def _kind(fence: re.Match[str]) -> tuple[str, int, int]:
    return fence["mark"][0], len(fence["indent"]), min(len(fence["mark"]), _LONGEST_MARK)


def _closes(fence: tuple[str, int, int], opened: tuple[str, int, int]) -> bool:
    return fence[0] == opened[0] and fence[1] <= opened[1] and fence[2] >= opened[2]


def _block(fence: re.Match[str], lines: list[str], closed: bool) -> _Block:
    body = "".join(line + "\n" for line in lines)
    return _Block(fence["tag"].lower(), textwrap.dedent(body), closed)


def apply(edits: tuple[Edit, ...], source: str) -> str | Flaw:
    """``source`` after the edits, one after the other; the flaw names the first that does not fit."""
    for number, edit in enumerate(edits, 1):
        found = _find(source, edit.old)
        if isinstance(found, str):
            return Flaw("edit", f"block {number}: {found}")
        start, end, indent = found
        source = source[:start] + _indented(edit.new, indent) + source[end:]
    return source


def _find(source: str, old: str) -> tuple[int, int, str] | str:
    """Where ``old`` stands (and how much deeper it is indented there), or why it is nowhere or unclear.

    Lines must agree up to trailing blanks, and all may be indented alike by more than was quoted.
    """
    # Not by splitlines, which knows more ends of lines than Python's grammar.
    lines = [line + "\n" for line in source.split("\n")]
    lines[-1] = lines[-1][:-1]
    if not lines[-1]:
        lines.pop()
    wanted = [line.rstrip() for line in old.strip("\n").split("\n")]
    have = [line.rstrip() for line in lines]
    for indented in (False, True):
        hits = []
        for at in range(len(have) - len(wanted) + 1):
            if not have[at].endswith(wanted[0]):
                continue
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


def _indented(text: str, indent: str) -> str:
    return "\n".join(indent + line if line.strip() else line for line in text.split("\n"))


def _indent(have: list[str], wanted: list[str]) -> str | None:
    """The blanks by which the first non-empty line is indented more than it was quoted."""
    for line, want in zip(have, wanted):
        if want:
            return line[: -len(want)] if line.endswith(want) and not line[: -len(want)].strip() else None
    return None
