"""Kernel optimization as Gymnasium environments. Importing this registers them.

    import gymnasium, ke_gym.envs
    env = gymnasium.make("ke_gym/KernelOpt-v0", tasks="softmax")

Vector environments for stable-baselines3 come from ``make_vec_env``.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.error import Error

from ke_gym.envs.spaces import LAYOUT, SPACES_VERSION, flatten
from ke_gym.errors import UserError

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

__all__ = ["LAYOUT", "LIVE", "REPLAY", "SPACES_VERSION", "flatten", "make", "make_vec_env"]

LIVE = "ke_gym/KernelOpt-v0"
REPLAY = "ke_gym/KernelOptReplay-v0"
_BATCHED = {
    LIVE: "ke_gym.envs.batched_live:BatchedLiveVecEnv",
    REPLAY: "ke_gym.envs.batched_replay:BatchedReplayVecEnv",
}

gymnasium.register(LIVE, entry_point="ke_gym.envs.kernel_opt:KernelOptEnv", nondeterministic=True)
gymnasium.register(REPLAY, entry_point="ke_gym.envs.replay:KernelOptReplayEnv")


def make(env_id: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """``gymnasium.make``; an unknown id is a ``UserError`` that names the nearest."""
    _check(env_id)
    try:
        return gymnasium.make(env_id, **kwargs)
    except Error as error:
        raise UserError(f"{env_id} cannot be made: {error}") from error


def make_vec_env(env_id: str, n_envs: int = 1, *, seed: int | None = None, **kwargs: Any) -> VecEnv:
    """``n_envs`` episodes as one ``VecEnv`` of stable-baselines3, without a process per environment.

    ``kwargs`` are the environment's. The live one's episodes share one evaluation pool; the replayed one's
    step as arrays. Episode statistics are added as by SB3's ``Monitor``. ``UserError`` for an unknown id, or
    without stable-baselines3.
    """
    _check(env_id)
    try:
        from stable_baselines3.common.vec_env import VecMonitor
    except ImportError as error:
        raise UserError("vector environments need stable-baselines3: pip install 'ke-gym[rl]'") from error
    module, name = _BATCHED[env_id].split(":")
    made: VecEnv = getattr(import_module(module), name)(n_envs, **kwargs)
    if seed is not None:
        made.seed(seed)
    return VecMonitor(made)


def _check(env_id: str) -> None:
    if env_id not in _BATCHED:
        near = difflib.get_close_matches(env_id, _BATCHED, n=1, cutoff=0.0)
        raise UserError(f"unknown environment {env_id!r}; did you mean {near[0]!r}?")
