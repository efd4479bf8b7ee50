"""PPO-guided search: a trained network's probabilities as the prior of PUCT.

The winner of CompilerGym's leaderboard was a PPO policy used as a sampling prior; pure RL lost to greedy
search there. What the network learned across tasks meets what this search has seen of this task.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Scores
from ke_gym.policies.base import Observation
from ke_gym.policies.maskable_ppo import MaskablePPO
from ke_gym.policies.puct import softmax
from ke_gym.policies.uct import UCT


class PPOGuided(UCT):
    """PUCT with the network's prior: ``value + c P(a) sqrt(1 + N) / (1 + n)``.

    ``temperature`` flattens the prior (above 1) or sharpens it. ``weights`` takes the network of a
    ``maskable_ppo`` or ``ppo`` file.
    """

    name = "ppo_guided"
    pretrained = "maskable_ppo"
    learned: ClassVar[tuple[str, ...]] = (*UCT.learned, "temperature")
    positive = ("temperature",)

    def __init__(
        self,
        seed: int = 0,
        weights: str = "",
        c: float = 0.5,
        temperature: float = 1.0,
        soft_mask: float = 0.0,
    ) -> None:
        super().__init__(seed, c)
        self.temperature = temperature
        self.network = MaskablePPO(seed, weights, soft_mask)
        self.trained_on = self.network.trained_on

    def prior_of(self, observation: Observation, mask: NDArray[np.bool_]) -> Scores:
        logits = self.network.outputs(observation) / self.temperature
        return softmax(np.where(mask, logits, -np.inf))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.network.load_state_dict(state["network"])
