"""Which documents helped: what became of the proposals whose prompts quoted them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from ke_gym.knowledge.learned import FASTER

if TYPE_CHECKING:
    from ke_gym.search.store import NodeRecord


@dataclass(frozen=True)
class Usefulness:
    """One document: how many proposals were told of it, the shares of them that were correct and faster than their
    parent, the median gain of the correct ones, and ``without``: the share that was faster among proposals by
    models that were not told of it, weighted to the same mix of strategies (None: there are none to compare with).

    A comparison of what happened to occur, not an experiment: a document is retrieved where it fits.
    """

    document: str
    told: int
    correct: float
    faster: float
    gain: float | None
    without: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Outcome:
    strategy: str
    documents: frozenset[str]
    correct: bool
    gain: float | None

    @property
    def faster(self) -> bool:
        return self.gain is not None and self.gain >= FASTER


def measure(searches: Iterable[Sequence[NodeRecord]]) -> list[Usefulness]:
    """Every document that was quoted in the recorded searches, the most often quoted first.

    A proposal that came to nothing (a refusal by the model, code that did not pass) counts as not correct; drafts
    have no parent and count for correctness only.
    """
    outcomes = [outcome for nodes in searches for outcome in _outcomes(nodes)]
    told: dict[str, list[_Outcome]] = defaultdict(list)
    by_strategy: dict[str, list[_Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_strategy[outcome.strategy].append(outcome)
        for document in outcome.documents:
            told[document].append(outcome)
    rows = [_row(document, mine, by_strategy) for document, mine in told.items()]
    return sorted(rows, key=lambda row: (-row.told, row.document))


def _outcomes(nodes: Sequence[NodeRecord]) -> Iterator[_Outcome]:
    judged = {node.number: node.evaluation for node in nodes if node.evaluation is not None}
    for node in nodes:
        child = node.evaluation
        if not node.usage.calls or (child is None and node.candidate is not None):
            continue  # not by a model, or still in flight when the search ended
        correct = child is not None and child.correct
        parent = judged.get(node.parent) if node.parent is not None else None
        gain = None
        if correct and child is not None and child.speedup and parent is not None and parent.speedup:
            gain = child.speedup / parent.speedup
        yield _Outcome(node.strategy, frozenset(node.usage.documents), correct, gain)


def _row(document: str, mine: list[_Outcome], by_strategy: dict[str, list[_Outcome]]) -> Usefulness:
    gains = [outcome.gain for outcome in mine if outcome.gain is not None]
    shares = []
    for outcome in mine:
        others = [other for other in by_strategy[outcome.strategy] if document not in other.documents]
        if others:
            shares.append(sum(other.faster for other in others) / len(others))
    return Usefulness(
        document,
        len(mine),
        sum(outcome.correct for outcome in mine) / len(mine),
        sum(outcome.faster for outcome in mine) / len(mine),
        median(gains) if gains else None,
        sum(shares) / len(shares) if shares else None,
    )
