from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from ke_gym.evaluation.acceptance import DRAWINGS
from ke_gym.evaluation.checking import Rejected, check_case, check_touched

CASE = (3, "ties", 5)
RIGHT = {"ok": True, "max_abs": 0.0, "rel_l2": 0.0, "ratio": 0.0}


class Watched:
    """A judge and an arm that do nothing but note which inputs a preparation could have seen."""

    def __init__(self, prepares: bool) -> None:
        self.prepares = prepares
        self.lies: Any = None
        self.seen: list[Any] = []
        self.called: list[Any] = []

    def load(self, shape_set: str, *case: Any) -> float:
        self.lies = case
        return 1.0

    def draw(self, shape_set: str, seed: int) -> None:
        self.lies = seed

    def touch(self, shape_set: str, seed: int) -> None:
        self.lies = (*self.lies, "touched")

    def check(self, shape_set: str, number: int) -> dict[str, Any]:
        return RIGHT

    def prepare(self, patience: float) -> float:
        self.seen.append(self.lies)
        return 0.0

    def call(self, patience: float) -> float:
        self.called.append(self.lies)
        return 0.0

    def check_mode(self, poison: int) -> None: ...

    def damage(self) -> str:
        return ""


@pytest.mark.parametrize("prepares", [True, False])
def test_a_preparation_finds_no_inputs_of_the_call_that_is_checked(prepares: bool) -> None:
    judge: Any = Watched(prepares)
    entry: Any = SimpleNamespace(arm=judge, number=1)
    check_case(judge, entry, "default", CASE, poison=0, patience=1.0, hidden=False)
    check_touched(judge, entry, "default", CASE, 7, patience=1.0)
    assert judge.called == [CASE, CASE, (*CASE, "touched")]
    assert CASE not in judge.seen and len([s for s in judge.seen if s == CASE[0] + 1]) == 2 * prepares


class Doubtful(Watched):
    """Says that every check is a close call, and what more contents say."""

    def __init__(self, right: bool) -> None:
        super().__init__(prepares=False)
        self.right = right
        self.asked: list[Any] = []

    def check(self, shape_set: str, number: int) -> dict[str, Any]:
        return {**RIGHT, "ok": False, "close": True, "reason": "too far off", "pattern": ""}

    def check_again(self, shape_set: str, number: int) -> dict[str, Any]:
        self.asked.append(self.lies)
        return {**RIGHT, "ok": self.right, "reason": "too far off in all", "pattern": ""}


@pytest.mark.parametrize("right", [True, False])
def test_a_close_call_is_decided_by_more_contents(right: bool) -> None:
    judge: Any = Doubtful(right)
    entry: Any = SimpleNamespace(arm=judge, number=1)
    with nullcontext() if right else pytest.raises(Rejected, match="too far off in all"):
        check_case(judge, entry, "default", CASE, poison=0, patience=1.0, hidden=False)
    others = [(CASE[0] + k, *CASE[1:]) for k in range(1, DRAWINGS)]
    assert judge.called == [CASE, *others] and judge.asked == others
    judge.asked.clear()
    with nullcontext() if right else pytest.raises(Rejected, match="one element"):
        check_touched(judge, entry, "default", CASE, 7, patience=1.0)
    assert judge.asked == [(*CASE, "touched")] * (DRAWINGS - 1)
