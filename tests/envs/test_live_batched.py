from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ke_gym.envs import LIVE, make_vec_env
from ke_gym.envs.batched_live import BatchedLiveVecEnv
from ke_gym.envs.kernel_opt import KernelOptEnv
from ke_gym.envs.wrappers import action_masks
from ke_gym.errors import UserError
from ke_gym.search.observation import LAYOUT
from ke_gym.strategies import RESTART, STOP
from tests.envs.live import FAKE, FakeEvaluator, LosingEvaluator


@pytest.fixture
def envs() -> Iterator[BatchedLiveVecEnv]:
    made = BatchedLiveVecEnv(4, ["softmax", "rms_norm"], horizon=6, workers=3, **FAKE)
    made.seed(3)
    yield made
    made.close()


def test_episodes_step_together_and_begin_anew(envs: BatchedLiveVecEnv) -> None:
    observations = envs.reset()
    assert {name: values.shape for name, values in observations.items()} == {
        name: (4, size) for name, size in LAYOUT.items()
    }
    rng = np.random.default_rng(0)
    FakeEvaluator.mixed = False
    for step in range(1, 13):
        masks = action_masks(envs)
        actions = np.array([rng.choice(np.flatnonzero(mask[:-1])) for mask in masks])
        observations, rewards, dones, infos = envs.step(actions)
        assert rewards.dtype == np.float32 and dones.tolist() == [step % 6 == 0] * 4
        for i, info in enumerate(infos):
            assert info["TimeLimit.truncated"] == bool(dones[i])
            if dones[i]:
                assert info["terminal_observation"]["history"][0] == 0
                assert observations["history"][i, 0] == 1
    assert {episode.case.task.name for episode in envs.episodes} <= {"softmax", "rms_norm"}
    assert not FakeEvaluator.mixed, "two tasks were timed at once"


def test_stop_terminates_one_episode_alone(envs: BatchedLiveVecEnv) -> None:
    envs.reset()
    actions = np.array([STOP.id, RESTART.id, RESTART.id, RESTART.id])
    observations, _, dones, infos = envs.step(actions)
    assert dones.tolist() == [True, False, False, False]
    assert infos[0]["TimeLimit.truncated"] is False and "terminal_observation" in infos[0]
    assert observations["history"][0, 0] == 1


def test_each_episode_is_what_the_single_environment_makes_of_it() -> None:
    single = KernelOptEnv("softmax", horizon=5, **FAKE)
    batch = BatchedLiveVecEnv(2, "softmax", horizon=5, **FAKE)
    batch.seed(7)
    batch.reset()
    single.reset(seed=8)  # the second episode's seed
    for _ in range(4):
        action = int(np.flatnonzero(single.action_masks())[0])
        observation, value, *_ = single.step(action)
        observations, rewards, *_ = batch.step(np.array([RESTART.id, action]))
        assert rewards[1] == np.float32(value)
        for name in LAYOUT:
            np.testing.assert_array_equal(observations[name][1], observation[name])
    single.close()
    batch.close()


def test_a_lost_evaluation_costs_one_step_of_one_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LosingEvaluator, "losses", 1)
    arguments: dict[str, Any] = {**FAKE, "open_evaluator": LosingEvaluator}
    envs = BatchedLiveVecEnv(3, "softmax", horizon=8, workers=1, **arguments)
    envs.seed(0)
    envs.reset()
    outcomes = []
    for _ in range(8):
        actions = np.array([np.flatnonzero(mask)[0] for mask in action_masks(envs)])
        _, _, _, infos = envs.step(actions)
        outcomes += [info["outcome"] for info in infos]
    assert outcomes.count("lost") == 1
    envs.close()


def test_maskable_ppo_learns_over_one_pool() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    envs = make_vec_env(LIVE, 2, seed=0, tasks="softmax", horizon=6, **FAKE)
    model = contrib.MaskablePPO(
        "MultiInputPolicy", envs, n_steps=12, batch_size=12, n_epochs=1, device="cpu", seed=0
    )
    model.learn(24)
    assert model.num_timesteps == 24 and len(model.ep_info_buffer) >= 2
    assert not any(np.isnan(info["r"]) for info in model.ep_info_buffer)
    envs.close()


def test_all_episodes_are_pictured_side_by_side() -> None:
    envs = BatchedLiveVecEnv(4, "softmax", render_mode="rgb_array", **FAKE)
    envs.reset()
    envs.step(np.array([RESTART.id] * 4))
    picture = envs.render()
    assert picture is not None and picture.shape == (960, 1280, 3)
    envs.close()
    with pytest.raises(UserError, match="rgb_array"):
        BatchedLiveVecEnv(1, render_mode="ansi", **FAKE)


def test_an_unknown_environment_names_the_nearest() -> None:
    with pytest.raises(UserError, match="KernelOpt-v0"):
        make_vec_env("ke_gym/KernelOp-v0", 2)
