"""scripts/evaluate.py: what it prints, what it keeps, how it exits."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ke_gym.evaluation.bundle import Bundle
from ke_gym.evaluation.evaluation import Errors, Evaluation
from tests.machine import give_peaks
from tests.scripts.command import here, in_process

KEYS = {
    "task", "target", "language", "candidate", "outcome", "trust", "log", "error", "time_ms", "reference_ms",
    "speedup", "speedup_ci", "baseline", "kernel_coverage", "limiter", "cost",
}  # fmt: skip

TASK = """
import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return torch.relu(x * x + 1.0) - x


def get_inputs():
    return [torch.randn(256, 1024)]


def get_init_inputs():
    return []
"""

KERNEL = """
import torch
from ke_gym import lang

kernels = lang.cpp(r'''
#include <cstdint>
extern "C" void chain(const float* x, float* out, int64_t n) {
  #pragma omp parallel for simd
  for (int64_t i = 0; i < n; ++i) {
    const float y = x[i] * x[i] + 1;
    out[i] = (y > 0 ? y : 0) - x[i];
  }
}
''')


def forward(x):
    out = torch.empty_like(x)
    kernels.chain(x, out, x.numel())
    return out
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "chain.py").write_text(TASK)
    (tmp_path / "kernel.py").write_text(KERNEL)
    give_peaks(tmp_path)
    return tmp_path


def evaluate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return here("evaluate", *arguments, home=folder)


@pytest.mark.usefixtures("even_clock")
def test_a_verdict_is_printed_and_not_paid_for_twice(folder: Path) -> None:
    first = in_process("evaluate", "--task", "chain.py", "--kernel", "kernel.py", "--json", home=folder)
    assert first.returncode == 0, first.stderr
    verdict = json.loads(first.stdout)
    assert set(verdict) == KEYS
    assert (verdict["outcome"], verdict["trust"], verdict["baseline"]) == ("correct", "plan", "eager")
    assert set(verdict["error"]) == {"max_abs", "rel_l2", "ratio"}
    assert set(verdict["cost"]) == {"compile_s", "check_s", "race_s"}
    again = evaluate(folder, "--task", "chain.py", "--kernel", "kernel.py", "--json")
    assert json.loads(again.stdout) == verdict, "the very numbers: nothing was measured"
    shown = evaluate(folder, "--task", "chain.py", "--kernel", "kernel.py")
    assert "chain: correct" in shown.stdout and "judged before on this machine" in shown.stdout
    anew = json.loads(
        evaluate(folder, "--task", "chain.py", "--kernel", "kernel.py", "--json", "--again").stdout
    )
    assert anew["cost"] != verdict["cost"]
    kept = json.loads(evaluate(folder, "--task", "chain.py", "--kernel", "kernel.py", "--json").stdout)
    assert kept == anew, "what was measured last is what is remembered"


@pytest.mark.usefixtures("even_clock")
def test_a_speedup_over_torch_compile_says_so(folder: Path) -> None:
    done = evaluate(folder, "--task", "chain.py", "--kernel", "kernel.py", "--baseline", "compile", "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["outcome"], verdict["baseline"]) == ("correct", "compile")
    assert verdict["reference_ms"] > 0 and verdict["speedup"] > 0


@pytest.mark.usefixtures("even_clock")
def test_a_wrong_kernel_is_a_verdict_too(folder: Path) -> None:
    (folder / "kernel.py").write_text(KERNEL.replace("x[i] + 1", "x[i] + 2"))
    done = evaluate(folder, "--task", "chain.py", "--kernel", "kernel.py", "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["outcome"], verdict["speedup"]) == ("correctness", None)
    assert "element" in verdict["log"]
    assert verdict["error"]["max_abs"] == pytest.approx(1.0, rel=1e-3)  # 2 in place of 1
    assert verdict["error"]["rel_l2"] > 0.1 and verdict["error"]["ratio"] > 100
    shown = evaluate(folder, "--task", "chain.py", "--kernel", "kernel.py")
    assert "relative L2" in shown.stdout and "hint" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "sofmax", "--kernel", "kernel.py"], ["sofmax", "softmax"]),
        (["--task", "broken.py", "--kernel", "kernel.py"], ["broken.py:3", "syntax"]),
        (["--task", "chain.py", "--kernel", "nowhere.py"], ["nowhere.py"]),
        (["--task", "chain.py", "--kernel", "kernel.py", "--threads", "4096"], ["--threads 4096", "cores"]),
        (["--task", "chain.py", "--kernel", "kernel.py", "--threads", "0"], ["--threads 0"]),
        (["--task", "chain.py", "--kernel", "kernel.py", "--proton"], ["--proton", "--target cuda"]),
        (["--task", "chain.py", "--kernel", "kernel.py", "--target", "cuda:99"], ["GPU", "--compile-only"]),
        (["--task", "chain.py", "--kernel", "kernel.py", "--target", "gpu"], ["'gpu'", "cuda"]),
        (["--task", "chain.py", "--kernel", "kernel.py", "--bundle", "batch"], ["--compile-only"]),
        (
            [
                "--task",
                "chain.py",
                "--kernel",
                "kernel.py",
                "--bundle",
                "b",
                "--compile-only",
                "--arch",
                "sm_9",
            ],
            ["sm_9", "sm_90"],
        ),
        (["--run-bundle", "kernel.py"], ["kernel.py", "no bundle"]),
        (["--run-bundle", "empty.keb"], ["empty.keb", "holds no kernel"]),
        (["--task", "chain.py", "--kernel", "kernel.py", "--arch", "sm_90a"], ["--arch", "--compile-only"]),
        (["--serve", "nowhere"], ["nowhere", "no folder"]),
        pytest.param(
            ["--serve", "."],
            ["no NVIDIA GPU", "serve the folder on a machine that has one"],
            marks=pytest.mark.skipif(bool(torch.cuda.device_count()), reason="here it would serve"),
        ),
        (["--task", "chain.py"], ["--kernel"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    folder: Path, arguments: list[str], words: list[str]
) -> None:
    (folder / "broken.py").write_text("import torch\n\nclass Model(:\n    pass\n")
    Bundle("", (), ()).write(folder / "empty.keb")
    done = evaluate(folder, *arguments)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_what_does_not_compile_for_a_gpu_says_its_error_in_a_line(folder: Path) -> None:
    pytest.importorskip("triton")
    (folder / "odd.py").write_text("import torch, triton\ndef forward(x):\n    return torch.relux(x)\n")
    done = evaluate(folder, "--task", "chain.py", "--kernel", "odd.py", "--bundle", "b", "--compile-only")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "odd.py: compile AttributeError: module 'torch' has no attribute 'relux'"


def test_a_compiler_s_words_are_printed_as_they_are() -> None:
    script = importlib.import_module("scripts.evaluate")
    log = "k.cpp:7: error: y[i] = x[i] + w[b] ; [/x] :x:"
    found = Evaluation("task[/x]", "cpu", "cpp", "c", "compile", log=log)
    console = Console(width=160)
    with console.capture() as shown:
        console.print(script.table(script.Judged("machine", False, found)))
    assert "task[/x]: compile" in shown.get() and "y[i] = x[i] + w[b] ; [/x] :x:" in shown.get()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_errors_beyond_numbers_come_back_as_beyond_all(wrong: float) -> None:
    script = importlib.import_module("scripts.evaluate")
    found = Evaluation("t", "cpu", "cpp", "c", "correctness", error=Errors(wrong, wrong, wrong))
    again = Evaluation.from_json(found.to_json())
    assert again.error is not None and min(again.error.ratio, again.error.rel_l2) >= 1e308
    assert again.error.or_worse(Errors(1.0, 1.0, 1.0)) == again.error
    script.table(script.Judged("machine", True, again))
