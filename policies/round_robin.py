"""Round-robin: every legal action in turn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.strategies import ACTIONS


class RoundRobin(Policy):
    """Takes the next legal action after the last one, in the order of ``ACTIONS``."""

    name = "round_robin"
    learned = ("last",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.last = -1

    def begin(self) -> None:
        self.last = -1

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        self.last = min(transformations(mask).tolist(), key=lambda a: (a - self.last - 1) % len(ACTIONS))
        return self.last
