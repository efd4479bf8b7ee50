"""DQN (Mnih et al., 2015), trained by stable-baselines3: a baseline, weak in CompilerGym's comparison."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Scores
from ke_gym.policies.network import NetworkPolicy

EPSILON = 0.05


class DQN(NetworkPolicy):
    """The legal action with the largest Q-value; with probability ``EPSILON`` a random one."""

    name = "dqn"
    pretrained = "dqn"
    kindred = ("dqn",)
    activation = "relu"

    def pick(self, outputs: Scores, legal: NDArray[np.int64], deterministic: bool) -> int:
        if not deterministic and self.rng.random() < EPSILON:
            return int(self.rng.choice(legal))
        return int(legal[np.argmax(outputs[legal])])
