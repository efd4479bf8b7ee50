"""UCB1: the mean reward plus a bonus for actions seldom tried (Auer et al., 2002)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Bandit, Scores
from ke_gym.policies.base import Observation
from ke_gym.policies.features import irrelevance

URGENCY = 0.1  # assumed gain of an action never tried (Gelly and Wang, 2006): not all 25 fit into a budget


class UCB1(Bandit):
    """``mean + c sqrt(2 ln N / n)``; an action never tried counts as tried once, with gain ``URGENCY``.

    ``soft_mask`` lowers actions that don't relieve what limits the parent, in units of the reward, fading
    until half of the budget is spent.
    """

    name = "ucb1"
    learned: ClassVar[tuple[str, ...]] = (*Bandit.learned, "c", "soft_mask")

    def __init__(self, seed: int = 0, c: float = 0.1, soft_mask: float = 0.0) -> None:
        super().__init__(seed)
        self.c, self.soft_mask = c, soft_mask

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        tries, gains = self.evidence()
        tried = tries > 0
        counts = np.where(tried, tries, 1.0)
        means = np.where(tried, gains, URGENCY)
        total = max(float(tries.sum()), 1.0)
        scores: Scores = means + self.c * np.sqrt(2.0 * np.log(total) / counts)
        if self.soft_mask:
            scores = scores - self.soft_mask * irrelevance(observation)
        return scores
