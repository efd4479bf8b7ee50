"""Bandits: policies that score every action by the rewards it brought, and take the best legal one.

They start each search afresh, from the statistics of earlier searches if they were trained (``prior``, worth
``PRIOR_WEIGHT`` tries an action): with 25 actions and 20 to 100 evaluations, a bandit that starts cold hardly
learns.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.base import Observation, Policy, forced, transformations
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS

PRIOR_WEIGHT = 2.0
Scores = NDArray[np.float64]


class ScoringPolicy(Policy):
    """Takes the legal action with the highest score; ties are broken at random (deterministic: the first)."""

    @abstractmethod
    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        """The appeal of every action, shape (25,); +inf for one that should be tried first."""

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        legal = transformations(mask)
        scores = self.scores(observation, mask, deterministic)[legal]
        top = legal[scores == scores.max()]
        return int(top[0] if deterministic else self.rng.choice(top))


class Bandit(ScoringPolicy):
    """Counts, means and variances of rewards per action: within a search, and over earlier ones.

    ``counts``, ``means`` and ``squares`` (sums of squared deviations) have shape (25,); ``prior`` holds the
    same three rows for all training searches. Rewards: clipped log-gain over the parent.
    """

    learned: ClassVar[tuple[str, ...]] = ("counts", "means", "squares", "prior")

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.prior = np.zeros((3, len(ACTIONS)))
        self._reset()

    def _reset(self) -> None:
        counts, means, squares = self.prior
        self.counts = np.minimum(counts, PRIOR_WEIGHT)
        self.means = means.copy()
        self.squares = squares * self.counts / np.maximum(counts, 1.0)

    def begin(self) -> None:
        self._reset()

    def update(self, transition: Transition) -> None:
        if forced(transition):
            return
        value = self.value(transition)
        self.observe(transition.action, value)
        if self.training:
            counts, means, squares = self.prior  # rows: views, updated in place
            _add(counts, means, squares, transition.action, value)

    def evidence(self) -> tuple[Scores, Scores]:
        """Tries and mean rewards of every action, shape (25,). What is pending counts as a try that brought nothing: the
        virtual loss of parallel tree search (Chaslot et al., 2008)."""
        if not self.pending.any():
            return self.counts, self.means
        tries: Scores = np.add(self.counts, self.pending, dtype=np.float64)
        return tries, self.means * self.counts / np.maximum(tries, 1.0)

    def value(self, transition: Transition) -> float:
        """What a step was worth; subclasses may rescale it."""
        return transition.reward

    def observe(self, action: int, value: float) -> None:
        """Add one reward to the running statistics of this search."""
        _add(self.counts, self.means, self.squares, action, value)


def _add(counts: Scores, means: Scores, squares: Scores, action: int, value: float) -> None:
    """Welford's update, in place."""
    counts[action] += 1
    delta = value - means[action]
    means[action] += delta / counts[action]
    squares[action] += delta * (value - means[action])
