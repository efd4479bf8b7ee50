"""UCT with max backup: trees over kernels, the strategy at a leaf chosen by its best gain anywhere."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Bandit, Scores
from ke_gym.policies.base import Observation

URGENCY = 0.1  # best gain assumed of an action never tried


class UCT(Bandit):
    """Descends to a node by the parent rule ``uct`` and expands it by the most promising strategy.

    The rule does selection and backup (``ke_gym.search.parents.uct``): the value of a node is the best kernel
    below it, since only the best one is kept. Expansion shares statistics between nodes (all moves as first,
    Gelly and Silver, 2011), because a node is expanded far less often than there are strategies. Source:
    Reasoning Compiler (arXiv 2506.01374); max backup as in TTT-Discover.
    """

    name = "uct"
    parent_rule = "uct"
    learned: ClassVar[tuple[str, ...]] = (*Bandit.learned, "best", "c")

    def __init__(self, seed: int = 0, c: float = 0.2) -> None:
        super().__init__(seed)
        self.c = c

    def _reset(self) -> None:
        super()._reset()
        self.best = np.where(self.counts > 0, self.means, URGENCY)

    def observe(self, action: int, value: float) -> None:
        self.best[action] = max(self.best[action], value) if self.counts[action] else value
        super().observe(action, value)

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        # Half the best gain, half the mean one: a single lucky draw should not win for ever.
        value: Scores = np.where(self.counts > 0, (self.best + self.means) / 2, URGENCY)
        # What is pending counts as tries that brought nothing.
        tries = self.counts + self.pending
        value = value * np.maximum(self.counts, 1.0) / np.maximum(tries, 1.0)
        if deterministic:
            return value
        prior, total = self.prior_of(observation, mask), float(tries.sum())
        bonus: Scores = self.c * prior * np.sqrt(1.0 + total) / (1.0 + tries)
        return value + bonus

    def prior_of(self, observation: Observation, mask: NDArray[np.bool_]) -> Scores:
        """How promising every action looks before it is tried, as probabilities; here all legal ones alike."""
        return np.asarray(mask / mask.sum(), dtype=np.float64)
