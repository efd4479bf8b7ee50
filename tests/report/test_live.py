"""What is printed while a search runs says what models and compilers said, letter by letter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ke_gym.evaluation.selfcheck import Proof
from ke_gym.proposers.base import Refusal
from ke_gym.report.live import LiveView, PlainView

SAID = "out[/*row*/0] = 1; y[i] = x[i] :x: [/x]"


class _Session(SimpleNamespace):
    """Of a session what the views show."""

    def __len__(self) -> int:
        return 1


@pytest.fixture
def session() -> Any:
    budget = SimpleNamespace(evaluations=5, seconds=None, left=lambda spent: 0.5)
    spent = SimpleNamespace(seconds=1.0, evaluations=1, dollars=0.0)
    return SimpleNamespace(
        tree=_Session(best=None), budget=budget, spent=spent, usage=SimpleNamespace(calls=0)
    )


@pytest.mark.parametrize("kind", [PlainView, LiveView])
def test_text_is_no_markup(kind: type[PlainView] | type[LiveView], session: Any) -> None:
    console = Console(width=200, force_terminal=False)
    view = kind(console, SAID)
    request: Any = SimpleNamespace(strategy=SimpleNamespace(name="fuse"))
    node: Any = SimpleNamespace(
        number=3, strategy="fuse", speedup=0.0, correct=False, evaluation=SimpleNamespace(outcome="compile")
    )
    task: Any = None
    shown = []
    for step in (
        lambda: view.proved(task, Proof(1, (SAID,))),
        lambda: view.refused(session, request, Refusal(SAID, kind="contract")),
        lambda: view.told(session, node, False),
        lambda: view.confirming(session, node),
    ):
        with console.capture() as captured:
            if isinstance(view, LiveView):
                console.print(view._render())
            step()
        shown.append(captured.get())
    with console.capture() as captured:
        if isinstance(view, LiveView):
            console.print(view._render())
    shown.append(captured.get())
    assert all(SAID in each for each in shown if each)
    assert f"mutants survive: {SAID}" in shown[0]
    if kind is PlainView:
        assert f"no candidate, contract: {SAID}" in shown[1]
