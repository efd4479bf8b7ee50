"""Bandits against MABWiser, which knows no masks but computes the same expectations."""

from __future__ import annotations

import numpy as np
import pytest
from mabwiser.mab import MAB, LearningPolicy

from ke_gym.policies.features import SIZE
from ke_gym.policies.linear import LinearBandit
from ke_gym.policies.lints import LinTS
from ke_gym.policies.linucb import LinUCB
from ke_gym.policies.thompson import BetaThompson
from ke_gym.policies.ucb1 import UCB1
from ke_gym.search.run import Transition

ARMS = list(range(25))
ALL = np.ones(25, dtype=bool)
EMPTY = np.zeros(SIZE, dtype=np.float32)


def history(steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions (every one at least once), rewards, observations."""
    rng = np.random.default_rng(seed)
    actions = np.concatenate([ARMS, rng.integers(25, size=steps - 25)])
    return actions, rng.normal(size=steps), rng.uniform(-1, 1, (steps, SIZE)).astype(np.float32)


def test_ucb1() -> None:
    actions, rewards, _ = history(200)
    oracle = MAB(ARMS, LearningPolicy.UCB1(alpha=0.3))
    oracle.fit(actions, rewards)
    policy = UCB1(c=0.3)
    for action, reward in zip(actions, rewards):
        policy.update(Transition(EMPTY, int(action), float(reward), EMPTY, False, ALL, {}))
    expected = oracle.predict_expectations()
    # MABWiser computes an arm's bound when the arm is fitted, at the total of that moment; one fit is exact.
    assert policy.scores(EMPTY, ALL, False) == pytest.approx([expected[arm] for arm in ARMS])


def test_beta_thompson() -> None:
    actions, rewards, _ = history(200)
    oracle = MAB(ARMS, LearningPolicy.ThompsonSampling(binarizer=lambda arm, reward: reward > 0.01))
    oracle.fit(actions, rewards)
    policy = BetaThompson()
    for action, reward in zip(actions, rewards):
        policy.update(Transition(EMPTY, int(action), float(reward), EMPTY, False, ALL, {}))
    successes, failures = policy.posterior()
    inside = oracle._imp
    assert successes == pytest.approx([inside.arm_to_success_count[arm] for arm in ARMS])
    assert failures == pytest.approx([inside.arm_to_fail_count[arm] for arm in ARMS])
    draws = np.stack([policy.scores(EMPTY, ALL, False) for _ in range(3000)])
    theirs = np.array(
        [[e[arm] for arm in ARMS] for e in (oracle.predict_expectations() for _ in range(3000))]
    )
    assert np.allclose(draws.mean(axis=0), theirs.mean(axis=0), atol=0.02)


def trained(policy: LinearBandit, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    actions, rewards, contexts = history(steps, seed=1)
    for action, reward, x in zip(actions, rewards, contexts):
        policy.update(Transition(x, int(action), float(reward), x, False, ALL, {}))
    return actions, rewards, np.hstack([contexts, np.ones((steps, 1))])


def test_linucb() -> None:
    policy = LinUCB(alpha=0.7)
    actions, rewards, contexts = trained(policy, 400)
    oracle = MAB(ARMS, LearningPolicy.LinUCB(alpha=0.7, l2_lambda=1.0))
    oracle.fit(actions, rewards, contexts)
    for now in np.random.default_rng(2).uniform(-1, 1, (5, SIZE)):
        expected = oracle.predict_expectations(np.append(now, 1.0)[None])
        assert policy.scores(now, ALL, False) == pytest.approx([expected[arm] for arm in ARMS])


def test_lints() -> None:
    policy = LinTS(alpha=0.5)
    actions, rewards, contexts = trained(policy, 400)
    oracle = MAB(ARMS, LearningPolicy.LinTS(alpha=0.5, l2_lambda=1.0))
    oracle.fit(actions, rewards, contexts)
    now = np.random.default_rng(3).uniform(-1, 1, SIZE)
    expected = oracle.predict_expectations(np.tile(np.append(now, 1.0), (2000, 1)))
    theirs = np.array([[e[arm] for arm in ARMS] for e in expected])
    means, deviations = policy.estimate(now, np.arange(25))
    assert np.allclose(means, theirs.mean(axis=0), atol=0.25)
    assert np.allclose(0.5 * deviations, theirs.std(axis=0), rtol=0.1)
    draws = np.stack([policy.scores(now, ALL, False) for _ in range(2000)])
    assert np.allclose(draws.mean(axis=0), means, atol=0.25)
    assert np.allclose(draws.std(axis=0), 0.5 * deviations, rtol=0.1)


def test_rank_one_updates_stay_the_inverse() -> None:
    policy = LinUCB()
    actions, _, contexts = trained(policy, 600)
    for arm in (0, 24):
        rows = contexts[actions == arm]
        gram = np.eye(SIZE + 1) + rows.T @ rows
        assert np.allclose(policy.inverse[arm] @ gram, np.eye(SIZE + 1), atol=1e-8)
