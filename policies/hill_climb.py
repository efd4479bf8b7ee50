"""First-improvement hill climbing from the best kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.search.run import Transition


class HillClimb(Policy):
    """Tries the neighbours of the best kernel in random order; an improvement makes all of them new again."""

    name = "hill_climb"
    learned = ("tried",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.tried: list[int] = []

    def begin(self) -> None:
        self.tried = []

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        legal = transformations(mask)
        fresh = legal[~np.isin(legal, self.tried)]
        if not len(fresh):
            self.tried = []
            fresh = legal
        action = int(fresh[0] if deterministic else self.rng.choice(fresh))
        self.tried.append(action)
        return action

    def update(self, transition: Transition) -> None:
        if transition.reward > 0:
            self.tried = []
