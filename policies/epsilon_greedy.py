"""Epsilon-greedy tree search: the default policy of the main job.

Which node to extend is the parent rule's part (``parents.epsilon_greedy``: the best node mostly, dead branches
left alone; STARK, arXiv 2510.16996). This class chooses the strategy: first ``parents.ROOT_CAP`` drafts and no
more, then mostly the strategy with the highest optimistic gain so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.search.parents import ROOT_CAP
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS, FIX, RESTART

EPSILON = 0.25
OPTIMISM = 0.10  # expected gain of a strategy not tried yet, in log-speedup


class EpsilonGreedy(Policy):
    """Drafts, then the strategy with the best decayed mean gain; with probability epsilon a random one.

    ``gains`` and ``tries`` are kept per action over a search: a gain seen once fades, because a strategy that
    has been used up on one kernel rarely pays again.
    """

    name = "epsilon_greedy"
    parent_rule = "epsilon_greedy"
    learned = ("drafts", "gains", "tries")

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.begin()

    def begin(self) -> None:
        self.drafts = 0
        self.gains = [OPTIMISM] * len(ACTIONS)
        self.tries = [0] * len(ACTIONS)

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        if mask[RESTART.id] and self.drafts < ROOT_CAP:
            self.drafts += 1
            return RESTART.id
        legal = transformations(mask)
        if len(legal) > 1:
            legal = legal[legal != RESTART.id]
        if not deterministic and self.rng.random() < EPSILON:
            return int(self.rng.choice(legal))
        if mask[FIX.id] and self.tries[FIX.id] + self.pending[FIX.id] < 2:
            return FIX.id
        appeal = np.array([self.gains[action] for action in legal])
        if not deterministic:
            appeal += self.rng.uniform(0, 1e-3, len(legal))
        return int(legal[np.argmax(appeal)])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not len(self.gains) == len(self.tries) == len(ACTIONS):
            raise ValueError("there is not one gain and one number of tries for each action")

    def update(self, transition: Transition) -> None:
        action = transition.action
        self.tries[action] += 1
        weight = max(1.0 / (self.tries[action] + 1), 0.3)
        self.gains[action] += weight * (transition.reward - self.gains[action])
