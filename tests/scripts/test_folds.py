"""The policies benchmark leaves every family out once, and pools what the folds found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ke_gym.errors import UserError
from ke_gym.policies.base import Policy


@pytest.fixture
def benchmarks(benchmark_module: Callable[[str], Any]) -> tuple[Any, Any]:
    return benchmark_module("folds"), benchmark_module("policies")


@pytest.fixture
def folder(table_folder: Path) -> Path:
    return table_folder


def test_a_fold_is_trained_on_all_families_but_its_own(
    benchmarks: tuple[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds, _ = benchmarks
    made = folds.folds((str(folder),))
    assert {fold.family for fold in made} == {"softmax", "norm", "pointwise"}
    learned: dict[str, set[str]] = {}
    player = folds._player

    def seen(entry: Any, trained: Path | None) -> Policy:
        policy: Policy = player(entry, trained)
        learned[entry.name] = {*policy.trained_on["tables"]}
        return policy

    monkeypatch.setattr(folds, "_player", seen)
    effort = folds.Effort((4, 6), 2, 2, 12)
    entries = [folds.Entry("bandit", training=folds.Training("ucb1"))]
    (norm,) = (fold for fold in made if fold.family == "norm")
    found = folds._played(entries, norm, effort)
    assert learned["bandit"] == {"softmax", "bias_gelu"}
    assert [episode.task for run in found["bandit"][6] for episode in run] == ["rms_norm"] * 2
    assert [len(run[0].curve) for run in found["bandit"][4]] == [4, 4]
    with pytest.raises(UserError, match="all tables are of the family norm"):
        folds.folds((str(folder / "rms_norm.npz"),))


def test_a_blind_network_prefers_the_same_whatever_it_is_shown(
    benchmarks: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    folds, _ = benchmarks
    fold, training = folds.folds((str(folder),))[0], folds.Training("maskable_ppo", blind=True)
    best = folds._trained(training, fold, folds.Effort((4,), 1, 256, 12), tmp_path / "run")
    policy = folds._player(folds.Entry("blind", training=training), best)
    shown = [{name: part + i for name, part in _nothing().items()} for i in range(2)]
    assert (policy.outputs(shown[0]) == policy.outputs(shown[1])).all()


def _nothing() -> dict[str, Any]:
    import numpy as np

    from ke_gym.envs import LAYOUT

    return {name: np.zeros(size, np.float32) for name, size in LAYOUT.items()}


def test_folds_are_pooled_compared_and_written(
    benchmarks: tuple[Any, Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, policies = benchmarks
    arguments: dict[str, Any] = {"tables": (str(folder),), "workers": 1, "out": tmp_path / "out"}
    policies.Policies(
        **arguments, trained=("ucb1", "puct"), untrained=("uct",), budgets=(6,), seeds=2, bandit_steps=60,
        ablations=False,
    ).run()  # fmt: skip
    told = capsys.readouterr().out
    assert "3 families, 3 tasks, 6 evaluations" in told and policies.CHOSEN in told
    data = json.loads((tmp_path / "out" / "folds.json").read_text())
    (comparison,) = data["comparisons"]
    names = {score["policy"] for score in comparison["scores"]}
    assert names == {"ucb1, trained", "puct, trained", "uct", "masked_random", "best_of_n", policies.CHOSEN}
    assert len(comparison["tasks"]) == 3 and set(comparison["tasks"]) == set(data["tables"])
    assert len(data["figures"]) == 6  # two trained policies and the chosen one, against two baselines
    assert (tmp_path / "out" / "6" / "index.html").exists()
    with pytest.raises(UserError, match="have to be positive"):
        policies.Policies(**arguments, seeds=0).run()
    with pytest.raises(UserError, match="did you mean puct"):
        policies.Policies(**arguments, trained=("pucy",)).run()


def test_what_ships_trained_takes_part_untrained_or_not_at_all(
    benchmarks: tuple[Any, Any], tmp_path: Path
) -> None:
    _, policies = benchmarks
    made = policies.Policies(trained=(), untrained=("linucb", "rotting", "ucb1:c=0.2", "masked_random"))
    specs = {entry.name: entry.spec for entry in made.entries()}
    assert specs == {
        "linucb": "linucb:untrained", "rotting": "rotting:untrained", "ucb1:c=0.2": "ucb1:c=0.2",
        "masked_random": "masked_random", "best_of_n": "best_of_n",
    }  # fmt: skip
    with pytest.raises(UserError, match="made from the trained rotting that ships"):
        policies.Policies(untrained=("rotting:c=1",)).entries()
    with pytest.raises(UserError, match="linucb takes part twice"):
        policies.Policies(untrained=("linucb", "linucb:untrained"), ablations=False).run()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        policies.Policies(out=tmp_path / "file").run()


def test_every_ablation_has_a_name_of_its_own(benchmarks: tuple[Any, Any]) -> None:
    _, policies = benchmarks
    names = [entry.name for entry in (*policies.Policies().entries(), *policies.ablations())]
    assert len(names) == len({*names})
    kinds = (
        "mask of the bottleneck soft",
        "mask of the bottleneck hard",
        "context off",
        "prior off",
        "reward best",
    )
    assert all(any(kind in name for name in names) for kind in kinds)
