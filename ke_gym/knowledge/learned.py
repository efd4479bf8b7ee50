"""What searches teach: which strategy gained or failed where, as documents with their evidence.

After a session, what each strategy brought is added to ``learned/`` beside the store, one file per target, language,
task family and strategy, in words that follow from the numbers by rule. The numbers stand in the file as a table,
so that later sessions add to them, the same session never counts twice, and a person can check, correct or delete
them: a lesson whose file is removed is forgotten. What stands under "Note" is a person's and is kept.

Nothing that a candidate wrote gets into a lesson: only names and numbers, and sentences that a model was asked for,
as long as the numbers show what each claims (``proposers.lessons``).
"""

from __future__ import annotations

import fcntl
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from ke_gym.errors import UserError
from ke_gym.evaluation.stats import sign_p_interval
from ke_gym.files import write_whole
from ke_gym.knowledge.document import ANY, LIMITERS, Document, injection, parse
from ke_gym.strategies import STRATEGIES

if TYPE_CHECKING:
    from ke_gym.search.store import NodeRecord

FOLDER = "learned"
FASTER = 1.01
"""A child counts as faster from this gain over its parent on: the least margin a race confirms."""
ENOUGH = 3
"""Attempts before a lesson is told to anyone."""
_INTERVAL = 6
_ROWS = 40
_COLUMNS = ("session", "task", "limiter", "tries", "correct", "faster", "failures", "gains")
_TRANSFORMATIONS = {strategy.name for strategy in STRATEGIES}
_SENTENCES = 3
"""A model's sentences that one lesson keeps, the latest."""
_SAID = re.compile(r"^- \((helps|no_gain|fails)\) (.+)$", re.MULTILINE)
_GENERATED = re.compile(r"[a-z0-9_.-]{1,40}")  # what ``_name`` makes
_NOTE = re.compile(r"^## Note\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Evidence:
    """One row: what one session saw of a strategy on one task, the parent being held back by ``limiter``.

    ``gains`` are parent's time over child's time, of the correct ones; ``failures`` counts the other outcomes.
    """

    session: str
    task: str
    limiter: str
    tries: int
    correct: int
    faster: int
    failures: tuple[tuple[str, int], ...]
    gains: tuple[float, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.session, self.task, self.limiter

    def row(self) -> str:
        """The row as Markdown."""
        failures = ", ".join(f"{outcome} {count}" for outcome, count in self.failures)
        gains = " ".join(f"{gain:.3g}" for gain in self.gains)
        cells = (*self.key, self.tries, self.correct, self.faster, failures, gains)
        return f"| {' | '.join(str(cell) or '-' for cell in cells)} |"

    @classmethod
    def read(cls, row: str) -> Evidence:
        """``row()`` backwards; ``ValueError`` for a line that is none."""
        cells = ["" if cell.strip() == "-" else cell.strip() for cell in row.strip().strip("|").split("|")]
        session, task, limiter, tries, correct, faster, failures, gains = cells
        counted = [part.rsplit(" ", 1) for part in failures.split(", ") if part]
        made = cls(
            session, task, limiter, int(tries), int(correct), int(faster),
            tuple((outcome, int(count)) for outcome, count in counted),
            tuple(float(gain) for gain in gains.split()),
        )  # fmt: skip
        if not made.faster <= made.correct <= made.tries or not all(0 < g < math.inf for g in made.gains):
            raise ValueError("the counts do not add up")
        return made


Claim = Literal["helps", "no_gain", "fails"]
"""What a sentence says of a strategy: at least half of the attempts were correct with a median gain of ``FASTER``, or the
median is less, or less than half were correct."""


@dataclass(frozen=True)
class Sentence:
    """A model's words on a lesson, and what they claim."""

    claim: Claim
    text: str


@dataclass(frozen=True)
class Lesson:
    """What is known of one strategy on one family of tasks, for one target and language."""

    target: str
    language: str
    family: str
    strategy: str
    evidence: tuple[Evidence, ...]
    note: str = ""
    sentences: tuple[Sentence, ...] = ()

    @property
    def path(self) -> str:
        """Its file below the folder of lessons."""
        return f"{self.target}-{self.language}/{self.family}-{self.strategy}.md"

    @property
    def tries(self) -> int:
        return sum(row.tries for row in self.evidence)

    @property
    def faster(self) -> int:
        return sum(row.faster for row in self.evidence)

    @property
    def correct(self) -> int:
        return sum(row.correct for row in self.evidence)

    def supports(self, claim: Claim) -> bool:
        """Whether the evidence, of at least ``ENOUGH`` attempts, shows what is claimed."""
        gains = self.gains()
        middle = round(median(gains), 2) if gains else 0.0  # as ``fact`` shows it
        shown = {
            "helps": middle >= FASTER and 2 * self.correct >= self.tries,
            "no_gain": bool(gains) and middle < FASTER,
            "fails": 2 * self.correct < self.tries,
        }
        return shown[claim] and self.tries >= ENOUGH

    def fact(self) -> str:
        """The evidence in one line."""
        text = f"{self.strategy}: {self.tries} attempts, {self.correct} correct, {self.faster} faster than their parent"
        if gains := self.gains():
            text += f"; gain where correct: median {median(gains):.2f}x, worst {min(gains):.2f}x, best {max(gains):.2f}x"
        limiters = sorted({row.limiter for row in self.evidence if row.limiter})
        return text + (f"; parents limited by {', '.join(limiters)}" if limiters else "")

    def gains(self, limiter: str | None = None) -> list[float]:
        """Of every correct attempt, or of those whose parent had this limiter."""
        return [g for row in self.evidence if limiter in (None, row.limiter) for g in row.gains]

    def merged(self, other: Lesson) -> Lesson:
        """With the evidence of ``other``, whose rows replace those of the same session, task and limiter."""
        rows = {row.key: row for row in (*self.evidence, *other.evidence)}
        said = tuple(dict.fromkeys((*other.sentences, *self.sentences)))[:_SENTENCES]
        return replace(
            self, evidence=tuple(rows.values())[-_ROWS:], note=self.note or other.note, sentences=said
        )

    def title(self) -> str:
        """The finding in one line."""
        about = f"{self.strategy} on {self.family} kernels"
        gains = self.gains()
        if not gains:
            return f"{about}: never correct in {self.tries} attempts"
        middle = median(gains)
        if self.faster and middle >= FASTER:
            return f"{about}: {middle:.2f}x over the parent"
        if self.faster:
            return f"{about}: faster in {self.faster} of {self.tries} attempts, up to {max(gains):.2f}x"
        return f"{about}: no gain in {self.tries} attempts"

    def markdown(self) -> str:
        """The document, with its evidence as a table."""
        limiters = sorted({row.limiter for row in self.evidence})
        known = [limiter for limiter in limiters if limiter in LIMITERS]
        tasks = sorted({row.task for row in self.evidence})
        failures: Counter[str] = Counter()
        for row in self.evidence:
            failures.update(dict(row.failures))
        lines = [
            "---",
            f"target: {self.target}",
            f"language: {self.language}",
            f"strategy: {self.strategy}",
            f"limiter: [{', '.join(known)}]" if known and known == limiters else f"limiter: {ANY}",
            "phase: [improve, tune]",
            f"keywords: [{', '.join(dict.fromkeys((self.family, *tasks)))}]",
            "---",
            f"# {self.title()}",
            "",
            f"Seen in {_many(len({row.session for row in self.evidence}), 'search', 'searches')} of"
            f" {', '.join(tasks)}: {self.tries} attempts, {self.correct} correct, {self.faster} faster than their parent.",
        ]
        if gains := self.gains():
            low, high = sign_p_interval(gains)
            # With fewer values there is no such interval of a median, only their range.
            kind = "95 % interval" if len(gains) >= _INTERVAL else "all within"
            lines.append(
                f"Gain over the parent where correct: median {median(gains):.2f}x, {kind}"
                f" [{low:.2f}, {high:.2f}], best {max(gains):.2f}x."
            )
        if failures:
            counted = ", ".join(f"{outcome} {count}" for outcome, count in failures.most_common())
            lines.append(f"Failures: {counted}.")
        if len(limiters) > 1:
            lines += ["", *(self._by(limiter) for limiter in limiters)]
        said = [sentence for sentence in self.sentences if self.supports(sentence.claim)]
        if said:
            lines += ["", "## In a model's words", *(f"- ({s.claim}) {s.text}" for s in said)]
        if self.note:
            lines += ["", "## Note", self.note.strip()]
        heads = f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"
        lines += ["", "## Sources", *heads, *(row.row() for row in self.evidence)]
        return "\n".join(lines) + "\n"

    def _by(self, limiter: str) -> str:
        rows = [row for row in self.evidence if row.limiter == limiter]
        gains = self.gains(limiter)
        middle = f", median {median(gains):.2f}x" if gains else ""
        tries, faster = sum(row.tries for row in rows), sum(row.faster for row in rows)
        return f"- parent limited by {limiter or 'something unknown'}: {faster} of {tries} faster{middle}"

    @classmethod
    def read(cls, path: Path, folder: Path) -> Lesson:
        """The lesson in a file; ``UserError`` names the file if it is none any more."""
        document = _document(path, folder)
        rows = [line for line in document.sources if line.startswith("|")][2:]
        try:
            evidence = tuple(Evidence.read(row) for row in rows)
            (target,), (language,), (strategy,) = document.target, document.language, document.strategy
            family = path.stem.removesuffix(f"-{strategy}")
        except ValueError as error:
            raise UserError(
                f"{path}: the table of evidence cannot be read ({error}); correct the file or delete it"
            ) from error
        note = _NOTE.search(document.body)
        words = document.body if note is None else document.body.replace(note.group(0), "")
        said = tuple(Sentence(claim, text) for claim, text in _SAID.findall(words))
        return cls(target, language, family, strategy, evidence, note.group(1).strip() if note else "", said)


def distill(session: str, task: str, family: str, nodes: Sequence[NodeRecord]) -> list[Lesson]:
    """What the transformations of one search brought, compared with the parent each was applied to."""
    judged = {node.number: node.evaluation for node in nodes if node.evaluation is not None}
    rows: dict[tuple[str, str, str, str], list[tuple[str, float | None]]] = {}
    for node in nodes:
        child = node.evaluation
        parent = judged.get(node.parent) if node.parent is not None else None
        if child is None or parent is None or not parent.speedup or node.strategy not in _TRANSFORMATIONS:
            continue
        gain = child.speedup / parent.speedup if child.correct and child.speedup else None
        gain = gain and float(f"{gain:.3g}")  # as the table shows it
        key = (_name(child.target), _name(child.language), node.strategy, _name(parent.limiter))
        rows.setdefault(key, []).append((child.outcome, gain))
    lessons: dict[str, Lesson] = {}
    for (target, language, strategy, limiter), attempts in rows.items():
        gains = sorted(gain for _, gain in attempts if gain is not None)
        failed = Counter(outcome for outcome, _ in attempts if outcome != "correct")
        evidence = Evidence(
            _name(session), _name(task), limiter, len(attempts), len(gains),
            sum(gain >= FASTER for gain in gains), tuple(failed.most_common()), tuple(gains),
        )  # fmt: skip
        lesson = Lesson(target, language, _name(family) or "other", strategy, (evidence,))
        known = lessons.get(lesson.path)
        lessons[lesson.path] = known.merged(lesson) if known else lesson
    return list(lessons.values())


def write_back(folder: Path, lessons: Iterable[Lesson]) -> list[Path]:
    """Add the lessons to those in ``folder``; the files written. ``UserError`` if that is not possible."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            for lesson in lessons:
                path = folder / lesson.path
                known = Lesson.read(path, folder) if path.exists() else None
                path.parent.mkdir(exist_ok=True)
                write_whole(path, (known.merged(lesson) if known else lesson).markdown().encode())
                written.append(path)
    except OSError as error:
        raise UserError(
            f"lessons cannot be written to {folder} ({error.strerror}); choose another KE_GYM_HOME, or --no-learned"
        ) from error
    return written


def documents(folder: Path) -> Iterator[Document]:
    """The lessons in ``folder`` with enough evidence, as documents; and documents that a person put there.

    ``UserError`` for a file that is malformed, or tells the reader what to do instead of what was seen.
    """
    for path in sorted(folder.rglob("*.md")):
        if document := load(path, folder):
            yield document


def load(path: Path, folder: Path) -> Document | None:
    """The document in one file of a folder of lessons; None if there is too little evidence for it yet."""
    document = _document(path, folder)
    distilled = any(line.startswith("| session |") for line in document.sources)
    return document if not distilled or Lesson.read(path, folder).tries >= ENOUGH else None


def _document(path: Path, folder: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    document = parse(text, f"{FOLDER}/{path.relative_to(folder).with_suffix('').as_posix()}", str(folder))
    if passage := injection(_judged(document, text)):
        raise UserError(f"{path} gives instructions ({passage!r}) instead of a lesson; remove it")
    return document


def _judged(document: Document, text: str) -> str:
    """What of a lesson's text may give instructions: all but names, wherever it is a list or a table of them.

    A task may be called ``api_key_lookup``. In a note or a sentence the same words are judged as they stand."""
    rows = [cell.strip() for line in document.sources for cell in line.split("|")]
    suspects = {n for n in (*document.keywords, *rows) if _GENERATED.fullmatch(n) and injection(n)}
    note = _NOTE.search(document.body)
    said = "\n".join((note.group(1) if note else "", *(words for _, words in _SAID.findall(document.body))))
    for name in sorted(suspects, key=len, reverse=True):
        text = text.replace(name, "name")
    return f"{said}\n{text}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Searches that end at the same moment write one after the other."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _name(text: str) -> str:
    """``text`` as a name: task names are a user's, and go into file names and prompts."""
    return re.sub(r"[^a-z0-9_.-]+", "-", text.lower()).strip("-._")[:40] or ("unnamed" if text else "")


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
