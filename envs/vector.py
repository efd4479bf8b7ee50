"""Vector environments as learners want them: flat observations, and training on what a policy can choose."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from ke_gym.envs import spaces
from ke_gym.envs.prepared import SLICES
from ke_gym.envs.wrappers import action_masks

IDENTITY = slice(SLICES["task"].start, SLICES["hardware"].stop)
"""Where the flat observation says which task this is, and on which machine."""


class FlatVecObservation(VecEnvWrapper):
    """Observations as one array of shape (n_envs, 132), in the order of ``LAYOUT``.

    An episode's end is never called a truncation: the budget that is left is part of the observation, and nothing
    can be earned once it is spent, so there is no value beyond the end to bootstrap from.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv, observation_space=spaces.flat_space())

    def reset(self) -> NDArray:  # type: ignore[type-arg]
        return spaces.flatten(self.venv.reset())  # type: ignore[arg-type]

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = spaces.flatten(infos[i]["terminal_observation"])
            infos[i]["TimeLimit.truncated"] = False
        return spaces.flatten(observations), rewards, dones, infos  # type: ignore[arg-type]


class TrainingVecEnv(VecEnvWrapper):
    """What networks are trained on: a ``FlatVecObservation`` in which only choices count.

    - The first draft pays nothing: there is no alternative to it, and it gains more than all later steps together.
    - Without ``penalties`` a failure costs its step, as it does in a search, and nothing else.
    - STOP is legal only where nothing else is, as policies here use it: worth 0, it would otherwise be a way out.
    - In a share ``hide`` of the episodes task and machine (``hidden``) are not shown, so that a network cannot know a
      table by heart instead of looking at its kernels and gains.
    """

    def __init__(
        self,
        venv: VecEnv,
        seed: int = 0,
        hide: float = 0.5,
        hidden: slice = IDENTITY,
        penalties: bool = True,
    ) -> None:
        super().__init__(venv)
        self.hide, self.hidden, self.penalties = hide, hidden, penalties
        self._rng = np.random.default_rng(seed)
        self._fresh = np.ones(venv.num_envs, np.bool_)
        self._hidden = np.zeros(venv.num_envs, np.bool_)

    def reset(self) -> NDArray:  # type: ignore[type-arg]
        self._fresh[:] = True
        self._hidden = self._rng.random(self.num_envs) < self.hide
        return self._shown(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones & self._hidden):
            infos[i]["terminal_observation"][self.hidden] = 0.0
        paid = np.where(self._fresh, np.float32(0.0), rewards if self.penalties else np.maximum(rewards, 0.0))
        self._fresh = dones.copy()
        self._hidden[dones] = self._rng.random(int(dones.sum())) < self.hide
        return self._shown(observations), paid, dones, infos

    def _shown(self, observations: Any) -> NDArray:  # type: ignore[type-arg]
        shown = np.array(observations)
        shown[self._hidden, self.hidden] = 0.0
        return shown

    def action_masks(self) -> NDArray[np.bool_]:
        """The legal actions, STOP only where it is alone: bool, shape (n_envs, number of actions)."""
        masks = action_masks(self.venv)
        masks[:, -1] = ~masks[:, :-1].any(axis=1)
        return masks

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        if method_name != "action_masks":
            return self.venv.env_method(method_name, *args, indices=indices, **kwargs)
        masks = self.action_masks()
        return [masks[i] for i in self._get_indices(indices)]


class LegalActionVecEnv(VecEnvWrapper):
    """``LegalAction`` for a vector: an illegal action becomes a random legal one, for PPO and DQN, which know no masks."""

    def __init__(self, venv: VecEnv, seed: int = 0) -> None:
        super().__init__(venv)
        self._rng = np.random.default_rng(seed)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        masks = action_masks(self.venv)
        chosen = np.asarray(actions).reshape(-1).copy()
        illegal = np.flatnonzero(~masks[np.arange(len(masks)), chosen])
        chances = np.where(masks[illegal], self._rng.random((len(illegal), masks.shape[1])), -1.0)
        chosen[illegal] = chances.argmax(axis=1)
        self.venv.step_async(chosen)

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()
