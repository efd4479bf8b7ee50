from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from ke_gym.job import RunSettings, write_run
from ke_gym.search.store import NodeRecord, Store

ROOT = Path(__file__).parents[2]
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


def command(home: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    line = [sys.executable, str(ROOT / "scripts" / "optimize.py"), *arguments]
    return line, os.environ | {"KE_GYM_HOME": str(home), "PYTHONPATH": str(ROOT)}


def optimize(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line, env = command(home, *arguments)
    return subprocess.run(line, env=env, cwd=home, capture_output=True, text=True, timeout=300)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "chain.py"
    path.write_text(TASK)
    return path


def test_json_gives_one_object_per_task(tmp_path: Path, task: Path) -> None:
    done = optimize(tmp_path, str(task), "--budget", "2", "--json", "--out", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert set(result) == KEYS
    assert (result["task"], result["evaluations"]) == ("chain", 2)
    assert Path(result["run_dir"], "report.html").exists()


def test_ctrl_c_ends_with_what_was_found(tmp_path: Path, task: Path) -> None:
    line, env = command(tmp_path, str(task), "--budget", "500", "--out", str(tmp_path / "runs"))
    child = subprocess.Popen(
        line, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    for text in child.stdout:
        if text.startswith("chain 2/500"):
            # A terminal sends it to the whole foreground group.
            os.killpg(child.pid, signal.SIGINT)
            break
    rest, _ = child.communicate(timeout=120)
    assert child.returncode == 130, rest
    assert "Traceback" not in rest and "report:" in rest
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert json.loads((run_dir / "result.json").read_text())["stopped"] == "interrupted"


def lines_until(stream: IO[str], start: str) -> list[str]:
    """The lines up to the first one that starts so."""
    seen = []
    for line in stream:
        seen.append(line)
        if line.startswith(start):
            return seen
    raise AssertionError("".join(seen))


def test_ctrl_c_before_the_first_evaluation_leaves_nothing_behind(tmp_path: Path, task: Path) -> None:
    line, env = command(tmp_path, str(task), "--budget", "500", "--out", str(tmp_path / "runs"))
    child = subprocess.Popen(
        line, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    runs = tmp_path / "runs"
    while not list(runs.glob("*chain")):
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    rest, _ = child.communicate(timeout=120)
    assert child.returncode == 130, rest
    assert "Traceback" not in rest
    assert all((run_dir / "run.json").exists() for run_dir in runs.glob("*chain"))


def test_ctrl_c_in_the_second_task_prints_the_first(tmp_path: Path, task: Path) -> None:
    (tmp_path / "zzz.py").write_text(TASK)
    line, env = command(tmp_path, str(task), "zzz.py", "--budget", "1", "--json")
    child = subprocess.Popen(
        line, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stderr is not None
    lines_until(child.stderr, "chain: ")  # the verdict on the first: the second begins
    os.killpg(child.pid, signal.SIGINT)
    out, rest = child.communicate(timeout=120)
    assert child.returncode == 130, rest
    assert "Traceback" not in rest
    assert next(result["task"] for result in json.loads(out)) == "chain"


def recorded(home: Path, run_dir: Path) -> list[NodeRecord]:
    """The nodes of a run whose evaluation is in the store."""
    with Store(home / "store.db") as store:
        nodes = store.nodes(json.loads((run_dir / "run.json").read_text())["session"])
    return [node for node in nodes if node.evaluation is not None]


def test_kill_9_then_resume_continues_the_search(tmp_path: Path, task: Path) -> None:
    line, env = command(tmp_path, str(task), "--budget", "3", "--out", str(tmp_path / "runs"))
    child = subprocess.Popen(line, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for text in child.stdout:
        if text.startswith("chain 1/3"):
            child.kill()
            break
    child.communicate()
    (run_dir,) = (tmp_path / "runs").iterdir()
    before = recorded(tmp_path, run_dir)
    assert before
    done = optimize(tmp_path, "--resume", str(run_dir), "--budget", "3", "--seed", "0")
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
    "budget of 0": (["softmax", "--budget", "0"], "buys nothing"),
    "too many threads": (["softmax", "--threads", "100000"], "cores"),
    "output not writable": (["softmax", "--out", "/proc/none"], "cannot be written"),
    "resume of no run": (["softmax", "--resume", "."], "not a run's folder"),
    "resume with another seed": (["--resume", "kept", "--seed", "1"], "was made with --seed 0"),
    "resume of another version": (["--resume", "old"], "was recorded by another version (format 99"),
    "a shape that depends on data": (["shapes.py"], "torch.export gives the model at "),
    "a branch that depends on data": (["branch.py"], "torch.export refused the model at "),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every case in a folder with an old run, and tasks that cannot be captured; two processes at a time."""
    home = tmp_path_factory.mktemp("refused")
    (home / "old").mkdir()
    (home / "old" / "run.json").write_text('{"format": 99}')
    (home / "kept").mkdir()
    kept = RunSettings(1, "s", "store.db", "softmax", "t", "cpu", "eager", "uct", "rewriter", 0, None, 2)
    write_run(home / "kept", kept)
    (home / "shapes.py").write_text(TASK.replace(BODY, "return x * x[x > 0].numel()"))
    (home / "branch.py").write_text(TASK.replace(BODY, "return x if x.sum() > 0 else -x"))
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda case: optimize(home, *case[0]), BAD_INPUT.values())
    found = dict(zip(BAD_INPUT, done, strict=True))
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


def test_the_host_lane_does_what_the_refusal_says(tmp_path: Path) -> None:
    task, kernel = tmp_path / "count.py", tmp_path / "kernel.py"
    task.write_text(TASK.replace(BODY, "return x * x[x > 0].numel()"))
    kernel.write_text("def forward(x):\n    return x * int((x > 0).sum().item())\n")
    line = [
        sys.executable,
        str(ROOT / "scripts" / "evaluate.py"),
        "--task",
        str(task),
        "--kernel",
        str(kernel),
        "--json",
    ]
    _, env = command(tmp_path)
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    verdict = json.loads(done.stdout)
    assert (verdict["outcome"], verdict["trust"]) == ("correct", "host")


def test_one_refused_task_of_several_costs_the_others_nothing(tmp_path: Path, task: Path) -> None:
    (tmp_path / "aaa.py").write_text(TASK.replace(BODY, "return x if x.sum() > 0 else -x"))
    done = optimize(tmp_path, "aaa.py", str(task), "--budget", "1", "--json")
    assert done.returncode == 2
    assert [result["task"] for result in json.loads(done.stdout)] == ["chain"]
    assert "error: aaa: torch.export refused" in done.stderr
