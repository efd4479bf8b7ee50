"""What models were asked in a search, what came of it, and what it cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ke_gym.search.session import Session
from ke_gym.search.store import Expense, Purpose

PURPOSES: dict[Purpose, str] = {
    "choices": "asked to choose strategies",
    "unused": "still being written at the end",
    "lessons": "asked for lessons",
}


@dataclass(frozen=True)
class Asked:
    """The requests that went to one model; ``seconds`` is the mean from question to answer."""

    model: str
    requests: int
    candidates: int
    correct: int
    improved: int
    refused: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    dollars: float


def asked(session: Session) -> list[Asked]:
    """One row per model, the one with the most requests first, then one for each other purpose; none where no
    model was asked."""
    rows = []
    records = [record for record in session.store.nodes(session.id) if record.usage.calls]
    leaders = {node.number for node in session.tree.leaders}
    for model, count in Counter(record.usage.model for record in records).most_common():
        mine = [record for record in records if record.usage.model == model]
        kinds = Counter(record.kind for record in mine if record.candidate is None)
        calls = sum(record.usage.calls for record in mine)
        rows.append(
            Asked(
                model,
                count,
                sum(record.candidate is not None for record in mine),
                sum(record.evaluation is not None and record.evaluation.correct for record in mine),
                sum(record.number in leaders for record in mine),
                ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()),
                sum(record.usage.prompt_tokens for record in mine),
                sum(record.usage.completion_tokens for record in mine),
                sum(record.usage.seconds for record in mine) / calls,
                sum(record.dollars for record in mine),
            )
        )
    expenses: dict[tuple[str, Purpose], list[Expense]] = {}
    for expense in session.store.expenses(session.id):
        expenses.setdefault((expense.usage.model, expense.purpose), []).append(expense)
    return rows + [_besides(model, purpose, mine) for (model, purpose), mine in expenses.items()]


def _besides(model: str, purpose: Purpose, mine: list[Expense]) -> Asked:
    """What one model was asked besides proposals that were received."""
    calls = sum(expense.usage.calls for expense in mine)
    return Asked(
        model or "unknown",
        calls,
        0,
        0,
        0,
        PURPOSES[purpose],
        sum(expense.usage.prompt_tokens for expense in mine),
        sum(expense.usage.completion_tokens for expense in mine),
        sum(expense.usage.seconds for expense in mine) / max(calls, 1),
        sum(expense.dollars for expense in mine),
    )
