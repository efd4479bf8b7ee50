"""The flat observation for vector environments: what networks over 132 values are trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from ke_gym.envs import spaces


class FlatVecObservation(VecEnvWrapper):
    """Observations as one array of shape (n_envs, 132), in the order of ``LAYOUT``."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv, observation_space=spaces.flat_space())

    def reset(self) -> NDArray:  # type: ignore[type-arg]
        return spaces.flatten(self.venv.reset())  # type: ignore[arg-type]

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = spaces.flatten(infos[i]["terminal_observation"])
        return spaces.flatten(observations), rewards, dones, infos  # type: ignore[arg-type]
