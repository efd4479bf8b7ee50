from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_gym.errors import UserError
from ke_gym.search.budget import Budget, Spent


@pytest.mark.parametrize("bad", [{"evaluations": 0}, {"seconds": 0.0}, {"dollars": -1.0}])
def test_a_budget_that_buys_nothing_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="buys nothing"):
        Budget(**bad)  # type: ignore[arg-type]


def test_a_budget_without_any_limit_is_refused() -> None:
    with pytest.raises(UserError, match="needs a budget"):
        Budget(evaluations=None)


def test_limits_that_are_left_out_are_those_of_before() -> None:
    assert Budget.asked(None, None, None) == Budget(60)
    assert Budget.asked(None, 5.0, None) == Budget(60, 5.0)
    before = Budget(100, None, 2.0)
    assert Budget.asked(None, None, None, before) == before
    assert Budget.asked(200, 9.0, None, before) == Budget(200, 9.0, 2.0)
    with pytest.raises(UserError, match="buys nothing"):
        Budget.asked(0, None, None, before)


def test_the_first_reached_limit_is_named() -> None:
    budget = Budget(evaluations=10, seconds=5.0, dollars=1.0)
    assert budget.exhausted(Spent(9, 4.9, 0.9)) is None
    assert budget.exhausted(Spent(10, 0.0, 0.0)) == "evaluations"
    assert budget.exhausted(Spent(0, 5.0, 0.0)) == "seconds"
    assert budget.exhausted(Spent(0, 0.0, 2.0)) == "dollars"


@given(st.integers(0, 200), st.floats(0, 100))
def test_what_is_left_is_a_share_and_zero_exactly_when_exhausted(evaluations: int, seconds: float) -> None:
    budget, spent = Budget(evaluations=60, seconds=30.0), Spent(evaluations, seconds)
    left = budget.left(spent)
    assert 0.0 <= left <= 1.0
    assert (left == 0.0) == (budget.exhausted(spent) is not None)
