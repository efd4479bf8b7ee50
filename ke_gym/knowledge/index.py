"""Which documents answer a situation: first a filter by front matter, then a ranking of what is left.

The ranking is BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009) as SQLite's FTS5
computes it over titles, keywords and bodies, plus a bonus for every field that a document names rather than
leaves at ``any``: advice written for this very strategy goes before advice for all of them. A ``Reranker`` may
have the last word on the best few.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ke_gym.knowledge.document import ANY, FIELDS, Document
from ke_gym.strategies import CONTROLS

# A field that names what the situation has, in units of the most relevant document's score.
_BONUS = {"target": 0.1, "language": 0.15, "strategy": 0.35, "limiter": 0.2, "phase": 0.15}
_MOST_TERMS = 48
_RERANKED = 20
_WORD = re.compile(r"[a-z][a-z0-9_]+")
_CONTROL_NAMES = {strategy.name for strategy in CONTROLS}
_COMMON = frozenset(
    _WORD.findall(
        "about after again all also and any are because been before being both but can cannot could did does each"
        " else every few for from further had has have here how into its just less like more most must not now off"
        " once only other our out over own same should some such than that the their them then there these they"
        " this those through too under until very was were what when where which while who why will with would you"
        " your import torch def return self class forward init super none true false tensor dim nn"
    )
)


# What every task file says, so that it tells nothing about one; searched for only when there is nothing else.
_TASK_FILE = frozenset(
    _WORD.findall("get init inputs shapes ragged cpu gpu size randn rand randint model module")
)


@dataclass(frozen=True)
class Situation:
    """What a proposer is about to do. Empty strings mean "not known" and filter nothing.

    ``limiter`` is the parent's, as the profile names it; ``phase`` is one of ``draft``, ``improve``, ``fix``,
    ``tune``; ``text`` is whatever describes the problem in words or code: the reference, operators, a log.
    ``device`` is the name of the machine ("NVIDIA H200", "AMD EPYC 9575F"): documents on others are left out.
    """

    target: str = ""
    language: str = ""
    strategy: str = ""
    limiter: str = ""
    phase: str = ""
    text: str = ""
    device: str = ""


class Reranker(Protocol):
    """Scores documents for a query, higher is better, in the order given: an embedding model, for example."""

    def __call__(self, query: str, documents: Sequence[Document]) -> Sequence[float]: ...


def applies(document: Document, situation: Situation) -> bool:
    """Whether the front matter admits the situation. FIX and RESTART name no transformation: they filter by
    phase, not by strategy."""
    for field in FIELDS:
        wanted: str = getattr(situation, field)
        if not wanted or (field == "strategy" and wanted in _CONTROL_NAMES):
            continue
        names = document.front_matter(field)
        if wanted not in names and ANY not in names:
            return False
    if not (situation.device and document.device):
        return True
    words = "|".join(re.escape(word) for word in document.device)
    return re.search(rf"\b({words})", situation.device, re.IGNORECASE) is not None


def _specificity(document: Document, situation: Situation) -> float:
    """The bonus for the fields in which the document names what the situation has."""
    wanted = {field: getattr(situation, field) for field in FIELDS}
    if wanted["strategy"] in _CONTROL_NAMES:
        del wanted["strategy"]
    return sum(_BONUS[f] for f, value in wanted.items() if value in document.front_matter(f))


def terms(text: str) -> list[str]:
    """The words of ``text`` worth searching for, each once, the most frequent first."""
    counts: dict[str, int] = {}
    for found in _WORD.findall(text.lower()):
        for word in {found, *found.split("_")}:
            if len(word) > 2 and word not in _COMMON:
                counts[word] = counts.get(word, 0) + 1
    telling = [word for word in counts if word not in _TASK_FILE] or list(counts)
    return sorted(telling, key=lambda word: -counts[word])[:_MOST_TERMS]


class Index:
    """An FTS5 index over ``documents``, in memory; thread-safe."""

    def __init__(self, documents: Iterable[Document], reranker: Reranker | None = None) -> None:
        self.documents = tuple(documents)
        self._reranker = reranker
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.execute(
            "CREATE VIRTUAL TABLE pages USING fts5 (title, keywords, body, tokenize = 'porter unicode61')"
        )
        self._db.executemany(
            "INSERT INTO pages (rowid, title, keywords, body) VALUES (?, ?, ?, ?)",
            (
                (number, _spaced(d.title), _spaced(" ".join((*d.keywords, d.id))), _spaced(d.body))
                for number, d in enumerate(self.documents)
            ),
        )

    def search(self, situation: Situation) -> list[tuple[Document, float]]:
        """The documents that apply, best first, with their scores."""
        relevance = self._relevance(situation.text)
        scored = []
        for number, document in enumerate(self.documents):
            if applies(document, situation):
                scored.append((document, relevance.get(number, 0.0) + _specificity(document, situation)))
        # Ties go by id, so that the same situation always gets the same documents.
        scored.sort(key=lambda pair: (-pair[1], pair[0].id))
        return self._reranked(situation, scored)

    def _relevance(self, text: str) -> dict[int, float]:
        """BM25 of what a document is about plus half that of what it mentions, each relative to the best."""
        wanted = terms(text)
        if not wanted:
            return {}
        words = " OR ".join(f'"{word}"' for word in wanted)
        scores: dict[int, float] = {}
        for columns, weight in (("title keywords", 1.0), ("body", 0.5)):
            with self._lock:
                rows = self._db.execute(
                    "SELECT rowid, -bm25(pages, 1, 1.5, 1) FROM pages WHERE pages MATCH ?",
                    (f"{{{columns}}} : ({words})",),
                ).fetchall()
            best = max((score for _, score in rows), default=1.0)
            for number, score in rows:
                scores[number] = scores.get(number, 0.0) + weight * score / best
        return scores

    def _reranked(
        self, situation: Situation, scored: list[tuple[Document, float]]
    ) -> list[tuple[Document, float]]:
        if self._reranker is None or not scored:
            return scored
        head, tail = scored[:_RERANKED], scored[_RERANKED:]
        query = " ".join((situation.text, situation.strategy.replace("_", " "), situation.limiter)).strip()
        opinions = self._reranker(query, [document for document, _ in head])
        order = sorted(range(len(head)), key=lambda n: -opinions[n])
        # Reciprocal-rank fusion (Cormack, Clarke and Büttcher, 2009): ranks compare where scores do not.
        fused = dict.fromkeys(range(len(head)), 0.0)
        for ranking in (range(len(head)), order):
            for rank, n in enumerate(ranking):
                fused[n] += 1 / (10 + rank)
        ranked = sorted(fused, key=lambda n: (-fused[n], head[n][0].id))
        return [(head[n][0], fused[n]) for n in ranked] + tail


def _spaced(text: str) -> str:
    """``text`` with the parts of names_like_this as words of their own too."""
    parts = re.findall(r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+", text)
    return " ".join((text, *(part.replace("_", " ") for part in parts)))
