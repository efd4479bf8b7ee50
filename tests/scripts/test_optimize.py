from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = optimize(tmp_path, "--resume", str(run_dir), "--budget", "3")
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "result.json").read_text())["evaluations"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name at least one task"),
        (["sofmax"], "softmax"),
        (["softmax", "--policy", "epsilon_gredy"], "epsilon_greedy"),
        (["softmax", "--proposer", "rewritr"], "rewriter"),
        (["softmax", "--budget", "0"], "buys nothing"),
        (["softmax", "--out", "/proc/none"], "cannot be written"),
        (["softmax", "--resume", "."], "not a run's folder"),
        (["softmax", "--baseline", "sand"], "baseline"),
        (["softmax", "--threads", "100000"], "cores"),
        (["softmax", "--target", "abacus"], "abacus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = optimize(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not list(tmp_path.glob("runs/*/result.json"))


def test_what_torch_export_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dynamic.py"
    path.write_text(TASK.replace("return torch.relu(x * x + 1.0) - x", "return x * x[x > 0].numel()"))
    done = optimize(tmp_path, str(path), "--budget", "2")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "dynamic" in done.stderr
