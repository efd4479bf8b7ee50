"""Training, playing and comparing over small tables of the synthetic problem."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ke_gym import policies
from ke_gym.envs.replay import KernelOptReplayEnv
from ke_gym.errors import UserError
from ke_gym.policies import Policy, Transition, files, plots
from ke_gym.policies.comparison import BASELINES, Comparison
from ke_gym.policies.learning import NETWORKS, Plan, Trainer, export, minibatch, training_envs
from ke_gym.policies.playing import play, replay_runs
from ke_gym.policies.tracking import Tracker
from ke_gym.policies.yardstick import Yardstick
from ke_gym.strategies import RESTART, STOP
from ke_gym.tasks.loader import LIBRARY
from ke_gym.testing.policies import PolicyConformance
from tests.envs.live import FAKE
from tests.envs.recorded import tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tables")
    for table in tables():
        table.save(made / f"{table.task}.npz")
    return made


def plan(folder: Path, policy: str, **changes: Any) -> Plan:
    arguments: dict[str, Any] = {
        "policy": policy, "env": "replay", "tasks": (str(folder / "rms_norm.npz"),),
        "validation": (str(folder / "softmax.npz"),), "steps": 400, "horizon": (8,), "reward": "best", "seed": 0,
        "n_envs": 4, "every": 200,
    }  # fmt: skip
    return Plan(**{**arguments, **changes})


@pytest.mark.parametrize("policy", ["maskable_ppo", "ppo", "dqn", "linucb", "ucb1"])
def test_training_validates_keeps_the_best_and_says_what_it_was_trained_on(
    policy: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ke_gym.policies.learning.BATCH", 64)
    trainer = Trainer(plan(folder, policy), tmp_path / "run")
    records: list[dict[str, Any]] = []
    assert trainer.run(records.append) == "complete"
    assert len(records) >= 2 and all(np.isfinite(record["validation_auc"]) for record in records)
    best = policies.load(trainer.best)
    assert best.name == policy
    assert best.trained_on["tables"] == {"rms_norm": tables()[1].hash}
    assert best.trained_on["validated_on"] == ["softmax"]
    kept = [record for record in records if record["best"]][-1]
    assert (best.trained_on["steps"], best.trained_on["validation_auc"]) == (
        kept["steps"],
        kept["validation_auc"],
    )
    with pytest.raises(UserError, match="holds a training"):
        Trainer(plan(folder, policy), tmp_path / "run")


@pytest.mark.parametrize("policy", ["maskable_ppo", "linucb"])
def test_an_interrupted_training_goes_on_and_only_as_the_same_one(
    policy: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ke_gym.policies.learning.BATCH", 64)
    with pytest.raises(UserError, match="no training to resume"):
        Trainer(plan(folder, policy), tmp_path / "run", resume=True)

    def interrupt(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    assert Trainer(plan(folder, policy), tmp_path / "run").run(interrupt) == "interrupted"
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert 200 <= state["steps"] < 400
    records: list[dict[str, Any]] = []
    again = Trainer(plan(folder, policy), tmp_path / "run", resume=True)
    assert again.run(records.append) == "complete"
    assert [record["steps"] > state["steps"] for record in records] == [True] * len(records)
    assert again.state.steps >= 400 and len(again.state.history) == len(records) + 1
    with pytest.raises(UserError, match=r"horizon = \[8\]"):
        Trainer(plan(folder, policy, horizon=(9,)), tmp_path / "run", resume=True)
    other = {"rms_norm": tables()[0].hash}
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    (tmp_path / "run" / "state.json").write_text(json.dumps(state | {"tables": other}))
    with pytest.raises(UserError, match="rms_norm changed since"):
        Trainer(plan(folder, policy), tmp_path / "run", resume=True)


@pytest.mark.parametrize("policy", ["maskable_ppo", "linucb"])
def test_a_training_interrupted_in_a_validation_learns_nothing_twice(
    policy: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ke_gym.policies.learning.BATCH", 64)
    whole = Trainer(plan(folder, policy, horizon=(8, 12)), tmp_path / "whole")
    assert whole.run() == "complete"

    for turn in range(3):  # in the first validation, and in the last
        parts = Trainer(plan(folder, policy, horizon=(8, 12)), tmp_path / "parts", resume=turn > 0)
        yardstick = parts.yardstick
        assert yardstick is not None
        if turn < 2:
            scores = [yardstick.score] if turn else []  # what waits to be scored is
            stopped = copy.copy(yardstick)

            def score(made: Policy, scores: list[Any] = scores) -> dict[str, float]:
                if scores:
                    return scores.pop()(made)  # type: ignore[no-any-return]
                raise KeyboardInterrupt

            monkeypatch.setattr(stopped, "score", score)
            parts.yardstick = stopped
        assert parts.run() == ("interrupted" if turn < 2 else "complete")
    steps = [record["steps"] for record in whole.state.history]
    # A network ends its last update, beyond the plan, unless it was stopped before.
    assert [record["steps"] for record in parts.state.history] == steps[:2]
    if policy == "linucb":  # networks draw anew when they are loaded
        assert len(steps) == 2
        figures = [record["validation_auc"] for record in whole.state.history]
        assert [record["validation_auc"] for record in parts.state.history] == figures
        assert parts.state.spent == whole.state.spent
    assert len(list((tmp_path / "parts").glob("checkpoint*"))) == 1


def test_a_training_stopped_before_its_first_validation_can_be_resumed(folder: Path, tmp_path: Path) -> None:
    Trainer(plan(folder, "ucb1"), tmp_path / "run")
    assert Trainer(plan(folder, "ucb1"), tmp_path / "run", resume=True).run() == "complete"


@pytest.mark.parametrize("policy", ["maskable_ppo", "linucb"])
def test_a_damaged_checkpoint_is_named(
    policy: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ke_gym.policies.learning.BATCH", 64)
    Trainer(plan(folder, policy), tmp_path / "run").run()
    more = Trainer(plan(folder, policy, steps=800), tmp_path / "run", resume=True)
    more.checkpoint.write_bytes(b"cut off")
    with pytest.raises(UserError, match=more.checkpoint.name):
        more.run()
    more.checkpoint.unlink()
    with pytest.raises(UserError, match=more.checkpoint.name):
        more.run()


def test_a_resumed_network_meets_other_episodes_than_at_its_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ke_gym.envs.vector import TrainingVecEnv

    monkeypatch.setattr("ke_gym.policies.learning.BATCH", 64)
    Trainer(plan(folder, "maskable_ppo"), tmp_path / "run").run()
    seeds: list[int | None] = []
    plain = TrainingVecEnv.seed
    monkeypatch.setattr(
        TrainingVecEnv, "seed", lambda self, seed=None: (seeds.append(seed), plain(self, seed))[1]
    )
    more = Trainer(plan(folder, "maskable_ppo", steps=600), tmp_path / "run", resume=True)
    learned = more.state.steps
    more.run()
    assert seeds[-1] == learned > 0


@pytest.mark.parametrize("steps", range(2, 40))
def test_no_minibatch_has_one_sample(steps: int) -> None:
    assert steps % minibatch(steps) != 1


def test_trainings_that_train_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="train maskable_ppo, then name ppo_guided:weights=FILE"):
        plan(folder, "ppo_guided")
    with pytest.raises(UserError, match="one step to learn from"):
        plan(folder, "maskable_ppo", env="live", tasks=("softmax",), n_envs=1, horizon=(1,))


class Scripted(Yardstick):
    """Says what it is told to, one score after the other."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def score(self, policy: Policy) -> dict[str, float]:
        return {"auc": self.scores.pop(0), "noise": 0.02}


def test_a_lucky_validation_does_not_outlast_equals_and_a_clear_loss_is_not_kept(
    folder: Path, tmp_path: Path
) -> None:
    trainer = Trainer(plan(folder, "linucb"), tmp_path / "run")
    trainer.yardstick = Scripted(0.30, 0.20, 0.24, 0.29, 0.0)
    kept = []
    for step in range(5):
        trainer.validated(
            policies.make("linucb:untrained"), step, {}, lambda record: kept.append(record["best"])
        )
    # Means of three: 0.30, 0.25, 0.247, 0.243, 0.177; noise 0.02.
    assert kept == [True, False, False, False, False]
    trainer.yardstick = Scripted(0.40, 0.40, 0.40, 0.39)
    kept.clear()
    for step in range(5, 9):
        trainer.validated(
            policies.make("linucb:untrained"), step, {}, lambda record: kept.append(record["best"])
        )
    assert kept == [False, False, True, True]
    assert policies.load(trainer.best).trained_on["steps"] == 8


@pytest.mark.parametrize("policy", ["linucb:untrained", "boosted_trees", "ucb1"])
def test_validation_teaches_a_policy_nothing_and_no_run_helps_the_next(policy: str) -> None:
    yardstick = Yardstick(tables()[:1], (12,), runs=2)
    made = policies.make(policy)
    made.training = True
    before = files.encode(made.state_dict())
    first = yardstick.score(made)
    assert files.encode(made.state_dict()) == before
    # A second run after another first one is the same run.
    second = Yardstick(tables()[:1], (12,), runs=2)._episodes(made, tables()[0], 12, 2)[1]
    made.reseed(1)
    alone = copy.deepcopy(made)
    alone.training = False
    env = KernelOptReplayEnv(tables()[0], horizon=12, reward=made.reward)  # type: ignore[arg-type]
    np.testing.assert_array_equal(play(alone, env, seed=1).curve, second.curve)
    assert yardstick.score(made) == first


@pytest.mark.parametrize("policy", ["maskable_ppo", "linucb"])
def test_live_training_needs_no_tables(policy: str, folder: Path, tmp_path: Path) -> None:
    live = plan(
        folder,
        policy,
        env="live",
        tasks=(str(LIBRARY / "softmax.py"),),
        validation=(),
        steps=32,
        every=16,
        n_envs=2,
    )
    trainer = Trainer(live, tmp_path / "run", live=FAKE)
    records: list[dict[str, Any]] = []
    assert trainer.run(records.append) == "complete"
    trained_on = policies.load(trainer.best).trained_on
    assert (trained_on["env"], trained_on["tables"], trained_on["tasks"]) == ("live", {}, ["softmax"])
    assert all("validation_auc" not in record and record["best"] for record in records)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_an_exported_network_computes_what_the_trained_one_does(name: str, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from ke_gym.envs import REPLAY, make_vec_env
    from ke_gym.envs.vector import FlatVecObservation
    from ke_gym.policies.learning import _algorithm

    envs = FlatVecObservation(make_vec_env(REPLAY, 2, seed=0, tables=tables()))
    algorithm, _ = _algorithm(name)
    model = algorithm("MlpPolicy", envs, device="cpu", seed=0)
    policy: Any = export(model, plan(folder, name))
    seen = np.asarray(envs.reset())
    with torch.no_grad():
        tensor = torch.as_tensor(seen)
        if name == "dqn":
            expected = model.q_net(tensor)
        else:
            expected = model.policy.action_net(model.policy.mlp_extractor.forward_actor(tensor))
    for row, values in zip(seen, expected.numpy()):
        np.testing.assert_allclose(policy.outputs(row), values, atol=1e-5)


def test_failures_are_fined_unless_penalties_are_left_out() -> None:
    pytest.importorskip("stable_baselines3")
    from ke_gym.envs import REPLAY, make_vec_env
    from ke_gym.envs.vector import FlatVecObservation, TrainingVecEnv

    paid: dict[bool, list[float]] = {}
    for penalties, options in {True: {}, False: {"penalties": False}}.items():
        made = make_vec_env(REPLAY, 8, seed=0, tables=tables(), horizon=12)
        envs = TrainingVecEnv(FlatVecObservation(made), **options)
        envs.reset()
        rng = np.random.default_rng(0)
        paid[penalties] = []
        for _ in range(20):
            actions = [rng.choice(np.flatnonzero(mask)) for mask in envs.action_masks()]
            _, rewards, _, _ = envs.step(np.array(actions))
            paid[penalties] += rewards.tolist()
    assert min(paid[True]) < 0 < max(paid[True])
    assert paid[False] == [max(reward, 0.0) for reward in paid[True]]


@pytest.mark.parametrize("name", ["maskable_ppo", "ppo"])
def test_networks_train_where_only_choices_count(name: str) -> None:
    pytest.importorskip("stable_baselines3")
    from ke_gym.envs import REPLAY
    from ke_gym.envs.vector import IDENTITY
    from ke_gym.envs.wrappers import action_masks

    envs = training_envs(name, REPLAY, 8, seed=0, tables=tables(), horizon=(5, 9))
    seen = envs.reset()
    rng = np.random.default_rng(0)
    shown, ends, fresh = set(), [0, 0], np.ones(8, np.bool_)
    steps = np.zeros(8, np.int64)
    for _ in range(46):
        steps += 1
        masks = action_masks(envs)
        others = masks[:, : STOP.id].any(axis=1)
        assert (masks[:, STOP.id] == ~others).all()
        shown |= {bool(row[IDENTITY].any()) for row in seen}
        legal = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        # Without masks, whatever is asked for, a legal action is taken.
        actions = legal if name == "maskable_ppo" else rng.integers(0, 25, 8)
        seen, rewards, dones, infos = envs.step(actions)
        assert not rewards[fresh].any(), "the first draft pays nothing"
        fresh = dones.copy()
        for i in np.flatnonzero(dones):
            assert infos[i]["TimeLimit.truncated"] is False
            assert not others[i] or steps[i] == (5, 9)[i % 2], "an episode ends with its horizon"
            ends[i % 2] += 1
            steps[i] = 0
    assert shown == {True, False} and min(ends) >= 4 * 5


class Best(Policy):
    """Always takes the first strategy; a stand-in for a policy that knows."""

    name = "best"

    def choose(self, observation: Any, mask: Any, deterministic: bool) -> int:
        return int(np.flatnonzero(mask)[0])


def test_an_episode_is_told_to_the_policy_step_by_step() -> None:
    told: list[Transition] = []

    class Listener(Best):
        def update(self, transition: Transition) -> None:
            told.append(transition)

    env = KernelOptReplayEnv(tables()[0], horizon=9, reward="parent")
    episode = play(Listener(), env, seed=1, keep=True)
    assert told[0].action == RESTART.id and len(told) == 9
    assert told[-1].terminated and not told[0].terminated
    assert (np.diff(episode.curve) >= 0).all() and episode.curve.shape == (9,)
    assert episode.evaluations == len(episode.candidates) == 9 - episode.vain
    assert episode.seconds == pytest.approx(0.6 * episode.evaluations)
    gains = [t.info["best_gain"] for t in told]
    assert sum(g > 0 for g in gains) >= 1 and min(gains) >= 0


def compared(tmp: Path) -> Comparison:
    names = ("linucb:untrained", *BASELINES)
    makers = {name: partial(policies.make, name) for name in names}
    runs = replay_runs(makers, tables()[:2], 12, 4)
    return Comparison(runs, {table.task: table.optimum for table in tables()})


def test_a_comparison_has_all_figures_and_its_page(tmp_path: Path) -> None:
    comparison = compared(tmp_path)
    again = compared(tmp_path)
    assert comparison.to_dict() == again.to_dict(), "common random numbers repeat"
    # Chance is measured against its own median curve.
    chance = next(score for score in comparison.scores if score.policy == "masked_random")
    assert abs(chance.auc.value) < 0.3 and set(chance.over) == {"best_of_n"}
    held = {name: comparison.curves[name].mean() for name in BASELINES}
    ratio = chance.faster["best_of_n"]
    assert ratio.value == pytest.approx(np.exp(held["masked_random"] - held["best_of_n"]))
    assert ratio.low <= ratio.value <= ratio.high
    data = json.loads(json.dumps(comparison.to_dict()))
    assert data["budget"] == 12 and data["runs"] == 4 and len(data["episodes"]["best_of_n"]) == 4
    page = plots.write(comparison, tmp_path / "out", "a <title>")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3 and "a &lt;title&gt;" in text
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "curves.png",
        "scores.png",
        "profiles.png",
    }
    assert len(plots.rows(comparison)[0]) == len(plots.HEADER)


def test_tracking_that_is_off_imports_nothing_and_online_needs_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"kind": "train", "name": "n", "group": "g", "config": {}, "folder": tmp_path}
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    off = Tracker("disabled", **arguments)
    off.log({"a": 1.0}, step=1)
    off.finish()
    assert off.run_id is None
    with pytest.raises(UserError, match=re.escape("pip install 'ke-gym[wandb]'")):
        Tracker("offline", **arguments)
    monkeypatch.undo()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="needs a key"):
        Tracker("online", **arguments)


def test_an_offline_run_is_written_and_continued(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    arguments: dict[str, Any] = {
        "kind": "train",
        "name": "n",
        "group": "g",
        "config": {"a": 1},
        "folder": tmp_path,
    }
    first = Tracker("offline", **arguments)
    first.log({"reward": 0.5}, step=10)
    first.table("scores", ["policy", "auc"], [["random", 0.0]])
    (tmp_path / "p.json").write_text("{}")
    first.artifact("policy", "policy", tmp_path / "p.json")
    first.finish()
    second = Tracker("offline", **arguments, run_id=first.run_id)
    second.log({"reward": 0.6}, step=20)
    second.finish()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and all(any(run.glob("*.wandb")) for run in runs)


EXAMPLE = re.search(
    r"```python\n(import numpy as np\n.*?)```",
    (Path(__file__).parents[2] / "docs" / "policies.md").read_text(),
    re.DOTALL,
)
assert EXAMPLE is not None
_SPACE: dict[str, Any] = {}
exec(EXAMPLE[1], _SPACE)


class TestTheDocumentedPolicy(PolicyConformance):
    def make(self, seed: int = 0) -> Policy:
        return _SPACE["Streak"](seed)  # type: ignore[no-any-return]
