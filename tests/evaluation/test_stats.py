from __future__ import annotations

import math
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ke_gym.evaluation.stats import (
    ALPHA,
    SignTest,
    confidence_sequence,
    log_e_value,
    mean_interval,
    sign_p_interval,
)


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_e_value_is_a_fair_bet(wins: int, losses: int) -> None:
    """A martingale: its expectation after one more fair flip is its present value."""
    now = math.exp(log_e_value(wins, losses))
    later = (math.exp(log_e_value(wins + 1, losses)) + math.exp(log_e_value(wins, losses + 1))) / 2
    assert math.isclose(now, later, rel_tol=1e-9)


def test_equals_are_rarely_told_apart_however_often_one_looks() -> None:
    rng = random.Random(1)
    decided = 0
    for _ in range(500):
        test = SignTest()
        for _ in range(60):
            test.add(rng.gauss(0, 0.03))
        decided += test.decided
    assert decided <= 500 * ALPHA


def test_a_clear_difference_is_found_within_a_dozen_rounds() -> None:
    rng = random.Random(2)
    for _ in range(100):
        test = SignTest()
        while not test.decided:
            test.add(rng.gauss(0.1, 0.02))
        assert len(test.values) <= 12
        assert test.median > 0


def test_the_confidence_sequence_covers_the_median_at_every_look() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(300):
        values: list[float] = []
        wrong = False
        for value in rng.normal(0.05, 0.1, 50):
            values.append(float(value))
            low, high = confidence_sequence(values)
            wrong |= not low <= 0.05 <= high
        missed += wrong
    assert missed <= 300 * ALPHA


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=80))
def test_intervals_hold_the_sample_median(values: list[float]) -> None:
    for low, high in (confidence_sequence(values), sign_p_interval(values)):
        assert low <= float(np.median(values)) + 1e-12
        assert high >= float(np.median(values)) - 1e-12


def test_the_mean_interval_is_students() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert math.isclose((low + high) / 2, 3.0)
    assert math.isclose(high - 3.0, 2.776 * math.sqrt(2.5) / math.sqrt(5), rel_tol=1e-3)
    assert mean_interval([1.0]) == (-math.inf, math.inf)
