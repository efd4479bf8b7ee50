"""The AUC bandit of OpenTuner (Ansel et al., 2014, after Fialho et al., 2010)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Scores, ScoringPolicy
from ke_gym.policies.base import Observation
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS


class AUCBandit(ScoringPolicy):
    """Credit for new bests in a sliding window, recent ones more, plus a bonus for actions seldom used.

    An action's credit is the area under the curve that rises with each of its new bests: with n uses in the
    window, use i (from 1, oldest) that made a new best adds 2i / n(n + 1). Defaults are OpenTuner's.
    """

    name = "auc_bandit"
    learned = ("window", "c", "size")
    positive = ("size",)

    def __init__(self, seed: int = 0, c: float = 0.05, size: int = 500) -> None:
        super().__init__(seed)
        self.c, self.size = c, size
        self.window: list[list[int]] = []

    def begin(self) -> None:
        self.window = []

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        scores = np.full(len(ACTIONS), np.inf)
        window = [
            *self.window,
            *([action, 0] for action in np.repeat(np.arange(len(ACTIONS)), self.pending).tolist()),
        ]
        for action in {used for used, _ in window}:
            hits = [new_best for used, new_best in window if used == action]
            n = len(hits)
            area = sum(i * hit for i, hit in enumerate(hits, 1)) * 2.0 / (n * (n + 1))
            scores[action] = area + self.c * math.sqrt(2.0 * math.log2(len(window)) / n)
        return scores

    def update(self, transition: Transition) -> None:
        new_best = transition.info.get("best_gain", transition.reward) > 0
        self.window = [*self.window, [transition.action, int(new_best)]][-self.size :]
