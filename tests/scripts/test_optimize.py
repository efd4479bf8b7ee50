from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from ke_gym.job import RunSettings, write_run
from ke_gym.search.store import NodeRecord, Store
from tests.machine import give_peaks
from tests.scripts.command import command, here, in_process

KEYS = {
    "task", "target", "baseline", "reference_ms", "best_ms", "speedup", "speedup_ci", "kernel_coverage",
    "evaluations", "valid", "seconds", "run_dir",
}  # fmt: skip

TASK = """
import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return torch.relu(x * x + 1.0) - x


def get_inputs():
    return [torch.randn(128, 256)]


def get_init_inputs():
    return []
"""
BODY = "return torch.relu(x * x + 1.0) - x"


@pytest.fixture(autouse=True)
def _peaks_given(tmp_path: Path) -> None:
    give_peaks(tmp_path)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "chain.py"
    path.write_text(TASK)
    return path


@pytest.mark.usefixtures("steady_clock")
def test_json_gives_one_object_per_task(tmp_path: Path, task: Path) -> None:
    done = here(
        "optimize", str(task), "--budget", "2", "--json", "--out", str(tmp_path / "runs"), home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert set(result) == KEYS
    assert (result["task"], result["evaluations"]) == ("chain", 2)
    assert Path(result["run_dir"], "report.html").exists()


@contextmanager
def foreground(home: Path, *words: str, stderr: int = subprocess.STDOUT) -> Iterator[subprocess.Popen[str]]:
    """A search that runs as a terminal's foreground group; nothing of it is left afterwards."""
    line, env = command("optimize", *words, home=home)
    child = subprocess.Popen(
        line, env=env, cwd=home, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whatever the tests were started with
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def interrupt(child: subprocess.Popen[str]) -> None:
    """Ctrl-C: the terminal sends it to the whole group."""
    os.killpg(child.pid, signal.SIGINT)


def lines_until(stream: IO[str] | None, start: str) -> list[str]:
    """The lines up to the first one that starts so."""
    assert stream is not None
    seen = []
    for line in stream:
        seen.append(line)
        if line.startswith(start):
            return seen
    raise AssertionError("".join(seen))


def test_ctrl_c_ends_with_what_was_found(tmp_path: Path, task: Path) -> None:
    with foreground(tmp_path, str(task), "--budget", "500") as child:
        lines_until(child.stdout, "chain 2/500")
        interrupt(child)
        rest, _ = child.communicate(timeout=600)
    assert child.returncode == 130, rest
    assert "Traceback" not in rest and "report:" in rest
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert json.loads((run_dir / "result.json").read_text())["stopped"] == "interrupted"


def test_ctrl_c_before_the_first_evaluation_leaves_nothing_behind(tmp_path: Path, task: Path) -> None:
    runs = tmp_path / "runs"
    with foreground(tmp_path, str(task), "--budget", "500") as child:
        while not list(runs.glob("*chain")):
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        interrupt(child)
        rest, _ = child.communicate(timeout=600)
    assert child.returncode == 130, rest
    assert "Traceback" not in rest
    assert all((run_dir / "run.json").exists() for run_dir in runs.glob("*chain"))


def test_ctrl_c_in_the_second_task_prints_the_first(tmp_path: Path, task: Path) -> None:
    (tmp_path / "zzz.py").write_text(TASK)
    words = (str(task), "zzz.py", "--budget", "1", "--json")
    with foreground(tmp_path, *words, stderr=subprocess.PIPE) as child:
        lines_until(child.stderr, "chain: ")  # the verdict on the first: the second begins
        interrupt(child)
        out, rest = child.communicate(timeout=600)
    assert child.returncode == 130, rest
    assert "Traceback" not in rest
    assert next(result["task"] for result in json.loads(out)) == "chain"


def recorded(home: Path, run_dir: Path) -> list[NodeRecord]:
    """The nodes of a run whose evaluation is in the store."""
    with Store(home / "store.db") as store:
        nodes = store.nodes(json.loads((run_dir / "run.json").read_text())["session"])
    return [node for node in nodes if node.evaluation is not None]


def test_kill_9_then_resume_continues_the_search(tmp_path: Path, task: Path) -> None:
    with foreground(tmp_path, str(task), "--budget", "3") as child:
        lines_until(child.stdout, "chain 1/3")
        child.kill()
    (run_dir,) = (tmp_path / "runs").iterdir()
    before = recorded(tmp_path, run_dir)
    assert before
    done = in_process("optimize", "--resume", str(run_dir), "--seed", "0", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "result.json").read_text())["evaluations"] == 3
    after = recorded(tmp_path, run_dir)
    assert len(after) == 3 and after[: len(before)] == before


BAD_INPUT = {
    "no task": ([], "name at least one task"),
    "unknown task": (["sofmax"], "softmax"),
    "unknown policy": (["softmax", "--policy", "epsilon_gredy"], "epsilon_greedy"),
    "unknown proposer": (["softmax", "--proposer", "rewritr"], "rewriter"),
    "unknown baseline": (["softmax", "--baseline", "sand"], "baseline"),
    "unknown target": (["softmax", "--target", "abacus"], "abacus"),
    "a GPU's language on a CPU": (
        ["softmax", "--language", "cuda"],
        "--language cuda is not for the target cpu",
    ),
    "unknown language": (["softmax", "--target", "cuda", "--language", "ptx"], "triton or cuda"),
    "negative seed": (["softmax", "bias_gelu", "--seed", "-1"], "seed = -1"),
    "a call that takes nothing": (["softmax", "--timeout", "nan"], "timeout = nan"),
    "budget of 0": (["softmax", "--budget", "0"], "buys nothing"),
    "too many threads": (["softmax", "--threads", "100000"], "cores"),
    "output not writable": (["softmax", "--out", "/proc/none"], "cannot be written"),
    "resume of no run": (["softmax", "--resume", "."], "not a run's folder"),
    "resume with another seed": (["--resume", "kept", "--seed", "1"], "was made with --seed 0"),
    "resume of another version": (["--resume", "old"], "was recorded by another version (format 99"),
    "a shape that depends on data": (["shapes.py"], "torch.export gives the model at "),
    "a branch that depends on data": (["branch.py"], "torch.export refused the model at "),
}


CAPTURED = ("a shape that depends on data", "a branch that depends on data")


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every case in a folder with an old run, and tasks that cannot be captured.

    What torch has a say in is a process of its own, whose streams are all there is to see of it: a line for each.
    """
    home = tmp_path_factory.mktemp("refused")
    (home / "old").mkdir()
    (home / "old" / "run.json").write_text('{"format": 99}')
    (home / "kept").mkdir()
    kept = RunSettings(1, "s", "store.db", "softmax", "t", "cpu", "eager", "uct", "rewriter", 0, None, 2)
    write_run(home / "kept", kept)
    (home / "shapes.py").write_text(TASK.replace(BODY, "return x * x[x > 0].numel()"))
    (home / "branch.py").write_text(TASK.replace(BODY, "return x if x.sum() > 0 else -x"))
    files = [word for case in CAPTURED for word in BAD_INPUT[case][0]]
    both = in_process("optimize", *files, home=home)
    said = both.stderr.splitlines(keepends=True)
    assert len(said) == len(CAPTURED), both.stderr  # and no warning of anything below
    found = {
        case: subprocess.CompletedProcess(files, both.returncode, both.stdout, line)
        for case, line in zip(CAPTURED, said)
    }
    found |= {
        case: here("optimize", *words, home=home)
        for case, (words, _) in BAD_INPUT.items()
        if case not in CAPTURED
    }
    assert not list(home.glob("runs/*"))  # nothing was begun
    return found


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(
    refusals: dict[str, subprocess.CompletedProcess[str]], case: str
) -> None:
    done, (_, words) = refusals[case], BAD_INPUT[case]
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()  # and no warning of anything below
    assert line.startswith("error: ") and words in line
    assert done.stdout == ""


def test_a_refused_module_is_named_with_its_line_and_the_way_out(
    refusals: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    for case, file in (
        ("a shape that depends on data", "shapes.py:8"),
        ("a branch that depends on data", "branch.py:8"),
    ):
        assert file in refusals[case].stderr and "host lane" in refusals[case].stderr


@pytest.mark.usefixtures("steady_clock")
def test_the_host_lane_does_what_the_refusal_says(tmp_path: Path) -> None:
    task, kernel = tmp_path / "count.py", tmp_path / "kernel.py"
    task.write_text(TASK.replace(BODY, "return x * x[x > 0].numel()"))
    kernel.write_text("def forward(x):\n    return x * int((x > 0).sum().item())\n")
    done = here("evaluate", "--task", str(task), "--kernel", str(kernel), "--json", home=tmp_path)
    verdict = json.loads(done.stdout)
    assert (verdict["outcome"], verdict["trust"]) == ("correct", "host")


@pytest.mark.usefixtures("steady_clock")
def test_one_refused_task_of_several_costs_the_others_nothing(tmp_path: Path, task: Path) -> None:
    (tmp_path / "aaa.py").write_text(TASK.replace(BODY, "return x if x.sum() > 0 else -x"))
    done = here("optimize", "aaa.py", str(task), "--budget", "1", "--json", home=tmp_path)
    assert done.returncode == 2
    assert [result["task"] for result in json.loads(done.stdout)] == ["chain"]
    assert "error: aaa: torch.export refused" in done.stderr


def test_one_search_that_breaks_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("scripts.optimize")
    tried = []

    def broken(args: Any, task: Any, *_: Any) -> Any:
        tried.append(task.name)
        raise ValueError("two\nlines [/x]")

    monkeypatch.setattr(script, "search", broken)
    assert script.main(script.Args(tasks=("softmax", "bias_gelu"), out=tmp_path)) == 2
    assert tried == ["softmax", "bias_gelu"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: softmax: the search failed with ValueError: two lines [/x]")
    assert "gelu" in second
    with pytest.raises(ValueError, match="two"):
        script.main(script.Args(tasks=("softmax",), out=tmp_path))
