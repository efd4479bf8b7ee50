"""Contextual linear bandits: one ridge regression per action over the observation (Li et al., 2010).

Disjoint models, as in LinUCB's first algorithm. Every update is a rank-one update of the inverse Gram matrix
(Sherman and Morrison), so a step costs O(d^2) for each legal action, d = 133: the observation and a constant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Scores, ScoringPolicy
from ke_gym.policies.base import Observation, forced
from ke_gym.policies.features import SIZE, irrelevance, vector
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS

DIMENSION = SIZE + 1
_UPPER = np.triu_indices(DIMENSION)


class LinearBandit(ScoringPolicy):
    """Predicted gain of every action, and how uncertain it is.

    ``inverse`` is the inverse of ``ridge I + sum x x'`` per action, shape (25, d, d); ``moments`` is
    ``sum x r``, shape (25, d). What one search teaches stays for the next.
    """

    learned = ("moments", "alpha", "soft_mask")
    positive = ("ridge",)
    unsigned = ("alpha",)

    def __init__(self, seed: int = 0, alpha: float = 0.1, ridge: float = 1.0, soft_mask: float = 0.0) -> None:
        super().__init__(seed)
        self.alpha, self.soft_mask = alpha, soft_mask
        self.inverse = np.tile(np.eye(DIMENSION) / ridge, (len(ACTIONS), 1, 1))
        self.moments = np.zeros((len(ACTIONS), DIMENSION))

    def estimate(self, observation: Observation, actions: NDArray[np.int64]) -> tuple[Scores, Scores]:
        """Predicted rewards of ``actions`` and their standard deviations (for unit noise)."""
        x = np.append(vector(observation), 1.0)
        projected = self.inverse[actions] @ x
        means = np.einsum("ad,ad->a", projected, self.moments[actions])
        variances = np.maximum(projected @ x, 0.0)
        # What is pending counts as steps here that brought nothing.
        shrunk = 1.0 / (1.0 + self.pending[actions] * variances)
        return means * shrunk, np.sqrt(variances * shrunk)

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        legal = np.flatnonzero(mask)
        means, deviations = self.estimate(observation, legal)
        scores = np.full(len(ACTIONS), -np.inf)
        scores[legal] = means if deterministic else self.explore(means, deviations)
        return scores - self.soft_mask * irrelevance(observation) if self.soft_mask else scores

    def explore(self, means: Scores, deviations: Scores) -> Scores:
        """Scores from predictions and their uncertainty."""
        raise NotImplementedError

    def update(self, transition: Transition) -> None:
        if forced(transition):
            return
        x = np.append(vector(transition.observation), 1.0)
        inverse = self.inverse[transition.action]
        projected = inverse @ x
        inverse -= np.outer(projected, projected) / (1.0 + x @ projected)
        self.moments[transition.action] += transition.reward * x

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"inverse": self.inverse[:, *_UPPER]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        upper = np.zeros((len(ACTIONS), DIMENSION, DIMENSION))
        upper[:, *_UPPER] = state["inverse"]
        self.inverse = upper + np.triu(upper, 1).transpose(0, 2, 1)
