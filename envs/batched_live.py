"""N live episodes in one process: they step together, and their evaluations share one pool.

A subprocess per environment would only get in the way: what takes time runs in processes of its own already,
and races must not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from ke_gym.envs import render, spaces
from ke_gym.envs.batched import BatchedVecEnv
from ke_gym.envs.episode import Episode, Rules, Step
from ke_gym.envs.kernel_opt import KernelOptEnv, TaskSpec, resolve, sample
from ke_gym.envs.pool import EvaluationPool, LostEvaluation, OpenEvaluator
from ke_gym.errors import UserError
from ke_gym.proposers.base import Proposer
from ke_gym.search import parents
from ke_gym.search.reward import Kind
from ke_gym.search.session import Ask
from ke_gym.tasks import Task


class BatchedLiveVecEnv(BatchedVecEnv):
    """``KernelOptEnv`` N times as one of stable-baselines3's vector environments.

    Arguments are those of ``KernelOptEnv``, and ``workers``: evaluations in flight at once. Episodes begin anew
    by themselves; the last observation is then in ``info["terminal_observation"]``, and
    ``info["TimeLimit.truncated"]`` says whether the horizon ended it.
    """

    def __init__(
        self,
        n_envs: int,
        tasks: TaskSpec | Sequence[TaskSpec] = "softmax",
        *,
        proposer: str | Callable[[Task], Proposer] = "rewriter",
        target: str = "cpu",
        baseline: str = "eager",
        threads: int | None = None,
        horizon: int = 20,
        reward: Kind = "best",
        parent_rule: str = "best",
        extended: bool = False,
        edits: bool = False,
        store: str | Path | None = None,
        workers: int = 2,
        open_evaluator: OpenEvaluator | None = None,
        render_mode: str | None = None,
        language: str = "",
    ) -> None:
        parents.get(parent_rule)
        if render_mode not in (None, "rgb_array"):
            raise UserError(f"render mode {render_mode!r} is unknown here; choose rgb_array")
        self.render_mode = render_mode
        self.metadata = KernelOptEnv.metadata
        self.tasks = resolve(tasks)
        self.rules = Rules(horizon, reward, parent_rule, extended, edits)
        super().__init__(n_envs, spaces.observation_space(), spaces.action_space(extended, edits))
        self.pool = EvaluationPool(
            target, baseline, threads, proposer, store, workers, min(n_envs, len(self.tasks)), open_evaluator,
            language,
        )  # fmt: skip
        self.episodes: list[Episode] = []
        self._rngs = [np.random.default_rng() for _ in range(n_envs)]
        self._actions: NDArray[np.int64] = np.zeros(n_envs, dtype=np.int64)

    def reset(self) -> VecEnvObs:
        """Begin all episodes, with the seeds and options set by ``seed`` and ``set_options``."""
        for i, seed in enumerate(self._seeds):
            if seed is not None:
                self._rngs[i] = np.random.default_rng(seed)
        self.episodes = [self._begin(i, self._options[i]) for i in range(self.num_envs)]
        self.reset_infos = [episode.info() for episode in self.episodes]
        self._reset_seeds()
        self._reset_options()
        return _stack([episode.observation() for episode in self.episodes])

    def _begin(self, i: int, options: dict[str, Any] | None = None) -> Episode:
        rng = self._rngs[i]
        task = sample(self.tasks, options, rng)
        return Episode(self.pool.case(task), self.rules, self.pool.store, int(rng.integers(2**31)))

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all episodes; their evaluations run side by side."""
        begun = [episode.begin(int(action)) for episode, action in zip(self.episodes, self._actions)]
        asks = [(i, asked) for i, asked in enumerate(begun) if isinstance(asked, Ask)]
        # By task: evaluations of different tasks wait for each other.
        asks.sort(key=lambda pair: self.episodes[pair[0]].case.task.id)
        futures = {i: self.pool.submit(self.episodes[i].case, asked) for i, asked in asks}
        steps: list[Step] = []
        for i, asked in enumerate(begun):
            if not isinstance(asked, Ask):
                steps.append(asked)
                continue
            try:
                steps.append(self.episodes[i].finish(futures[i].result()))
            except LostEvaluation as error:
                steps.append(self.episodes[i].lost(str(error)))
        observations, rewards, dones, infos = [], [], [], []
        for i, (observation, reward, terminated, truncated, info) in enumerate(steps):
            info["TimeLimit.truncated"] = truncated and not terminated
            if terminated or truncated:
                info["terminal_observation"] = observation
                self.episodes[i] = self._begin(i)
                self.reset_infos[i] = self.episodes[i].info()
                observation = self.episodes[i].observation()
            observations.append(observation)
            rewards.append(reward)
            dones.append(terminated or truncated)
            infos.append(info)
        return _stack(observations), np.array(rewards, np.float32), np.array(dones, np.bool_), infos

    def action_masks(self) -> NDArray[np.bool_]:
        """The legal actions of all episodes: bool, shape (n_envs, number of actions)."""
        return np.stack([episode.mask() for episode in self.episodes])

    def close(self) -> None:
        self.pool.close()

    def get_images(self) -> Sequence[NDArray[np.uint8]]:
        return [render.rgb_array(e.session.tree, e.case.task.name, self.rules.horizon) for e in self.episodes]


def _stack(observations: list[dict[str, NDArray[np.float32]]]) -> VecEnvObs:
    return {name: np.stack([seen[name] for seen in observations]) for name in spaces.LAYOUT}
