"""Wrappers: the flat observation, and illegal actions replaced for agents that know no masks."""

from __future__ import annotations

from typing import Any, SupportsInt

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ke_gym.envs import spaces
from ke_gym.search.observation import Observation

Values = NDArray[np.float32]


def action_masks(env: Any) -> NDArray[np.bool_]:
    """The legal actions of an environment, wrapped or not (shape (A,)), or of a vector of N (shape (N, A))."""
    if hasattr(env, "env_method"):
        return np.stack(env.env_method("action_masks"))
    mask: NDArray[np.bool_] = env.get_wrapper_attr("action_masks")()
    return mask


class FlatObservation(
    gymnasium.ObservationWrapper[Values, Any, Observation], gymnasium.utils.RecordConstructorArgs
):
    """The observation as one box of 132 values in the order of ``LAYOUT``, for ``MlpPolicy`` and linear bandits."""

    def __init__(self, env: gymnasium.Env[Observation, Any]) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.observation_space = spaces.flat_space()

    def observation(self, observation: Observation) -> Values:
        return spaces.flatten(observation)


class LegalAction(
    gymnasium.Wrapper[Observation, Any, Observation, Any], gymnasium.utils.RecordConstructorArgs
):
    """An illegal action becomes a random legal one other than STOP: for agents that know no masks (DQN, PPO).

    ``info["action"]`` is the one that was taken.
    """

    def __init__(self, env: gymnasium.Env[Observation, Any]) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def step(self, action: SupportsInt) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        mask, chosen = action_masks(self.env), int(action)
        if not mask[chosen]:
            legal = np.flatnonzero(mask[:-1])
            chosen = int(self.np_random.choice(legal)) if len(legal) else len(mask) - 1
        observation, reward, terminated, truncated, info = self.env.step(chosen)
        return observation, reward, terminated, truncated, {**info, "action": chosen}
