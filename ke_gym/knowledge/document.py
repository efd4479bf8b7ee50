"""One knowledge document: Markdown with front matter that says when it is of use.

    ---
    target: [cuda, hip]
    language: triton
    strategy: [tile_block, param_tune]
    limiter: compute
    phase: [improve, tune]
    keywords: [matmul, num_stages]
    ---
    # Choosing a Triton matmul tile
    …
    ## Sources
    - https://…

All five fields are required and take one value, a list, or ``any``. ``keywords`` are optional, and so is ``device``:
words of which one must occur in the device's name (``device: [h100, h200]``). The first heading is the title. What
stands under "Sources" is for people and is not shown to a proposer.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ke_gym.errors import UserError
from ke_gym.strategies import ACTIONS

ANY = "any"
FIELDS = ("target", "language", "strategy", "limiter", "phase")
TARGETS = ("cpu", "cuda", "hip", "mtia")
LANGUAGES = ("cpp", "triton", "cuda", "hip", "cute", "flydsl")
LIMITERS = (
    "latency", "compute", "dram", "l3", "l2", "l1", "instructions", "registers", "occupancy", "parallelism",
    "launches",
)  # fmt: skip
"""What an evaluation's profile may name, and the resources that strategies relieve."""
PHASES = ("draft", "improve", "fix", "tune")
"""A first kernel, a transformation of one, the repair of a failed one, the choice of its numbers."""

# Targets and languages come by plug-in too, so there any name is good; a misspelt strategy never is.
_CLOSED = {"strategy": tuple(s.name for s in ACTIONS), "limiter": LIMITERS, "phase": PHASES}
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*|FIX|RESTART|STOP")
_FREE = ("device", "keywords")
_KEYS = (*FIELDS, *_FREE)
_CHARACTERS_PER_TOKEN = 3.5
_MOST_BYTES = 64 << 10

# A document is evidence, not a voice: what talks to the model or about the harness has no place in one.
_INJECTION = re.compile(
    r"(ignore|disregard|forget|override)\s+(\w+\s+){0,3}(instructions?|prompts?|rules|above|previous|prior)"
    r"|system\s+prompt|you\s+are\s+(now\s+)?(an?|the)\s+(\w+\s+)?(assistant|model|ai|agent|llm)"
    r"|as\s+an\s+ai\b|<\|?(im_start|im_end|system|endoftext)\|?>|\[/?INST\]|^\s*(system|assistant|user)\s*:"
    r"|api[_ -]?key|(patch|disable|bypass|tamper\s+with|monkey-?patch)\s+(the\s+)?(harness|timer|checker|judge)",
    re.IGNORECASE | re.MULTILINE,
)
_HIDDEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]|<!--")


@dataclass(frozen=True)
class Document:
    """A piece of advice and where it holds.

    ``id`` is its path in its folder without the suffix ("guidance/softmax"); a folder given later replaces
    documents of the same id. ``body`` is Markdown with the title, without the sources. ``origin`` is the
    folder it came from, "" for the built-in ones. The tuples hold names, or the one word ``any``.
    """

    id: str
    title: str
    body: str
    target: tuple[str, ...]
    language: tuple[str, ...]
    strategy: tuple[str, ...]
    limiter: tuple[str, ...]
    phase: tuple[str, ...]
    device: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    origin: str = ""

    @property
    def tokens(self) -> int:
        """About how many tokens the body takes in a prompt (3.5 characters each)."""
        return math.ceil(len(self.body) / _CHARACTERS_PER_TOKEN)

    @property
    def learned(self) -> bool:
        """Whether it was distilled from earlier sessions."""
        return self.id.startswith("learned/")

    def front_matter(self, field: str) -> tuple[str, ...]:
        """The values of one of ``FIELDS``."""
        values: tuple[str, ...] = getattr(self, field)
        return values


def parse(text: str, id: str, origin: str = "") -> Document:
    """The document in ``text``; ``UserError`` names the document and what is wrong with it."""
    where = f"{origin}/{id}.md" if origin else f"knowledge document {id}.md"
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0].strip() != "---":
        raise UserError(f"{where} has no front matter: its first line must be '---'")
    end = next((n for n, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        raise UserError(f"{where}: the front matter is not closed by a line '---'")
    values = _front_matter(lines[1:end], where)
    title, body, sources = _sections(lines[end + 1 :], where)
    hidden = _HIDDEN.search(text)
    if hidden:
        line = text[: hidden.start()].count("\n") + 1
        raise UserError(f"{where}, line {line}: text that a reader does not see; remove it")
    return Document(id, title, body, **values, sources=sources, origin=origin)


def _front_matter(lines: list[str], where: str) -> dict[str, tuple[str, ...]]:
    values: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        key, colon, rest = line.partition(":")
        key = key.strip()
        if not colon:
            raise UserError(f"{where}, line {number}: expected 'name: value', found {line.strip()!r}")
        if key not in _KEYS:
            raise UserError(f"{where}, line {number}: unknown field {key!r}{_nearest(key, _KEYS)}")
        if key in values:
            raise UserError(f"{where}, line {number}: {key!r} is given twice")
        listed = rest.strip().removeprefix("[").removesuffix("]")
        values[key] = tuple(word.strip().strip("'\"") for word in listed.split(",") if word.strip())
        if not values[key]:
            raise UserError(f"{where}, line {number}: {key!r} is empty; write 'any' if it does not matter")
        if key not in _FREE:
            _check_names(values[key], key, f"{where}, line {number}")
    for key in FIELDS:
        if key not in values:
            raise UserError(
                f"{where}: the front matter lacks {key!r}; write '{key}: any' if it does not matter"
            )
    return values


def _check_names(names: tuple[str, ...], key: str, where: str) -> None:
    if ANY in names and len(names) > 1:
        raise UserError(f"{where}: {key!r} is either 'any' or a list of names, not both")
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r} is no name of a {key}")
        known = _CLOSED.get(key)
        if known and name != ANY and name not in known:
            raise UserError(f"{where}: unknown {key} {name!r}{_nearest(name, known)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _sections(lines: list[str], where: str) -> tuple[str, str, tuple[str, ...]]:
    text = "\n".join(lines).strip()
    if not text.startswith("# "):
        raise UserError(f"{where}: after the front matter a title is expected, as '# Title'")
    title, _, rest = text.partition("\n")
    if not rest.strip():
        raise UserError(f"{where} has a title but no text")
    body, _, sources = text.partition("\n## Sources\n")
    listed = tuple(line.strip().removeprefix("- ") for line in sources.splitlines() if line.strip())
    return title.removeprefix("# ").strip(), body.strip(), listed


def read(path: Path, folder: Path, origin: str = "") -> Document:
    """The document in the file ``path`` below ``folder``; ``UserError`` if it cannot be read or is malformed."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(
                f"{path} has {path.stat().st_size >> 10} KiB; a document may have {_MOST_BYTES >> 10}: split it"
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    return parse(text, path.relative_to(folder).with_suffix("").as_posix(), origin)


def injection(text: str) -> str:
    """The first passage that addresses the model or the harness instead of describing kernels, or ""."""
    found = _INJECTION.search(text)
    return found.group(0).strip() if found else ""
