"""The drafts benchmark: what it builds is the same each time, a form that hangs costs itself, nothing is done twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ke_gym.codegen.program import Program
from ke_gym.errors import UserError
from ke_gym.languages.artifact import Artifact
from ke_gym.tasks import Task
from tests.scripts.command import in_process

FACTS = SimpleNamespace(arch="sm_90", cores=132, model="a GPU")


@pytest.fixture
def drafts(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("drafts")


@pytest.fixture
def forms(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("forms")


@pytest.fixture(scope="module")
def task() -> Task:
    rms_norm = Task.load("rms_norm")
    return replace(rms_norm, shapes={"gpu": rms_norm.shapes["ragged"]})


def row(drafts: Any, task: str, **known: Any) -> Any:
    return drafts.Row(task, "triton", 8, **known)


def measured(drafts: Any, task: str, us: float) -> Any:
    return row(
        drafts, task, built=9, failed={"draft 3": "refused"}, eager_us=80.0, compiled_us=2 * us, best_us=us,
        best="variant 2", knobs="0.rows=4", error=1.5e-7, over_eager=80 / us, over_compiled=2.0, device="H200",
    )  # fmt: skip


def answers(job: Any) -> Any:
    """Runs in the process that would have the GPU: each form takes as many microseconds as its knobs say."""
    from benchmarks.forms import Failed
    from benchmarks.trials import Raced

    labels = [form.label for form in job.forms]
    if "hangs" in labels or ("hangs in the race" in labels and job.what == "race"):
        time.sleep(600)
    if "dies" in labels:
        os._exit(1)
    if "refused" in labels:
        raise Failed("too much shared memory")
    times = [float(form.knobs or 10.0) for form in job.forms]
    match job.what:
        case "race":
            return [Raced(us, 20.0, 20.0 / us) for us in times]
        case "look":
            return (0.3, None) if labels == ["wrong"] else (1e-6, times[0])
    return 40.0 if job.what == "eager" else 21.0


@pytest.fixture
def bench(drafts: Any) -> Iterator[Callable[..., Any]]:
    lane = drafts.lanes.Lane(drafts.lanes.shares(["0"])[0])

    def made(**options: Any) -> Any:
        return drafts.Bench(lane, answers=answers, **options)

    with lane:
        yield made


def test_variants_are_the_same_each_time_and_none_is_another_s(forms: Any, task: Task) -> None:
    program = Program.for_language(task, "triton")
    once, again = (forms.forms(program, 6) for _ in range(2))
    assert once == again and len(set(once.values())) == len(once)
    assert [label for label in once if "variant" in label] == [f"variant {k}" for k in range(6)]
    fewer = forms.forms(program, 2)
    assert fewer.items() <= once.items() and len(fewer) == len(once) - 4


@pytest.mark.parametrize("language", ["triton", "cuda"])
def test_forms_become_device_code_where_there_is_no_gpu(forms: Any, task: Task, language: str) -> None:
    packed = task.to_bytes()
    first = forms.build_form(forms.Recipe(packed, 0, language, 1))
    assert first.label == "draft 0" and Artifact.from_bytes(first.artifact).arch == "sm_90a"
    drafted = len(forms.forms(Program.for_language(task, language), 0))
    varied = forms.build_form(forms.Recipe(packed, drafted, language, 1))
    assert varied.label == "variant 0" and varied.knobs.startswith("0.") and varied.artifact != first.artifact
    assert forms.build_form(forms.Recipe(packed, drafted + 1, language, 1)) is None
    with pytest.raises(forms.Failed, match="kernels are generated in"):
        forms.build_form(forms.Recipe(packed, 0, "fortran", 1))


@pytest.fixture
def without_gpu(drafts: Any, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is none: the processes are real, what they say of times is made up."""

    class Lane(drafts.lanes.Lane):  # type: ignore[misc]
        def run(self, function: Any, *arguments: Any) -> Any:
            return FACTS if function is drafts.cuda.facts else super().run(function, *arguments)

    bench = drafts.Bench
    monkeypatch.setattr(drafts.lanes, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(drafts.lanes, "Lane", Lane)
    monkeypatch.setattr(drafts, "Bench", lambda lane, end: bench(lane, end, answers))
    monkeypatch.setattr(drafts, "answer", answers)
    monkeypatch.setattr(drafts, "COMPILERS", 1)
    monkeypatch.setattr(drafts, "DRAFTS", 2)
    monkeypatch.setattr(drafts.tasks, "resolve", lambda spec: [replace(task, name=spec)])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back at the end


def test_from_task_to_table_with_made_up_times(
    drafts: Any, without_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = drafts.Drafts(("rms_norm",), variants=0, seconds=600, out=tmp_path / "new" / "drafts.jsonl")
    made.run()
    kept = json.loads(made.out.read_text())
    assert (kept["best"], kept["built"], kept["left"], kept["failed"]) == ("draft 0", 2, 0, {})
    assert "1/1 rms_norm: 10.0 us (draft 0), 4.00x eager, 2.00x compiled" in capsys.readouterr().out
    made.run()  # what is there is not done again
    assert json.loads(made.out.read_text()) == kept


def test_what_was_not_built_in_time_is_said_and_done_again(
    drafts: Any, without_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = replace(measured(drafts, "gelu", 20.0), left=2, compiled_us=None, over_compiled=None)
    known = [replace(measured(drafts, "softmax", 10.0), left=3), late]
    out = tmp_path / "drafts.jsonl"
    out.write_text("".join(json.dumps(asdict(one)) + "\n" for one in known) + '{"task": "cut o')
    drafts.Drafts(("softmax", "gelu", "median"), seconds=0, out=out).run()
    printed = capsys.readouterr().out
    assert "not finished in time, run it again: gelu median" in printed
    assert "geometric mean over eager: 5.66x of 2 tasks" in printed  # 8 and 4
    assert out.read_text().count("\n") == 2


@pytest.mark.parametrize("other", [{"language": "cuda"}, {"variants": 3}])
def test_rows_of_other_settings_are_refused(
    drafts: Any, without_gpu: None, tmp_path: Path, other: dict[str, Any]
) -> None:
    out = tmp_path / "drafts.jsonl"
    out.write_text(json.dumps(asdict(measured(drafts, "softmax", 10.0))) + "\n")
    with pytest.raises(UserError, match=f"measured with --{next(iter(other))}"):
        drafts.Drafts(("softmax",), out=out, **other).run()


def built(drafts: Any, forms: Any, **known: str) -> Any:
    ready = {label: forms.Form(label.replace("_", " "), knobs, b"") for label, knobs in known.items()}
    return drafts.Built(0, {**ready, drafts.REFERENCE: None})


def test_a_form_that_hangs_or_dies_costs_only_itself(drafts: Any, forms: Any, task: Task, bench: Any) -> None:
    ready = built(
        drafts,
        forms,
        dies="2",
        hangs="1",
        hangs_in_the_race="2",
        refused="3",
        right="8",
        slower="9",
        wrong="1",
    )
    row = drafts.Drafts().measure(task, ready, bench(patience=1.5))
    assert row.failed == {
        "dies": "the process for GPU 0 died",
        "hangs": "hung, no answer within 2 s",
        "hangs in the race": "hung, no answer within 2 s",
        "refused": "too much shared memory",
    }
    assert row.wrong == {"wrong": 0.3}
    assert (row.built, row.best, row.best_us, row.over_eager, row.over_compiled) == (
        7,
        "right",
        8.0,
        5.0,
        2.5,
    )


def test_without_a_compiled_reference_the_best_is_the_fastest_by_itself(
    drafts: Any, forms: Any, task: Task, bench: Any
) -> None:
    ready = built(drafts, forms, one="8", two="4")
    del ready.ready[drafts.REFERENCE]
    row = drafts.Drafts().measure(task, ready, bench())
    assert (row.best, row.over_eager, row.compiled_us, row.over_compiled) == ("two", 10.0, None, None)


def test_nothing_goes_on_when_the_time_is_over(drafts: Any, forms: Any, task: Task, bench: Any) -> None:
    with pytest.raises(drafts.Over):
        drafts.Drafts().measure(task, built(drafts, forms, hangs="1"), bench(end=time.monotonic()))


def test_a_row_is_finished_if_forms_met_the_compiled_reference_or_were_refused(drafts: Any) -> None:
    assert measured(drafts, "gelu", 20.0).finished
    assert row(drafts, "gelu", failed={"eager": "out of memory"}).finished
    assert row(drafts, "gelu", built=1, left=9, failed={drafts.REFERENCE: "refused"}).finished
    assert not row(drafts, "gelu", built=9, left=1, eager_us=9.0).finished  # the reference is late
    assert not row(drafts, "gelu", left=9, eager_us=9.0, compiled_us=8.0).finished  # all forms are


def test_the_report_has_a_line_per_task_and_means_of_those_with_a_kernel(
    drafts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    none = row(drafts, "median", built=1, wrong={"draft 0": 0.5}, eager_us=9.0)
    drafts.report([measured(drafts, "softmax", 10.0), measured(drafts, "gelu", 20.0), none])
    printed = capsys.readouterr().out
    (softmax,) = (line for line in printed.splitlines() if line.split()[1:2] == ["softmax"])
    cells = [cell.strip() for cell in softmax.strip("│ ").split("│")]
    assert cells == [
        "softmax", "80.0", "20.0", "10.0", "variant 2", "0.rows=4", "1.5e-07", "8.00x", "2.00x", "9", "1", "0", "0",
    ]  # fmt: skip
    assert "geometric mean over eager: 5.66x of 2 tasks, nothing confirmed" in printed
    assert "max-autotune-no-cudagraphs: 2.00x of 2 tasks" in printed
    assert "tasks without a kernel: median" in printed and "H200; " in printed


def test_errors_are_relative_and_of_integers_the_share_that_differs(
    benchmark_module: Callable[[str], Any],
) -> None:
    relative = benchmark_module("trials").relative
    wanted = torch.tensor([3.0, 4.0, torch.inf])
    assert relative(wanted, wanted) == 0.0
    assert relative(wanted + torch.tensor([0.5, 0.0, 0.0]), wanted) == pytest.approx(0.1)
    assert relative(torch.full((3,), torch.nan), wanted) == torch.inf
    assert relative(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])) == 0.5


def test_tasks_are_also_operators_and_each_is_done_once(drafts: Any) -> None:
    chosen = drafts.Drafts(("softmax", "fm_40", "softmax"))._chosen()
    assert list(chosen) == ["softmax", "fm_40"]
    with pytest.raises(UserError, match="did you mean softmax"):
        drafts.Drafts(("sofmax",)).run()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = in_process("benchmark", "drafts", "softmax", home=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr.startswith("error: no NVIDIA GPU can be used here")
    assert not list(tmp_path.iterdir())
