"""PUCT: tree search guided by a prior over strategies (Rosin, 2011; AlphaZero's form)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Scores
from ke_gym.policies.base import Observation
from ke_gym.policies.features import irrelevance
from ke_gym.policies.uct import UCT

TEMPERATURE = 0.1  # of log-gains


class PUCT(UCT):
    """UCT whose exploration follows a prior: gains in earlier searches, and what limits the parent.

    The prior is a softmax over the mean gains of the training searches (all alike without training), with
    strategies that don't relieve the parent's bottleneck ``soft_mask`` logits lower until half of the budget
    is spent.
    """

    name = "puct"
    parent_rule = "uct"
    learned: ClassVar[tuple[str, ...]] = (*UCT.learned, "soft_mask")

    def __init__(self, seed: int = 0, c: float = 0.5, soft_mask: float = 2.0) -> None:
        super().__init__(seed, c)
        self.soft_mask = soft_mask

    def prior_of(self, observation: Observation, mask: NDArray[np.bool_]) -> Scores:
        tries, gains, _ = self.prior
        shrunk = gains * tries / (1.0 + tries)
        logits = shrunk / TEMPERATURE - self.soft_mask * irrelevance(observation)
        return softmax(np.where(mask, logits, -np.inf))


def softmax(logits: Scores) -> Scores:
    """Probabilities proportional to exp(logits); -inf gives 0."""
    weights = np.exp(logits - logits.max())
    result: Scores = weights / weights.sum()
    return result
