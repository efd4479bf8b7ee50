from __future__ import annotations

import numpy as np
import pytest

from ke_gym.envs import REPLAY, make_vec_env
from ke_gym.envs.batched_replay import BatchedReplayVecEnv
from ke_gym.envs.replay import KernelOptReplayEnv, Noise
from ke_gym.envs.wrappers import action_masks
from ke_gym.errors import UserError
from ke_gym.search import reward
from ke_gym.strategies import RESTART, STOP, STRATEGIES
from tests.envs.recorded import tables

N = 6


@pytest.mark.parametrize(
    ("kind", "noise", "rule", "extended"),
    [
        *((kind, "sample", "best", False) for kind in reward.KINDS),
        ("dense", "verdict", "best", False),
        ("dense", "sample", "root", False),
        ("dense", "sample", "best", True),
        ("parent", "verdict", "root", True),
    ],
)
def test_each_episode_is_what_the_single_environment_makes_of_it(
    kind: reward.Kind, noise: Noise, rule: str, extended: bool
) -> None:
    arguments = {
        "horizon": 24, "reward": kind, "noise": noise, "parent_rule": rule, "extended": extended
    }  # fmt: skip
    batch = BatchedReplayVecEnv(N, tables(), **arguments)
    batch.seed(11)
    seen = batch.reset()
    singles = [KernelOptReplayEnv(tables(), **arguments) for _ in range(N)]
    alone = [env.reset(seed=11 + i)[0] for i, env in enumerate(singles)]
    rng = np.random.default_rng(0)
    stop = int(batch.action_space.n) - 1  # type: ignore[attr-defined]
    outcomes, others = set(), 0
    for _ in range(150):
        masks = action_masks(batch)
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        # Now and then something illegal, and hardly ever STOP, so that episodes go deep.
        actions = np.where(rng.random(N) < 0.03, rng.integers(-1, stop + 2, N), actions)
        actions = np.where((actions == stop) & masks[:, 0], 0, actions)
        others += np.count_nonzero((actions >= STRATEGIES[-1].id + 1) & (actions < stop - 2))
        seen, rewards, dones, infos = batch.step(actions)
        for i, env in enumerate(singles):
            alone[i], paid, terminated, truncated, info = env.step(actions[i])
            outcomes.add(info["outcome"])
            assert rewards[i] == pytest.approx(paid) and dones[i] == (terminated or truncated)
            if dones[i]:
                last = infos[i]["terminal_observation"]
                for name, values in alone[i].items():
                    np.testing.assert_allclose(last[name], values, atol=1e-6)
                assert infos[i]["TimeLimit.truncated"] == truncated
                assert infos[i]["best_speedup"] == pytest.approx(info["best_speedup"])
                assert infos[i]["clock_s"] == pytest.approx(info["clock_s"])
                alone[i], _ = env.reset()
            for name, values in alone[i].items():
                np.testing.assert_allclose(seen[name][i], values, atol=1e-6, err_msg=name)
        masks = action_masks(batch)
        assert all(np.array_equal(mask, env.action_masks()) for mask, env in zip(masks, singles))
    assert {"correct", "illegal", "stop"} <= outcomes
    assert rule == "root" or {"refused", "compile", "correctness"} <= outcomes
    assert (others > 100) == extended


def test_a_further_draft_is_paid_for_what_it_gains_over_the_best() -> None:
    losses = 0
    for seed in range(6):
        env = KernelOptReplayEnv(tables()[0], horizon=12, reward="parent")
        env.reset(seed=seed)
        rng, best, drafts = np.random.default_rng(seed), 1.0, 0
        for step in range(12):
            legal = np.flatnonzero(env.action_masks()[: STOP.id])
            action = RESTART.id if RESTART.id in legal and step in (0, 5, 9) else int(rng.choice(legal))
            _, paid, _, _, info = env.step(action)
            if action == RESTART.id and info["outcome"] == "correct":
                assert paid == pytest.approx(np.clip(np.log(info["speedup"] / best), -0.2, reward.CLIP))
                drafts += 1
                losses += paid < 0
            best = info["best_speedup"]
        assert drafts
    assert losses > 2


def test_environments_of_several_horizons_take_turns() -> None:
    batch = BatchedReplayVecEnv(3, tables(), horizon=(4, 7))
    batch.seed(3)
    batch.reset()
    singles = [KernelOptReplayEnv(tables(), horizon=horizon) for horizon in (4, 7, 4)]
    for i, env in enumerate(singles):
        env.reset(seed=3 + i)
    for _ in range(20):
        actions = np.array([np.flatnonzero(mask)[0] for mask in action_masks(batch)])
        _, rewards, dones, _ = batch.step(actions)
        for i, env in enumerate(singles):
            _, paid, terminated, truncated, _ = env.step(actions[i])
            assert rewards[i] == pytest.approx(paid) and dones[i] == (terminated or truncated)
            if dones[i]:
                env.reset()
    with pytest.raises(UserError, match="a horizon of 0"):
        BatchedReplayVecEnv(2, tables(), horizon=(4, 0))


def test_observations_are_never_written_to_again() -> None:
    envs = BatchedReplayVecEnv(3, tables(), horizon=5)
    envs.seed(0)
    kept = envs.reset()
    copies = {name: values.copy() for name, values in kept.items()}
    for _ in range(7):
        envs.step(np.full(3, RESTART.id))
    for name, values in kept.items():
        np.testing.assert_array_equal(values, copies[name])


def test_options_and_oracle() -> None:
    envs = BatchedReplayVecEnv(2, tables())
    envs.set_options([{"task": "rms_norm"}, {"task": "bias_gelu"}])
    envs.reset()
    assert envs.oracle().tolist() == [tables()[1].optimum, tables()[2].optimum]
    with pytest.raises(UserError, match="best and root"):
        BatchedReplayVecEnv(2, tables(), parent_rule="uct")


def test_maskable_ppo_learns_on_it() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    envs = make_vec_env(REPLAY, 8, seed=0, tables=tables(), horizon=8)
    model = contrib.MaskablePPO(
        "MultiInputPolicy", envs, n_steps=16, batch_size=64, n_epochs=1, device="cpu", seed=0
    )
    model.learn(256)
    assert model.num_timesteps == 256 and len(model.ep_info_buffer) > 8
