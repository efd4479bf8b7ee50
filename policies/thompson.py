"""Thompson sampling with Gaussian rewards, and with success or failure (Chapelle and Li, 2011)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Bandit, Scores
from ke_gym.policies.base import Observation
from ke_gym.policies.features import irrelevance
from ke_gym.search.run import Transition

PRIOR_MEAN, PRIOR_TRIES, PRIOR_SD = 0.05, 1.0, 0.15  # log-gain of an action never tried
SUCCESS = 0.01  # log-gain


class Thompson(Bandit):
    """Draws every action's mean from its Gaussian posterior, under one pooled reward variance."""

    name = "thompson"
    learned: ClassVar[tuple[str, ...]] = (*Bandit.learned, "soft_mask")

    def __init__(self, seed: int = 0, soft_mask: float = 0.0) -> None:
        super().__init__(seed)
        self.soft_mask = soft_mask

    def posterior(self) -> tuple[Scores, Scores]:
        """Means and standard deviations of every action's expected reward."""
        counts, gains = self.evidence()
        tries = PRIOR_TRIES + counts
        means = (PRIOR_TRIES * PRIOR_MEAN + counts * gains) / tries
        variance = (PRIOR_SD**2 + self.squares.sum()) / (1.0 + self.counts.sum())
        return means, np.sqrt(variance / tries)

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        means, deviations = self.posterior()
        drawn = means if deterministic else self.rng.normal(means, deviations)
        return drawn - self.soft_mask * irrelevance(observation) if self.soft_mask else drawn


class BetaThompson(Bandit):
    """Draws every action's chance of a gain above ``SUCCESS`` from its Beta posterior."""

    name = "beta_thompson"

    def value(self, transition: Transition) -> float:
        return float(transition.reward > SUCCESS)

    def posterior(self) -> tuple[Scores, Scores]:
        """The two parameters of every action's Beta distribution."""
        tries, rates = self.evidence()
        successes = tries * rates
        return 1.0 + successes, 1.0 + tries - successes

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        a, b = self.posterior()
        return a / (a + b) if deterministic else self.rng.beta(a, b)
