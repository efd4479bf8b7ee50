from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ke_gym
from ke_gym import job
from ke_gym.errors import UserError
from ke_gym.evaluation import evaluator
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.job import read_run
from ke_gym.knowledge.learned import Lesson, distill
from ke_gym.search.run import Watch
from ke_gym.search.session import Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Node
from ke_gym.tasks import Task
from ke_gym.tasks.loader import built_in

pytestmark = pytest.mark.usefixtures("steady_clock")


class Chain(nn.Module):
    """Seven passes over memory in eager mode, one in a generated kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.scale + 1.0
        return torch.sigmoid(y) * torch.tanh(y) - 0.5 * y * y


class StopAfter(Watch):
    def __init__(self, count: int) -> None:
        self.count = count

    def told(self, session: Session, node: Node, improved: bool) -> None:
        seen = session.situation().observation
        assert all(seen[part].any() for part in ("task", "hardware", "code", "profile"))
        if len(session.tree) == self.count:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    patch.setenv("KE_GYM_HOME", str(home))
    return home


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``scripts/optimize.py``."""
    path = Path(__file__).parents[1] / "scripts" / "optimize.py"
    spec = importlib.util.spec_from_file_location("script_optimize", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def module() -> Chain:
    torch.manual_seed(0)
    return Chain().eval()


@pytest.fixture(scope="module")
def result(steady_clock: None, module: Chain, tmp_path_factory: pytest.TempPathFactory) -> ke_gym.Result:
    out = tmp_path_factory.mktemp("runs")
    example = torch.randn(512, 256)
    stopped = ke_gym.optimize(module, example, budget=3, out=out, watch=StopAfter(2))
    assert (stopped.stopped, stopped.evaluations) == ("interrupted", 2)
    return ke_gym.optimize(module, example, budget=3, resume=stopped.run_dir)


def test_three_lines_from_python(result: ke_gym.Result, module: Chain) -> None:
    assert result.evaluations == 3 and result.valid == 1.0
    assert result.kernel_coverage == 1.0
    x = torch.randn(512, 256)
    with torch.no_grad():
        torch.testing.assert_close(result.kernel(x), module(x))
        torch.testing.assert_close(result.kernel(x[:7]), module(x[:7]))
    assert sum(result.kernel.fallbacks.values()) >= 1


def test_what_a_search_taught_is_kept_beside_the_store(module: Chain, own_home: Path, tmp_path: Path) -> None:
    example = torch.randn(512, 256)
    made = ke_gym.optimize(module, example, budget=3, policy="round_robin", out=tmp_path)
    _, settings = read_run(made.run_dir)
    with Store(own_home / "store.db") as store:
        lessons = distill(settings.session, "chain", "user", store.nodes(settings.session))
    folder = own_home / "learned"
    kept = [row for path in folder.rglob("*.md") for row in Lesson.read(path, folder).evidence]
    mine = [row.tries for row in kept if row.session == settings.session]
    assert sum(mine) == sum(lesson.tries for lesson in lessons) > 0


def test_a_resumed_run_kept_what_was_paid_for(result: ke_gym.Result, own_home: Path) -> None:
    _, settings = read_run(result.run_dir)
    with Store(own_home / "store.db") as store:
        nodes = store.nodes(settings.session)
    assert len([node for node in nodes if node.evaluation is not None]) == 3


def test_the_run_folder_holds_kernel_artifact_result_and_report(result: ke_gym.Result) -> None:
    names = {path.name for path in result.run_dir.iterdir()}
    assert names == {"best.py", "artifact.bin", "result.json", "report.html", "run.json", "task.bin"}
    data = json.loads((result.run_dir / "result.json").read_text())
    assert data["speedup"] == result.speedup and data["evaluations"] == 3
    assert (result.run_dir / "best.py").read_text() == result.source


def test_the_report_is_one_page_that_needs_no_network(result: ke_gym.Result) -> None:
    page = result.report().read_text()
    assert not re.search(r"(src|href)\s*=|<script|@import|url\(", page)
    parts = (
        "Why it is faster", "Speedup so far", "Search tree", "Where it stands on this machine",
        "From the reference to the winner", "The winning kernel module", "Where the time goes", "What was tried",
        "How far to believe this",
    )  # fmt: skip
    for part in parts:
        assert f"<h2>{part}</h2>" in page
    assert page.count("<svg") == 3  # progress, tree, roofline
    assert "of the bandwidth measured at this size" in page  # why, from the profile


def test_when_nothing_is_faster_it_says_how_close_to_the_floor_the_reference_is(
    result: ke_gym.Result, module: Chain
) -> None:
    assert result.evaluation is not None
    slower = result.evaluation.replace(
        speedup=0.9, speedup_ci=(0.85, 0.95), reference_ms=0.5, time_ms=0.5 / 0.9
    )
    none = replace(result, evaluation=slower, floor_ms=0.4)
    assert not none.faster and none.speedup_ci == (0.85, 0.95)
    assert "nothing beats the reference (eager)" in none.verdict() and "0.90x [0.85, 0.95]" in none.verdict()
    assert (
        "floor for the task's bytes and FLOPs is 0.400 ms: it is at 80 % of what is possible"
        in none.verdict()
    )
    x = torch.randn(512, 256)
    with torch.no_grad():
        assert torch.equal(none.kernel(x), module(x))  # the reference itself
    unconfirmed = replace(result, evaluation=None, best=None, artifact=None)
    assert "no candidate was confirmed" in unconfirmed.verdict() and unconfirmed.speedup == 1.0
    failed = replace(unconfirmed, valid=0.0)
    assert "none of 3 candidates was correct; the reference stays" in failed.verdict()


class Proofs(Watch):
    def __init__(self) -> None:
        self.seen: list[Proof] = []

    def proved(self, task: Task, proof: Proof) -> None:
        self.seen.append(proof)


def own_task(folder: Path, name: str, forward: str) -> Path:
    """A task file with a tolerance that hides errors of almost any size."""
    path = folder / f"{name}.py"
    path.write_text(
        "import torch\ntolerance = 0.9\nclass Model(torch.nn.Module):\n"
        f"    def forward(self, x):\n        return {forward}\n"
        "def get_inputs():\n    return [torch.randn(64, 64)]\n"
    )
    return path


def test_a_module_of_ones_own_is_checked_before_the_search(result: ke_gym.Result) -> None:
    assert built_in(Task.load("softmax")) and not built_in(result.task)
    assert result.proof is not None and result.proof.ok and result.proof.mutants >= 5
    assert "Warning" not in result.verdict()
    assert "wrong versions of it are rejected" in result.report().read_text()


def test_a_task_that_lets_lesser_faults_through_is_searched_under_a_warning(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_task(tmp_path, "loose", "torch.tanh(x * 1.5)")
    seen = Proofs()
    weak = ke_gym.optimize(path, budget=1, out=tmp_path, watch=seen)
    assert weak.proof == seen.seen[0] and "skipped mul (0)" in weak.proof.survivors
    assert "Warning: the checks of loose accept wrong versions of it" in weak.verdict()
    assert "skipped mul (0)" in json.loads((weak.run_dir / "result.json").read_text())["proof"]["survivors"]
    assert "mutants survive: half precision, skipped mul" in weak.report().read_text()
    monkeypatch.setattr(evaluator, "prove", None)  # not to be called again
    assert script.main(script.Args(tasks=(str(path),), budget=1, out=tmp_path)) == 0
    assert (
        "loose task check: WARNING: mutants survive: half precision, skipped mul" in capsys.readouterr().out
    )


def test_a_task_that_lets_anything_through_is_refused(tmp_path: Path) -> None:
    path = own_task(tmp_path, "useless", "torch.zeros_like(x)")
    with pytest.raises(UserError, match=r"useless cannot judge a kernel: mutants survive: .*zeros"):
        ke_gym.optimize(path, budget=1, out=tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_cut_off_before_it_began_leaves_no_folder(
    module: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "open_evaluator", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ke_gym.optimize(module, torch.randn(512, 256), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_resumes_a_run_of_a_live_module_as_it_was(
    result: ke_gym.Result, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    others: tuple[dict[str, Any], ...] = (
        {"seed": 1}, {"policy": "uct"}, {"threads": 1}, {"baseline": "compile"}
    )  # fmt: skip
    for other in others:
        with pytest.raises(UserError, match=f"made with --{next(iter(other))} .* resumed as it was"):
            script.main(script.Args(resume=result.run_dir, **other))
    same = {"seed": 0, "policy": "epsilon_greedy", "target": "cpu", "proposer": "rewriter"}
    assert script.main(script.Args(resume=result.run_dir, budget=3, json=True, **same)) == 0
    (again,) = json.loads(capsys.readouterr().out)
    assert (again["task"], again["evaluations"]) == (result.task.name, 3)
    assert again["run_dir"] == str(result.run_dir)


def test_a_search_is_a_run_of_weights_and_biases(
    result: ke_gym.Result, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    told: dict[str, Any] = {"log": []}

    class Tracker(script.Tracker):  # type: ignore[name-defined,misc]
        def log(self, figures: dict[str, Any], step: int | None = None) -> None:
            told["log"].append((step, figures["best speedup"]))
            super().log(figures, step)

        def table(self, name: str, columns: tuple[str, ...], rows: list[list[Any]]) -> None:
            told[name] = [dict(zip(columns, row, strict=True)) for row in rows]
            super().table(name, columns, rows)

        def artifact(self, name: str, kind: str, path: Path) -> None:
            told[kind] = (name, path.read_text())
            super().artifact(name, kind, path)

    monkeypatch.setattr(script, "Tracker", Tracker)
    args = script.Args(resume=result.run_dir, budget=3, json=True, wandb="offline", out=tmp_path)
    assert script.main(args) == 0
    assert [step for step, _ in told["log"]] == [1, 2, 3]
    assert [row["number"] for row in told["candidates"]] == [0, 1, 2]
    assert all("def forward" in row["source"] for row in told["candidates"])
    name, source = told["kernel"]
    assert name == f"{result.task.name}-kernel" and source == (result.run_dir / "best.py").read_text()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))


def test_a_run_is_not_started_over_when_its_store_is_gone(
    result: ke_gym.Result, module: Chain, tmp_path: Path
) -> None:
    Store(tmp_path / "other.db").close()
    for number, store in enumerate(("missing.db", "other.db")):
        run_dir = tmp_path / str(number)
        shutil.copytree(result.run_dir, run_dir)
        settings = json.loads((run_dir / "run.json").read_text()) | {"store": str(tmp_path / store)}
        (run_dir / "run.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=f"{store} no longer holds its search"):
            ke_gym.optimize(module, torch.randn(512, 256), budget=4, resume=run_dir)
    assert not (tmp_path / "missing.db").exists()


def test_bad_input_is_refused_in_one_sentence(result: ke_gym.Result, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="example inputs"):
        ke_gym.optimize(Chain())
    with pytest.raises(UserError, match="buys nothing"):
        ke_gym.optimize("softmax", budget=0)
    with pytest.raises(UserError, match="seed = -1"):
        ke_gym.optimize("softmax", seed=-1)
    with pytest.raises(UserError, match="has changed or is not softmax"):
        ke_gym.optimize("softmax", resume=result.run_dir)
    with pytest.raises(UserError, match="not a run's folder"):
        ke_gym.optimize("softmax", resume=tmp_path)
    recorded = json.loads((result.run_dir / "run.json").read_text())
    for limits in ({"evaluations": -1}, {"euros": 5}, [60]):
        (tmp_path / "run.json").write_text(json.dumps(recorded | {"limits": limits}))
        with pytest.raises(UserError, match="is damaged"):
            ke_gym.optimize("softmax", resume=tmp_path)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version"):
        ke_gym.optimize("softmax", resume=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ke_gym.optimize("softmax", out=tmp_path / "file")


def test_what_was_refused_is_counted_by_reason() -> None:
    def node(outcome: str, improved: bool = False) -> SimpleNamespace:
        verdict = SimpleNamespace(outcome=outcome, improved=improved)
        return SimpleNamespace(correct=outcome == "correct", evaluation=verdict)

    judged = [node("correct", True), node("correct"), node("compile"), node("timeout"), node("compile")]
    counted = job.refused(SimpleNamespace(tree=judged))  # type: ignore[arg-type]
    assert counted == {"compile": 2, "no gain": 1, "timeout": 1}
