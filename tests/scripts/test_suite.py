"""The suite benchmark counts every task, and mixes no rows of other settings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ke_gym.errors import UserError


@pytest.fixture
def suite(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("suite")


def row(suite: Any, task: str = "softmax", speedup: float = 2.0, **changes: Any) -> Any:
    made = suite.Row(
        task, "norm", 60, 1.0, 30.0, True, 1.0, 1.0 / speedup, speedup, (0.9 * speedup, 1.1 * speedup), 1.0,
        {"compile": 1.5, "max-autotune": 3.0}, "folder",
    )  # fmt: skip
    return replace(made, **changes)


def failed(suite: Any, task: str) -> Any:
    return row(
        suite, task, 1.0, best_ms=None, reference_ms=None, speedup_ci=(1.0, 1.0), over={}, seed_correct=False
    )


def test_a_faster_kernel_is_delivered_and_a_slower_one_is_not(suite: Any) -> None:
    faster = row(suite)
    assert faster.delivered("eager") == 2.0
    assert (faster.delivered("compile"), faster.delivered("max-autotune")) == (1.5, 3.0)
    assert faster.compiled == 1.5
    slower = row(suite, speedup=0.5, over={"compile": 0.25, "max-autotune": 1.0})
    assert slower.delivered("eager") == 1.0  # eager stays, and compilers are held against that
    assert (slower.delivered("compile"), slower.delivered("max-autotune")) == (0.5, 2.0)
    assert slower.compiled == 0.5


def test_a_task_without_a_kernel_counts_as_one_everywhere(
    suite: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    none = failed(suite, "median")
    assert [none.delivered(name) for name in ("eager", "compile", "max-autotune")] == [1.0, 1.0, 1.0]
    assert none.compiled == 1.0
    rows = [row(suite), row(suite, "gelu", 8.0, over={"compile": 6.0, "max-autotune": 4.0}), none]
    suite.report(rows)
    lines = capsys.readouterr().out.splitlines()
    (overall,) = (line for line in lines if line.split()[1:2] == ["all"])
    means = {"eager": "2.52x (2.00x)", "compile": "2.08x (1.50x)", "max-autotune": "2.29x (3.00x)"}
    for shown in means.values():
        assert shown in overall
    assert "1.82x (1.50x)" in overall  # the better compiler: 1.5, 4 and 1
    assert any(line.startswith("... over the better torch.compile: 1.82x") for line in lines)
    assert any(line.startswith("tasks whose first candidate fails: median") for line in lines)


def test_without_compilers_nothing_is_said_of_them(suite: Any, capsys: pytest.CaptureFixture[str]) -> None:
    suite.report([row(suite, over={}), failed(suite, "median")])
    printed = capsys.readouterr().out
    assert "over the better" not in printed and "1.41x (1.50x)" in printed


def test_a_refused_task_is_a_row_and_the_suite_goes_on(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise UserError("torch.export refused it")

    monkeypatch.setattr(suite, "optimize", refused)
    suite.Suite(("softmax", "layer_norm"), out=tmp_path).run()
    rows = [json.loads(line) for line in (tmp_path / "suite.jsonl").read_text().splitlines()]
    assert [(r["task"], r["speedup"], r["seed_correct"]) for r in rows] == [
        ("softmax", 1.0, False),
        ("layer_norm", 1.0, False),
    ]
    assert "softmax: torch.export refused it" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"budget": 20}, {"seed": 1}, {"policy": "uct"}])
def test_rows_of_other_settings_are_refused(suite: Any, tmp_path: Path, other: dict[str, Any]) -> None:
    (tmp_path / "suite.jsonl").write_text(json.dumps(asdict(row(suite))) + "\n")
    with pytest.raises(UserError, match=f"measured with --{next(iter(other))}"):
        suite.Suite(("softmax",), out=tmp_path, **other).run()


def test_rows_from_before_settings_were_kept_are_the_defaults(
    suite: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {k: v for k, v in asdict(row(suite)).items() if k not in ("target", "budget", "policy", "seed")}
    (tmp_path / "suite.jsonl").write_text(json.dumps(old) + "\n")
    suite.Suite(("softmax",), out=tmp_path).run()  # nothing is done again
    assert "1/1 softmax: 2.00x eager, 1.50x compile" in capsys.readouterr().out


@pytest.fixture
def two_gpus(suite: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Two GPUs whose lanes are this process; what was searched for, and for how many seconds at the most."""
    searched: list[tuple[str, float]] = []

    def optimize(task: Any, *, watch: Any, target: str, language: str, **options: Any) -> Any:
        assert (target, language) == ("cuda", "cuda")
        searched.append((task.name, watch._end - time.monotonic()))
        if task.name == "conv1d":
            raise RuntimeError("the device fell off the bus")
        cut = task.name == "softmax" and len(searched) < 4
        return SimpleNamespace(
            evaluations=8 if cut else 60, valid=1.0, seed_correct=True, reference_ms=3.0, best_ms=1.0, speedup=3.0,
            speedup_ci=(2.9, 3.1), kernel_coverage=1.0, run_dir=Path("kept"), floor_ms=0.5,
            refused={"compile": 1, "no gain": 5}, stopped="seconds" if cut else "evaluations", seconds=0.0,
            time={"racing": (4.0, 8), "building": (16.0, 8)},
        )  # fmt: skip

    def spread(function: Any, jobs: Any, shares: Any, until: float) -> Any:
        assert len(shares) == 8
        for job in jobs:
            try:
                yield job, function(job), None
            except RuntimeError as error:
                yield job, None, error

    monkeypatch.setattr(suite.lanes, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(suite.lanes, "spread", spread)
    monkeypatch.setattr(suite, "optimize", optimize)
    return searched


def test_on_gpus_long_tasks_come_first_and_what_was_cut_goes_on(
    suite: Any, two_gpus: list[tuple[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = suite.Suite(
        ("softmax", "conv1d", "matmul_skinny"), "cuda", "cuda", seconds=400, compilers=False, out=tmp_path
    )
    made.run()
    assert [name for name, _ in two_gpus] == ["matmul_skinny", "conv1d", "softmax"]
    assert all(0 < seconds <= 400 - suite.RESERVED_SECONDS for _, seconds in two_gpus)
    printed = capsys.readouterr().out
    assert "conv1d: the device fell off the bus" in printed
    assert "not finished in time, run it again: softmax conv1d" in printed
    assert "3.00x of 2 tasks" in printed and "max-autotune" not in printed
    kept = [json.loads(line)["refused"] for line in (tmp_path / "suite.jsonl").read_text().splitlines()]
    assert kept == [{"compile": 1, "no gain": 5}] * 2
    made.run()  # what is there is not done again
    assert [name for name, _ in two_gpus][3:] == ["softmax", "conv1d"]  # what was begun first
    (last,) = [row for row in made._read().values() if row.task == "softmax"]
    assert (last.evaluations, last.cut) == (60, False)
    in_all = last.time.pop(suite.IN_ALL)
    assert last.time == {"racing": (8.0, 16), "building": (32.0, 16)} and in_all[1] == 2  # of both runs
    assert "where the time went" in capsys.readouterr().out


def test_nothing_begins_that_cannot_end_in_time(
    suite: Any, two_gpus: list[tuple[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite.Suite(("softmax",), "cuda", "cuda", seconds=40, out=tmp_path).run()
    assert not two_gpus and "no task was finished" in capsys.readouterr().out


def test_a_search_stops_when_its_time_is_over_however_long_it_took_to_open(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ke_gym.tasks import Task

    monkeypatch.setenv("KE_GYM_HOME", str(tmp_path / "home"))
    made = suite.Suite((), budget=50, compilers=False, out=tmp_path / "out")
    row = made._optimize(Task.load("row_sum"), None, time.monotonic() - 1)
    assert row.evaluations <= 1 and row.cut and row.stopped == "seconds"


def test_rows_whose_compilers_are_left_are_compared_and_no_more(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "best.py").write_text("def forward(x):\n    return x\n")
    half = row(suite, target="cuda", over={"compile": 1.5}, stopped="evaluations")
    (tmp_path / "suite.jsonl").write_text(json.dumps(asdict(half)) + "\n")
    compiled: list[str] = []

    class Opened:
        account = SimpleNamespace(spent=lambda: {"racing": (1.0, 1)}, add=lambda *_: None)

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def compile_baseline(self, baseline: str) -> None:
            compiled.append(baseline)

        def race_baseline(self, _: Any) -> tuple[float, tuple[float, float]]:
            return 2.5, (2.4, 2.6)

    monkeypatch.setattr(suite, "open_evaluator", lambda *_: Opened())
    monkeypatch.setattr(suite, "optimize", None)
    from ke_gym.tasks import Task

    done = suite.Suite((), "cuda", out=tmp_path).finish(Task.load("softmax"))
    assert compiled == ["max-autotune"]
    assert done.over == {"compile": 1.5, "max-autotune": 2.5}
    assert done.over_ci == {"max-autotune": (2.4, 2.6)}
    assert suite.Suite((), "cuda", out=tmp_path)._read() == {"softmax": done}
    assert done.time["racing"] == (1.0, 1) and suite.IN_ALL in done.time
    assert suite.Suite((), "cuda", out=tmp_path)._finished(done)


def test_a_compiler_that_fails_counts_for_nothing(
    suite: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Any:
        with suite.compiling():
            raise UserError("it took too long")

    def lost() -> Any:
        raise UserError("the device is gone")

    made = suite.Suite((), "cuda", out=tmp_path)
    done = made._with(row(suite, target="cuda", over={"compile": 1.5}), "max-autotune", fails)
    assert done.uncompiled == {"max-autotune": "it took too long"} and done.over == {"compile": 1.5}
    again = row(suite, target="cuda", over={"compile": 1.5})
    assert made._with(again, "max-autotune", lost) == again and not made._finished(again)
    assert made._finished(done) and made._read() == {"softmax": done}
    other = row(suite, "gelu", target="cuda", over={"compile": 2.0, "max-autotune": 3.0})
    capsys.readouterr()
    suite.report([done, other], 1.0)
    printed = capsys.readouterr().out
    assert "failed" in printed and "max-autotune-no-cudagraphs: 3.00x of 1 tasks" in printed


def test_on_gpus_the_report_names_what_stays_behind_a_library(
    suite: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row(suite, target="cuda", over={"compile": 1.4, "max-autotune": 1.5}),
        row(suite, "matmul_skinny", 1.2, target="cuda", over={"compile": 0.5, "max-autotune": 0.6}),
        row(suite, "cumsum", target="cuda", over={}),  # its races against the compiler are still to come
        row(
            suite,
            "swiglu",
            2.0,
            target="cuda",
            over={"compile": 0.9991},
            over_ci={"compile": (0.9975, 1.0006)},
        ),
    ]
    suite.report(rows, 123.0)
    printed = capsys.readouterr().out
    assert "max-autotune-no-cudagraphs: 0.95x of 2 tasks" in printed
    assert "below the best library path: matmul_skinny (0.500x) swiglu (0.999x [0.998, 1.001])" in printed
    assert "evaluations a minute: 123" in printed and "pointwise over eager" not in printed


def test_a_search_that_is_interrupted_ends_the_suite_and_goes_on_later(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(task: Any, **options: Any) -> Any:
        return SimpleNamespace(
            evaluations=60, valid=1.0, seed_correct=True, reference_ms=3.0, best_ms=1.0, speedup=3.0,
            speedup_ci=(2.9, 3.1), kernel_coverage=1.0, run_dir=Path("kept"), floor_ms=0.5, refused={},
            stopped="interrupted", seconds=90.0, time={},
        )  # fmt: skip

    monkeypatch.setattr(suite, "optimize", interrupted)
    made = suite.Suite(("softmax", "layer_norm"), out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    (kept,) = made._read().values()
    assert kept.task == "softmax" and kept.cut and not made._finished(kept)
    assert kept.per_minute == pytest.approx(40)  # of all its processes


class Interrupted(BaseException):
    pass


def test_a_search_that_was_ended_goes_on_where_it_was(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ke_gym import job
    from ke_gym.evaluation.evaluation import Evaluation
    from ke_gym.evaluation.evaluator import Evaluator
    from ke_gym.tasks import Task

    monkeypatch.setenv("KE_GYM_HOME", str(tmp_path / "home"))
    judged: list[str] = []

    def evaluate(self: Evaluator, candidate: Any, incumbent: Any = None) -> Any:
        if len(judged) == 2:
            raise Interrupted  # as if the process had been ended
        judged.append(candidate.id)
        return Evaluation(
            self.task.name, "cpu", candidate.language, candidate.id, "correct", time_ms=1.0, reference_ms=2.0,
            speedup=2.0, speedup_ci=(1.9, 2.1), improved=incumbent is None,
        )  # fmt: skip

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    monkeypatch.setattr(job, "remembering", lambda store, setting, evaluator: evaluator.evaluate)
    made = suite.Suite((), budget=3, compilers=False, out=tmp_path / "out")
    with pytest.raises(Interrupted):
        made.finish(Task.load("row_sum"))
    first = list(judged)
    judged[:] = [""] * 3  # never interrupted again
    assert made._judged(Task.load("row_sum"), None) == 2  # so many are not counted as this run's
    row = made.finish(Task.load("row_sum"))
    assert row.evaluations == 3 and len(list((tmp_path / "out").glob("*/run.json"))) == 1
    again = [name for name in judged[3:-1] if name in first]  # the last is the winner, measured once more
    assert len(again) <= 1  # what was under way when it was ended, perhaps; what was told never
