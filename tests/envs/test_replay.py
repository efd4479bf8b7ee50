from __future__ import annotations

import math
import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest

from ke_gym.envs import LAYOUT, spaces
from ke_gym.envs.kernel_opt import KernelOptEnv
from ke_gym.envs.replay import KernelOptReplayEnv
from ke_gym.errors import UserError
from ke_gym.search import parents, reward
from ke_gym.strategies import RESTART, STOP
from tests.envs.live import FakeEvaluator
from tests.envs.recorded import DEPTH, NARROW, tables
from tests.envs.test_live import play

SOFTMAX = tables()[0]


@pytest.mark.parametrize("kind", reward.KINDS)
@pytest.mark.parametrize(("seed", "extended"), [(0, False), (1, False), (2, False), (0, True), (1, True)])
def test_a_replay_shows_and_pays_what_the_live_environment_does(
    kind: reward.Kind, seed: int, extended: bool
) -> None:
    live = KernelOptEnv("softmax", horizon=14, reward=kind, extended=extended, **NARROW)
    replay = KernelOptReplayEnv(SOFTMAX, horizon=14, reward=kind, noise="verdict", extended=extended)
    assert live.action_space == replay.action_space
    rng = np.random.default_rng(seed)
    seen = [env.reset(seed=seed)[0] for env in (live, replay)]
    for step in range(14):
        for name in LAYOUT:
            np.testing.assert_allclose(seen[1][name], seen[0][name], atol=1e-6, err_msg=f"{step} {name}")
        legal = np.flatnonzero(live.action_masks() & replay.action_masks())
        action = int(rng.choice(legal[:-1] if len(legal) > 1 else legal))
        taken = [env.step(action) for env in (live, replay)]
        seen = [result[0] for result in taken]
        (_, paid, *ends, told), (_, repaid, *reends, retold) = taken
        assert paid == pytest.approx(repaid) and ends == reends
        for key in ("outcome", "candidate", "source", "evaluations", "cost_s", "dollars"):
            assert retold[key] == (pytest.approx(told[key]) if key in ("cost_s", "dollars") else told[key])
        assert retold["best_speedup"] == pytest.approx(told["best_speedup"])
        assert retold["speedup_ci"] == pytest.approx(told["speedup_ci"])
        assert replay.walk is not None
        if any(ends) or any(depth >= DEPTH for _, depth, *_ in replay.walk.visited.values()):
            break  # beyond, nothing was recorded
    assert step > 3
    live.close()
    assert not FakeEvaluator.open_now


@pytest.mark.parametrize("rule", [*parents.RULES])
def test_every_parent_rule_plays(rule: str) -> None:
    env = KernelOptReplayEnv(SOFTMAX, horizon=25, parent_rule=rule, render_mode="ansi")
    first, second = play(env, 5), play(env, 5)
    assert first == second
    assert "softmax: step" in env.render()


def test_equal_seeds_draw_equal_repeats_and_others_do_not() -> None:
    env = KernelOptReplayEnv(SOFTMAX)
    speedups = []
    for seed in (0, 0, 1, 2, 3):
        env.reset(seed=seed)
        speedups.append(env.step(RESTART.id)[4]["speedup"])
    assert speedups[0] == speedups[1] and len(set(speedups)) > 1
    rows = SOFTMAX.repeats[:, 0] == int(SOFTMAX.drafts[0])
    recorded = math.e ** (SOFTMAX.log_speedup[SOFTMAX.drafts[0]] + SOFTMAX.noise[rows].astype(float))
    assert all(np.isclose(recorded, value).any() for value in speedups)
    env = KernelOptReplayEnv(SOFTMAX, noise="verdict")
    env.reset(seed=0)
    assert env.step(RESTART.id)[4]["speedup"] == pytest.approx(
        math.exp(SOFTMAX.log_speedup[SOFTMAX.drafts[0]])
    )


def test_what_was_never_recorded_is_masked() -> None:
    env = KernelOptReplayEnv(list(tables()), horizon=60)
    for seed in range(12):
        env.reset(seed=seed)
        walk = env.walk
        assert walk is not None
        table = walk.prepared.table
        for _ in range(60):
            legal = np.flatnonzero(env.action_masks())
            edges = table.edges[table.edges[:, 0] == walk.parent]
            plain = legal[legal < 22]
            assert set(plain.tolist()) <= set(edges[:, 1].tolist())
            if len(legal) == 1:
                break
            _, _, _, truncated, info = env.step(int(legal[seed % (len(legal) - 1)]))
            assert info["candidate"] == "" or info["candidate"] in table.candidates
        assert truncated or walk.evaluations <= len(table)


def test_an_extended_action_goes_on_with_the_version_in_its_slot() -> None:
    env = KernelOptReplayEnv(SOFTMAX, horizon=60, extended=True)
    assert env.action_space == spaces.action_space(extended=True)
    chosen = set()
    for seed in range(6):
        _, info = env.reset(seed=seed)
        rng, ended = np.random.default_rng(seed), False
        while not ended:
            assert np.array_equal(env.action_masks(), info["action_mask"].astype(np.bool_))
            legal = np.flatnonzero(info["action_mask"][:-1])
            action = int(rng.choice(legal)) if len(legal) else 90
            walk = env.walk
            assert walk is not None
            slot, _, _ = spaces.split(action, extended=True)
            parent, told = walk.slots()[slot], len(walk.visited)
            speedups = [walk.visited[node][0] for node in walk.slots()[1:]]
            assert speedups == sorted(speedups, reverse=True)
            _, _, *ends, info = env.step(action)
            ended = any(ends)
            if action < 88 and len(walk.visited) > told:
                (above,) = {n.parent for n in walk.tree().nodes.values() if n.number == walk.number - 1}
                made = walk.tree().nodes[above].candidate.id  # type: ignore[index]
                assert made == SOFTMAX.candidates[parent]
                chosen.add(slot)
    assert chosen == {0, 1, 2, 3}
    env.reset(seed=0)
    # There is no second parent yet, and no such actions.
    assert [env.step(action)[4]["outcome"] for action in (22, -1, 91)] == ["illegal"] * 3
    assert play(env, 2) == play(env, 2)


def test_observations_and_masks_are_never_written_to_again() -> None:
    env = KernelOptReplayEnv(SOFTMAX)
    observation, info = env.reset(seed=0)
    kept, mask = {name: values.copy() for name, values in observation.items()}, info["action_mask"].copy()
    seen, told = env.step(RESTART.id)[::4]
    later = {name: values.copy() for name, values in seen.items()}
    for _ in range(6):
        env.step(int(np.flatnonzero(env.action_masks())[0]))
    for name in LAYOUT:
        np.testing.assert_array_equal(observation[name], kept[name])
        np.testing.assert_array_equal(seen[name], later[name])
    assert np.array_equal(info["action_mask"], mask) and not np.array_equal(told["action_mask"], mask)
    seen["history"][:] = 0.5  # whoever writes into an observation writes into that one only
    assert env.reset(seed=0)[0]["history"][1] == kept["history"][1]


def test_the_clock_charges_what_was_recorded_and_the_oracle_nothing() -> None:
    env = KernelOptReplayEnv(SOFTMAX)
    env.reset(seed=0)
    assert env.oracle() == SOFTMAX.optimum
    costs = [env.step(RESTART.id)[4] for _ in range(3)]
    assert (
        costs[-1]["clock_s"] == pytest.approx(sum(info["cost_s"] for info in costs))
        and costs[0]["cost_s"] > 0
    )
    assert env.step(STOP.id)[4]["clock_s"] == costs[-1]["clock_s"]


def test_options_choose_the_table() -> None:
    env = KernelOptReplayEnv(list(tables()))
    seen = {env.reset(seed=seed)[1]["task"] for seed in range(20)}
    assert seen == {"softmax", "rms_norm", "bias_gelu"}
    assert env.reset(options={"task": "bias_gelu"})[1]["task"] == "bias_gelu"
    with pytest.raises(UserError, match="no table of 'swiglu'; it has softmax"):
        env.reset(options={"task": "swiglu"})
    with pytest.raises(UserError, match="no option 'tsk'"):
        env.reset(options={"tsk": "softmax"})


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    bad: dict[str, Any]
    for bad, message in (
        ({"tables": "sofmax_of_mine"}, "no replay table"),
        ({"tables": []}, "at least one table"),
        ({"noise": "loud"}, "sample"),
        ({"horizon": 0}, "positive"),
        ({"reward": "most"}, "choose best"),
        ({"parent_rule": "bets"}, "'best'"),
        ({"render_mode": "human"}, "ansi"),
    ):
        with pytest.raises(UserError, match=message):
            KernelOptReplayEnv(**{"tables": SOFTMAX, **bad})
    with pytest.raises(gymnasium.error.ResetNeeded):
        KernelOptReplayEnv(SOFTMAX).step(0)


def test_pictures_and_pickles() -> None:
    env = KernelOptReplayEnv(SOFTMAX, render_mode="rgb_array", horizon=8)
    expected = play(env, 3)
    assert env.render().shape == (480, 640, 3)
    assert play(pickle.loads(pickle.dumps(env)), 3) == expected
