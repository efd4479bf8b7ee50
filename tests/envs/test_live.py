from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from ke_gym.candidate import Candidate
from ke_gym.envs import LIVE, flatten, spaces
from ke_gym.envs.kernel_opt import KernelOptEnv
from ke_gym.envs.wrappers import FlatObservation, LegalAction, action_masks
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.proposers.base import Context, Proposal, Refusal
from ke_gym.search import reward
from ke_gym.search.observation import LAYOUT
from ke_gym.strategies import FIX, RESTART, STOP, Strategy, get
from ke_gym.tasks import Task
from tests.envs.live import FAKE, FakeEvaluator, LosingEvaluator
from tests.search.fakes import FakeProposer


@pytest.fixture
def env() -> Iterator[KernelOptEnv]:
    made = KernelOptEnv("softmax", horizon=12, **FAKE)
    yield made
    made.close()


def play(env: Any, seed: int = 0, steps: int = 200) -> list[tuple[int, float, str, str]]:
    """Random legal actions to the end of the episode: (action, reward, outcome, candidate) of each step."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    taken = []
    for _ in range(steps):
        legal = np.flatnonzero(action_masks(env)[:-1])
        action = int(rng.choice(legal)) if len(legal) else STOP.id
        observation, value, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        assert type(terminated) is bool and type(truncated) is bool and np.isfinite(value)
        assert info["action_mask"].dtype == np.int8 and info["action_mask"][-1] == 1
        taken.append((action, value, info["outcome"], info["candidate"]))
        if terminated or truncated:
            return taken
    raise AssertionError("the episode never ended")


def test_an_episode_begins_with_a_draft_and_lasts_its_horizon(env: KernelOptEnv) -> None:
    observation, info = env.reset(seed=1)
    assert np.flatnonzero(info["action_mask"]).tolist() == [RESTART.id, STOP.id]
    assert observation["history"][0] == 1 and not observation["code"].any()
    assert observation["task"].any() and observation["hardware"].any()
    assert flatten(observation).shape == (sum(LAYOUT.values()),)
    assert len(play(env)) == 12


def test_equal_seeds_make_equal_episodes(env: KernelOptEnv) -> None:
    first = play(env, 5)
    assert first != play(env, 6)
    other = KernelOptEnv("softmax", horizon=12, **FAKE)
    assert first == play(other, 5)
    other.close()


def test_best_reward_sums_to_the_final_log_speedup() -> None:
    env = KernelOptEnv("softmax", horizon=30, parent_rule="weighted", **FAKE)
    taken = play(env, 2)
    assert env.episode is not None and env.episode.session.tree.best is not None
    best = env.episode.session.tree.best.speedup
    gains = sum(value for _, value, _, _ in taken if value > 0)
    assert best > 1.05
    assert gains == pytest.approx(np.log(best))
    env.close()


@pytest.mark.parametrize("kind", reward.KINDS)
def test_rewards_keep_their_ranges(kind: reward.Kind) -> None:
    env = KernelOptEnv("softmax", horizon=30, reward=kind, **FAKE)
    low, high = (-1.0, 3.0) if kind == "milestone" else (-0.2, reward.CLIP)
    taken = play(env, 3)
    assert all(low <= value <= high for _, value, _, _ in taken)
    failed = {value for _, value, outcome, _ in taken if outcome in ("runtime", "compile", "correctness")}
    assert failed and max(failed) < 0
    env.close()


@pytest.mark.parametrize("action", [get("fuse").id, FIX.id, 25, 1000, -1])
def test_an_illegal_action_costs_a_step_and_nothing_else(env: KernelOptEnv, action: int) -> None:
    env.reset(seed=0)
    _, value, terminated, truncated, info = env.step(action)
    assert (value, terminated, truncated) == (reward.DUPLICATE_PENALTY, False, False)
    assert info["outcome"] == "illegal" and info["evaluations"] == 0
    for _ in range(11):
        assert not truncated
        _, _, _, truncated, _ = env.step(action)
    assert truncated


def test_stop_ends_the_episode_without_cost(env: KernelOptEnv) -> None:
    env.reset(seed=0)
    _, value, terminated, truncated, info = env.step(STOP.id)
    assert (value, terminated, truncated, info["outcome"]) == (0.0, True, False, "stop")


def test_a_known_candidate_costs_nothing_again(env: KernelOptEnv) -> None:
    def costs() -> list[float]:
        env.reset(seed=4)
        return [env.step(RESTART.id)[4]["cost_s"] for _ in range(3)]

    assert sum(costs()) > 0 and costs() == [0.0, 0.0, 0.0]


def test_one_evaluator_is_kept_while_the_task_stays_the_same() -> None:
    before = list(FakeEvaluator.open_now)
    env = KernelOptEnv(["softmax", "rms_norm"], **FAKE)
    seen = set()
    for seed in range(6):
        _, info = env.reset(seed=seed)
        seen.add(info["task"])
        assert [*before, info["task"]] == FakeEvaluator.open_now
    assert seen == {"softmax", "rms_norm"}
    _, info = env.reset(options={"task": "layer_norm"})
    assert info["task"] == "layer_norm"
    env.close()
    env.close()
    assert before == FakeEvaluator.open_now


def test_a_lost_worker_costs_one_evaluation_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LosingEvaluator, "losses", 1)
    env = KernelOptEnv("softmax", horizon=12, **{**FAKE, "open_evaluator": LosingEvaluator})
    outcomes = [outcome for _, _, outcome, _ in play(env, 6)]
    assert outcomes.count("lost") == 1 and len(outcomes) == 12
    env.close()
    monkeypatch.setattr(LosingEvaluator, "losses", 99)
    env = KernelOptEnv("softmax", horizon=12, **{**FAKE, "open_evaluator": LosingEvaluator})
    with pytest.raises(UserError, match="3 evaluations in a row were lost, the last to EOFError"):
        play(env, 6)
    env.close()


class Reluctant(FakeProposer):
    """Has nothing to offer."""

    def propose(self, parent: object, strategy: Strategy, draw: int, context: Context) -> Proposal | Refusal:
        return Refusal("the reference cannot be captured")


def test_a_task_without_a_legal_strategy_is_a_clear_error() -> None:
    env = KernelOptEnv("softmax", **{**FAKE, "proposer": lambda task: Reluctant()})
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"softmax: fake has no legal strategy for it: the reference cannot"):
        env.step(RESTART.id)
    env.close()


def test_extended_actions_choose_the_parent_too() -> None:
    env = KernelOptEnv("softmax", horizon=40, extended=True, **FAKE)
    assert env.action_space == gymnasium.spaces.Discrete(91)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    elsewhere = 0
    for _ in range(40):
        legal = np.flatnonzero(env.action_masks()[:-1])
        action = int(rng.choice(legal))
        assert env.episode is not None
        tree = env.episode.session.tree
        best = tree.best
        *_, info = env.step(action)
        if 22 <= action < 88 and info["candidate"]:
            node = list(tree)[-1]
            assert best is not None and node.parent is not None and node.parent != best.number
            elsewhere += 1
    assert elsewhere > 3
    env.close()


@pytest.mark.parametrize(
    ("extended", "edits", "count"),
    [(False, False, 25), (True, False, 91), (False, True, 47), (True, True, 179)],
)
def test_every_action_means_one_thing(extended: bool, edits: bool, count: int) -> None:
    assert spaces.action_space(extended, edits).n == count
    meanings = [spaces.split(action, extended, edits) for action in range(count)]
    assert len(set(meanings)) == count
    assert {slot for slot, _, _ in meanings} == set(range(4 if extended else 1))
    assert {form for _, plain, form in meanings if plain < 22} == ({"edit", "rewrite"} if edits else {None})
    assert [m[1:] for m in meanings[-3:]] == [(FIX.id, None), (RESTART.id, None), (STOP.id, None)]


class Forms(FakeProposer):
    """Remembers in which form answers were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str | None] = []

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        self.asked.append(context.edit)
        return super().propose(parent, strategy, draw, context)


def test_the_form_of_the_answer_is_chosen_with_edits() -> None:
    made = Forms()
    env = KernelOptEnv("softmax", horizon=30, edits=True, **{**FAKE, "proposer": lambda task: made})
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    expected: list[str | None] = []
    for _ in range(30):
        action = int(rng.choice(np.flatnonzero(env.action_masks()[:-1])))
        before = len(made.asked)
        env.step(action)
        expected += [spaces.split(action, False, True)[2]] * (len(made.asked) - before)
    env.close()
    assert made.asked == expected and {"edit", "rewrite"} <= set(expected)


def test_what_a_person_sees() -> None:
    env = KernelOptEnv("softmax", horizon=8, render_mode="ansi", **FAKE)
    play(env, 1)
    text = env.render()
    assert "softmax: step 8 of 8" in text and "RESTART" in text and "GENES" in text
    env.close()
    env = KernelOptEnv("softmax", horizon=8, render_mode="rgb_array", **FAKE)
    env.reset(seed=0)
    empty = env.render()
    play(env, 1)
    picture = env.render()
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8
    assert (picture != empty).any()
    env.close()


def test_wrappers_flatten_observations_and_replace_illegal_actions(env: KernelOptEnv) -> None:
    flat = FlatObservation(LegalAction(env))
    observation, _ = flat.reset(seed=0)
    assert flat.observation_space.contains(observation)
    observation, _, _, _, info = flat.step(get("fuse").id)
    assert info["action"] == RESTART.id and info["outcome"] != "illegal"
    assert flat.observation_space.contains(observation)
    assert action_masks(flat).shape == (25,)


def test_bad_arguments_are_refused_in_one_sentence(env: KernelOptEnv) -> None:
    for bad, message in (
        ({"tasks": "softmaxx"}, "softmax"),
        ({"tasks": []}, "at least one task"),
        ({"reward": "most"}, "choose best, parent, dense, milestone"),
        ({"horizon": 0}, "positive"),
        ({"parent_rule": "bets"}, "'best'"),
        ({"render_mode": "human"}, "ansi"),
    ):
        with pytest.raises(UserError, match=message):
            KernelOptEnv(**{**FAKE, **bad})
    with pytest.raises(UserError, match="no option 'tsk'"):
        env.reset(options={"tsk": "softmax"})
    with pytest.raises(UserError, match="an episode is about one"):
        env.reset(options={"task": "suite"})
    with pytest.raises(gymnasium.error.ResetNeeded):
        KernelOptEnv(**FAKE).step(0)


def test_a_pickled_environment_is_made_anew_from_its_arguments(env: KernelOptEnv) -> None:
    expected = play(env, 9)
    copy = pickle.loads(pickle.dumps(env))
    assert play(copy, 9) == expected
    copy.close()


SMALL = """
import torch
from torch import nn
class Model(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 2 + torch.sigmoid(x)
def get_inputs():
    return [torch.rand(64, 256)]
def get_init_inputs():
    return []
"""


@pytest.mark.usefixtures("brief_races")
def test_a_real_search_measures_real_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KE_GYM_HOME", str(tmp_path))
    (tmp_path / "small.py").write_text(SMALL)
    task = Task.load(tmp_path / "small.py")
    evaluators: list[Evaluator] = []

    def opened(task: Task) -> Evaluator:
        evaluators.append(Evaluator(task, threads=1, folder=tmp_path))
        return evaluators[-1]

    env = gymnasium.make(LIVE, tasks=task, horizon=3, open_evaluator=opened)
    observation, _ = env.reset(seed=0)
    observation, _, _, _, info = env.step(RESTART.id)
    assert info["outcome"] == "correct" and info["speedup"] > 0 and info["cost_s"] > 0
    low, high = info["speedup_ci"]
    # A candidate that looks slow, as any may beside other work, leaves its race before there is an interval.
    assert low <= info["speedup"] <= high or (low, high) == (0.0, 0.0)
    assert observation["code"].any() and observation["profile"][-1] == 1
    # The judge dies: the next evaluation is lost, the one after it is made by a new evaluator.
    evaluators[0].judge.worker.kill()
    legal = np.flatnonzero(action_masks(env)[:22])
    *_, info = env.step(int(legal[0]))
    assert info["outcome"] == "lost"
    *_, truncated, info = env.step(int(np.flatnonzero(action_masks(env)[:22])[-1]))
    assert truncated and info["outcome"] not in ("lost", "illegal") and len(evaluators) == 2
    env.close()
