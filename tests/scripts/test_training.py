"""record.py, train.py and compare.py, from the first argument to the files they leave."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ke_gym import envs, policies
from ke_gym.envs.recording import Breadth
from ke_gym.envs.table import Table
from ke_gym.errors import UserError
from tests.envs.recorded import NARROW, search, tables
from tests.scripts.command import ROOT, here

TASK = """
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


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(table_folder: Path) -> Path:
    return table_folder


def test_a_policy_is_trained_and_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, compare = script("train"), script("compare")
    out = tmp_path / "linucb.json"
    arguments: dict[str, Any] = {
        "policy": "linucb", "tasks": (str(folder / "rms_norm.npz"),), "out": out,
        "validation": (str(folder / "softmax.npz"),), "steps": 60, "horizon": (10,),
    }  # fmt: skip
    assert train.main(train.Args(**arguments)) == 0
    said = capsys.readouterr().out
    assert "validation AUC" in said and "policy: " in said
    assert policies.load(out).trained_on["steps"] in range(10, 61, 10)
    with pytest.raises(UserError, match="softmax: both to learn"):
        train.main(
            train.Args(**{**arguments, "env": "live", "tasks": ("softmax",), "out": tmp_path / "b.json"})
        )
    with pytest.raises(UserError, match="both to learn from and to validate on"):
        train.main(train.Args(**{**arguments, "validation": (str(folder),), "out": tmp_path / "b.json"}))
    both = compare.Args((str(out),), (str(folder),), budget=10, seeds=3, out=tmp_path / "c", wandb="offline")
    assert compare.main(both) == 0
    assert "linucb" in capsys.readouterr().out
    data = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert {score["policy"] for score in data["scores"]} == {"linucb", "masked_random", "best_of_n"}
    assert data["seen_in_training"] == {"linucb": ["rms_norm", "softmax"]} and "No verdict" in data["verdict"]
    assert data["fewer_drafts_than_budget"] == {t.task: len(t.drafts) for t in tables() if len(t.drafts) < 10}
    assert compare.labels(["linucb", str(out), "x/ucb1.json"]) == {
        "linucb": "linucb", str(out): str(out), "x/ucb1.json": "ucb1",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "c").iterdir()} >= {"index.html", "curves.png", "wandb"}


def test_comparisons_of_single_tasks_pool_to_the_comparison_of_all(folder: Path, tmp_path: Path) -> None:
    compare = script("compare")
    compared = {"budget": 10, "seeds": 3}
    names = [table.task for table in tables()]
    assert compare.main(compare.Args(("ucb1",), (str(folder),), **compared, out=tmp_path / "all")) == 0
    parts = tuple(tmp_path / name for name in names)
    for name, part in zip(names, parts):
        try:
            compare.main(compare.Args(("ucb1",), (str(folder / f"{name}.npz"),), **compared, out=part))
        except UserError as error:  # one task may tell nothing; what was measured is kept
            assert "separate no policies" in str(error)
    assert compare.main(compare.Args(pool=parts, out=tmp_path / "pooled")) == 0

    def scores(where: str) -> dict[str, float]:
        data = json.loads((tmp_path / where / "compare.json").read_text())
        return {score["policy"]: score["auc"]["value"] for score in data["scores"]}

    assert scores("pooled") == pytest.approx(scores("all"), abs=1e-3)
    with pytest.raises(UserError, match="occurs in more than one"):
        compare.main(compare.Args(pool=(parts[0], parts[0]), out=tmp_path / "d"))
    with pytest.raises(UserError, match="no finished comparison"):
        compare.main(compare.Args(pool=(tmp_path / "nowhere",), out=tmp_path / "d"))
    with pytest.raises(UserError, match="name the --policies"):
        compare.main(compare.Args(out=tmp_path / "d"))


def test_live_comparisons_end_with_the_runs_that_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare, opened = script("compare"), []

    def make(env_id: str, **arguments: Any) -> Any:
        opened.append(arguments["store"])
        return envs.make(env_id, **arguments, **NARROW)

    monkeypatch.setattr(compare, "make", make)
    arguments: dict[str, Any] = {"policies": ("ucb1",), "env": "live", "budget": 6, "seeds": 3}
    with suppress(UserError):  # so few evaluations may tell nothing; what was measured is kept
        compare.main(compare.Args(**arguments, tasks=("softmax",), out=tmp_path / "one"))
    assert len(opened) == 3 == len({*opened}), "one environment for each policy, whatever the seed"
    data = json.loads((tmp_path / "one" / "compare.json").read_text())
    assert data["runs"] == 3 and all(len(runs) == 3 for runs in data["episodes"].values())

    rounds, play = [], compare.play

    def interrupted(*arguments: Any, **options: Any) -> Any:
        rounds.append(options["seed"])
        if options["seed"] == 2:
            raise KeyboardInterrupt
        return play(*arguments, **options)

    monkeypatch.setattr(compare, "play", interrupted)
    both = ("softmax", "rms_norm")
    with suppress(UserError):
        compare.main(compare.Args(**arguments, tasks=both, out=tmp_path / "two"))
    assert "stopped after 2 of 3 runs" in capsys.readouterr().out
    data = json.loads((tmp_path / "two" / "compare.json").read_text())
    assert data["runs"] == 2 and data["tasks"] == [*both]
    assert len(opened) == 3 + len(rounds), "of several tasks, each search has its own"


@pytest.mark.usefixtures("steady_clock")
def test_live_searches_are_recorded_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KE_GYM_HOME", str(tmp_path))
    record = script("record")
    (tmp_path / "small.py").write_text(TASK)
    arguments: dict[str, Any] = {
        "tasks": (str(tmp_path / "small.py"),), "out": tmp_path / "out", "breadth": Breadth(1, 1, 1, 1, 2), "threads": 1,
    }  # fmt: skip
    assert record.main(record.Args(**arguments, budget=1)) == 0
    table = Table.load(tmp_path / "out" / "small.npz")
    assert len(table) == 1 and table.correct.all()
    assert len(table.repeats) >= 2 and (table.times > 0).all()
    assert table.surroundings.task.any() and table.surroundings.hardware.any() and table.code.any()
    first = int(table.drafts[0])
    assert table.costs[first].sum() > 0 and table.machine


def test_stores_become_tables_and_tables_are_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ke_gym.search.store import Store

    record = script("record")
    with Store(tmp_path / "s.db") as store:
        search(store, "softmax", Breadth(2, 2, 1, 1))
        search(store, "rms_norm", Breadth(2, 2, 1, 1))
    assert record.main(record.Args(sources=(tmp_path / "s.db",), out=tmp_path / "t")) == 0
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"softmax.npz", "rms_norm.npz"}
    assert record.main(record.Args((str(tmp_path / "t"),), verify=True)) == 0
    said = capsys.readouterr().out
    assert "coverage" in said and "validation" in said and "train" in said
    (tmp_path / "t" / "softmax.npz").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be read"):
        record.main(record.Args((str(tmp_path / "t"),), verify=True))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("record", (), "name at least one task"),
        ("train", ("--policy", "maskable_pop"), "maskable_ppo"),
        ("compare", ("--policies", "linucv"), "linucb"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    done = here(name, *arguments, home=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line


def test_a_resumed_training_validates_as_often_as_before(folder: Path, tmp_path: Path) -> None:
    train = script("train")
    arguments: dict[str, Any] = {
        "policy": "ucb1", "tasks": (str(folder / "rms_norm.npz"),), "out": tmp_path / "u.json",
        "validation": (str(folder / "softmax.npz"),), "horizon": (10,),
    }  # fmt: skip
    assert train.main(train.Args(**arguments, steps=60)) == 0
    assert train.main(train.Args(**arguments, steps=80, resume=True)) == 0
    assert policies.load(tmp_path / "u.json").trained_on["steps"] <= 80
    state = json.loads((tmp_path / "u" / "state.json").read_text())
    assert state["steps"] == 80 and state["plan"]["every"] == 3
    with pytest.raises(UserError, match="has every = 3"):
        train.main(train.Args(**arguments, steps=99, every=7, resume=True))


def test_what_cannot_be_written_is_said_before_the_work(folder: Path, tmp_path: Path) -> None:
    train, compare = script("train"), script("compare")
    (tmp_path / "file").touch()
    for out in ("noext", "x.pt"):
        with pytest.raises(UserError, match=r"ends in \.json"):
            train.main(train.Args("ucb1", out=tmp_path / out))
    for path in (tmp_path / "file" / "x.json", Path("/proc/x.json")):
        with pytest.raises(UserError, match=r"cannot be written|cannot be made"):
            train.main(train.Args("ucb1", tasks=(str(folder),), validation=(), out=path))
    for path in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(UserError, match="cannot be written"):
            compare.main(compare.Args(("ucb1",), (str(folder),), out=path))


def test_comparisons_to_pool_are_neither_overwritten_nor_damaged(folder: Path, tmp_path: Path) -> None:
    compare, one = script("compare"), tmp_path / "one"
    assert compare.main(compare.Args(("ucb1",), (str(folder),), budget=6, seeds=2, out=one)) == 0
    file = one / "compare.json"
    whole = file.read_text()
    with pytest.raises(UserError, match="is one of the comparisons to pool"):
        compare.main(compare.Args(pool=(one,), out=tmp_path / "x" / ".." / "one"))
    assert file.read_text() == whole
    cut = json.loads(whole)
    del cut["episodes"]["ucb1"][0][0]["curve"]
    short = json.loads(whole)
    short["episodes"]["ucb1"][1].pop()
    for text, words in (
        ("3", "is no comparison"),
        (json.dumps(cut), "curve"),
        (json.dumps(short), "not one search"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            compare.main(compare.Args(pool=(one,), out=tmp_path / "p"))


def test_live_tasks_are_compared_once_and_recognized_by_name(tmp_path: Path) -> None:
    compare = script("compare")
    from ke_gym.tasks.loader import LIBRARY

    path = str(LIBRARY / "softmax.py")
    args = compare.Args(env="live", tasks=("softmax", path))
    assert [task.name for task in compare.live_tasks(args)] == ["softmax"]
    old = policies.make("ucb1")
    old.trained_on = {"env": "live", "tables": {}, "tasks": [path], "validated_on": []}
    assert compare.seen_in_training(args, {"old": old}) == {"old": ["softmax"]}


def test_a_recording_that_is_interrupted_at_once_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = script("record")

    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    for search_ in (lambda *_: "interrupted", interrupted):
        monkeypatch.setattr(record, "search", search_)
        assert record.main(record.Args(("softmax",), out=tmp_path / "t")) == 130
        assert capsys.readouterr().out.startswith("interrupted before anything of softmax was recorded")


def test_arguments_that_do_not_fit_are_named(tmp_path: Path) -> None:
    train, compare, record = script("train"), script("compare"), script("record")
    with pytest.raises(UserError, match="live training needs --tasks"):
        train.main(train.Args(env="live", out=tmp_path / "a.json"))
    with pytest.raises(UserError, match="steps = 0"):
        train.main(train.Args(steps=0, out=tmp_path / "a.json"))
    for name in ("n_envs", "every"):
        with pytest.raises(UserError, match=f"{name} = 0"):
            train.main(train.Args(**{name: 0}, out=tmp_path / "a.json"))
    with pytest.raises(UserError, match="seed = -1"):
        train.main(train.Args(seed=-1, out=tmp_path / "a.json"))
    with pytest.raises(UserError, match="seed = -1"):
        record.main(record.Args(("softmax",), seed=-1, out=tmp_path / "t"))
    with pytest.raises(UserError, match="have to be positive"):
        compare.main(compare.Args(("ucb1",), seeds=0))
    with pytest.raises(UserError, match="there is no replay table 'nothing'"):
        compare.main(compare.Args(("ucb1",), ("nothing",), out=tmp_path))
    with pytest.raises(UserError, match="records nothing"):
        record.Args(("softmax",), breadth=Breadth(width=0))
