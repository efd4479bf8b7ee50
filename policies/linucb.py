"""LinUCB (Li et al., arXiv 1003.0146)."""

from __future__ import annotations

from ke_gym.policies.bandit import Scores
from ke_gym.policies.linear import LinearBandit


class LinUCB(LinearBandit):
    """The predicted gain plus ``alpha`` standard deviations."""

    name = "linucb"

    def explore(self, means: Scores, deviations: Scores) -> Scores:
        return means + self.alpha * deviations
