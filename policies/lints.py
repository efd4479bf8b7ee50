"""LinTS: linear Thompson sampling (Agrawal and Goyal, arXiv 1209.3352)."""

from __future__ import annotations

from ke_gym.policies.bandit import Scores
from ke_gym.policies.linear import LinearBandit


class LinTS(LinearBandit):
    """Draws every action's predicted gain from its posterior.

    Coefficients of different actions are independent, so drawing the prediction itself, N(m'x, alpha^2 x'Vx),
    is the same as drawing the coefficients N(m, alpha^2 V), without 25 Cholesky factors a step.
    """

    name = "lints"

    def explore(self, means: Scores, deviations: Scores) -> Scores:
        return self.rng.normal(means, self.alpha * deviations)
