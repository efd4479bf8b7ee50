"""The statistics against rliable's estimators, scipy, and scores whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import rliable.metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ke_gym.policies import statistics
from ke_gym.policies.comparison import Comparison
from ke_gym.policies.playing import Episode

scores = hnp.arrays(
    np.float64,
    st.tuples(st.integers(2, 8), st.integers(1, 5)),
    elements=st.floats(-2, 2).map(lambda x: round(x, 1)),
)


@given(scores)
def test_the_interquartile_mean_is_rliables(x: np.ndarray) -> None:
    assert statistics.iqm(x) == pytest.approx(rliable.metrics.aggregate_iqm(x))


@given(st.data())
def test_the_probability_of_improvement_is_rliables(data: st.DataObject) -> None:
    x = data.draw(scores)
    y = data.draw(hnp.arrays(np.float64, (3, x.shape[1]), elements=st.sampled_from([0.0, 0.5, 1.0])))
    assert statistics.probability_of_improvement(x, y) == pytest.approx(
        rliable.metrics.probability_of_improvement(x, y)
    )


def test_performance_profile_is_the_share_above_each_threshold() -> None:
    x = np.array([[0.0, 1.0], [0.5, 2.0]])
    assert statistics.performance_profile(x, np.array([-1.0, 0.0, 0.7, 2.0])).tolist() == [1, 0.75, 0.5, 0]


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng, hits = np.random.default_rng(0), 0
    offsets = np.array([0.0, 1.0, 5.0])  # strata: a plain bootstrap would be far too wide
    for trial in range(100):
        x = rng.normal(size=(20, 3)) + offsets
        interval = statistics.bootstrap(lambda s: float(s.mean()), x, seed=trial, resamples=300)
        hits += interval.low <= 2.0 <= interval.high
        assert interval.high - interval.low < 1.0
    assert 85 <= hits <= 100


def test_the_paired_difference_uses_the_common_random_numbers() -> None:
    rng = np.random.default_rng(1)
    luck = rng.normal(scale=3.0, size=(10, 6))
    better = statistics.paired_difference(luck + 0.2 + rng.normal(scale=0.05, size=(10, 6)), luck)
    assert 0.1 < better.low < better.value < better.high < 0.3
    same = statistics.paired_difference(luck, luck + rng.normal(scale=0.05, size=(10, 6)))
    assert same.low < 0 < same.high


def test_redrawing_clusters_speaks_of_clusters_not_tried() -> None:
    rng = np.random.default_rng(2)
    gains = np.repeat([0.6, 0.1, 0.0, -0.2], 8)  # alike within a cluster, unlike between them
    x, clusters = gains + rng.normal(scale=0.01, size=(5, 32)), [name for name in "abcd" for _ in range(8)]
    tasks = statistics.paired_difference(x, np.zeros_like(x))
    wide = statistics.clustered_difference(x, np.zeros_like(x), clusters)
    assert wide.value == tasks.value == pytest.approx(0.125, abs=0.01)
    assert wide.low < -0.05 < 0.0 < tasks.low < tasks.high < 0.25 < wide.high


def test_normalized_auc_is_zero_for_chance_and_one_for_the_best_from_the_start() -> None:
    chance = np.array([0.0, 0.2, 0.4])
    assert statistics.normalized_auc(chance, chance, best=1.0) == 0.0
    assert statistics.normalized_auc(np.ones(3), chance, best=1.0) == 1.0
    assert statistics.normalized_auc(np.zeros(3), chance, best=1.0) == pytest.approx(-0.25)
    assert math.isnan(statistics.normalized_auc(np.ones(3), np.ones(3), best=1.0))


@pytest.mark.parametrize(("tasks", "runs", "given"), [(5, 2, True), (4, 2, False), (5, 1, False)])
def test_a_verdict_takes_five_tasks_and_two_searches_of_each(tasks: int, runs: int, given: bool) -> None:
    def played(level: float) -> list[list[Episode]]:
        curve = np.full(4, level)
        return [[Episode(f"t{t}", curve, 0.0, 4, 4, 0, 1.0) for t in range(tasks)] for _ in range(runs)]

    found = {"good": played(0.9), "masked_random": played(0.1), "best_of_n": played(0.2)}
    verdict = Comparison(found, {f"t{t}": math.e for t in range(tasks)}).verdict()
    assert verdict.startswith("Beyond" if given else "No verdict: 95 % intervals need at least 5 tasks")


def test_evaluations_to_a_target() -> None:
    curve = np.array([0.0, 0.5, 0.9, 0.9])
    assert statistics.evaluations_to(curve, 0.9) == 3
    assert statistics.evaluations_to(curve, 1.0) is None
    assert statistics.evaluations_to(curve, 0.0) == 1
