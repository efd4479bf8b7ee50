"""What is made of the words of ncu and compute-sanitizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ke_gym.evaluation import gpu_tools
from ke_gym.evaluation.gpu_tools import (
    METRICS,
    Replayed,
    ToolFailed,
    counters,
    finding,
    parse,
    sanitized,
    times,
)
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import one_launch

TASK = """
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return x + 1
def get_inputs():
    return [torch.zeros(4)]
"""
CSV = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'


@pytest.fixture
def replayed(tmp_path: Path) -> Replayed:
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return Replayed(
        Task.from_file(path), one_launch("k", TensorSpec((4,), (1,), "float32")), "default", 0, {}
    )


def tool(folder: Path, name: str, script: str, patch: pytest.MonkeyPatch) -> None:
    """An executable of that name, alone on the PATH but for the shell."""
    (folder / name).write_text(f"#!{sys.executable}\n{script}\n")
    (folder / name).chmod(0o755)
    patch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def rows(launch: int, kernel: str, **values: float) -> str:
    return "".join(
        f'"{launch}","1","{kernel}(float*, int)","{METRICS[name]}","%","{value:,}"\n'
        for name, value in values.items()
    )


def test_counters_are_pooled_over_a_kernel_s_launches() -> None:
    text = (
        "==PROF== Connected\n"
        + CSV
        + rows(0, "a", time_ns=1000.0, dram=90.0, dram_bytes=1_500_000.0)
        + rows(1, "b", time_ns=500.0, dram=5.0)
        + rows(2, "a", time_ns=3000.0, dram=50.0, dram_bytes=500_000.0)
        + '"2","1","a(float*, int)","lts__t_sector_hit_rate.pct","%","n/a"\n'
    )
    assert parse(text) == {
        "a": {"time_ns": 4000.0, "dram": 60.0, "dram_bytes": 2_000_000.0},
        "b": {"time_ns": 500.0, "dram": 5.0},
    }


def test_words_without_a_table_are_no_counters() -> None:
    assert parse("==ERROR== ERR_NVGPUCTRPERM\n") == {}


def test_a_tool_that_is_refused_says_why(
    replayed: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(
        tmp_path,
        "ncu",
        "print('==PROF== x')\nprint('==ERROR== ERR_NVGPUCTRPERM - no permission')",
        monkeypatch,
    )
    with pytest.raises(ToolFailed, match="ERR_NVGPUCTRPERM"):
        counters(replayed)


def test_the_plan_and_its_task_reach_the_tool(
    replayed: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = CSV + rows(0, "k", time_ns=7.0)
    seen = tmp_path / "seen"
    script = (
        "import sys, pathlib\n"
        f"folder = pathlib.Path(sys.argv[-5]); pathlib.Path({str(seen)!r}).write_text(' '.join(sys.argv))\n"
        f"assert (folder / 'task').read_bytes() and (folder / 'artifact').read_bytes()\nprint({table!r})"
    )
    tool(tmp_path, "ncu", script, monkeypatch)
    assert counters(replayed) == {"k": {"time_ns": 7.0}}
    command = seen.read_text()
    assert "--clock-control none" in command and command.endswith("default 0 1 0")


def node(name: str, *children: dict[str, Any], ns: float = 0.0) -> dict[str, Any]:
    frame = {"name": name, "type": "function"}
    return {"frame": frame, "metrics": {"time (ns)": ns} if ns else {}, "children": list(children)}


def test_what_proton_records_is_seconds_a_call_by_kernel(
    replayed: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = node("aten", node("copy", ns=8e6), node("rows", ns=1e6))
    tree = [node("ROOT", node("rows", ns=3e6), copies), {"CUDA": {"0": {"arch": "90"}}}]
    asked: list[Any] = []

    def under(self: Replayed, *arguments: Any) -> subprocess.CompletedProcess[str]:
        asked.append(arguments)
        return subprocess.CompletedProcess([], 0, f"a warning\n{json.dumps(tree)}\n")

    monkeypatch.setattr(Replayed, "under", under)
    found = times(replayed)
    assert list(found) == ["copy", "rows"]
    assert list(found.values()) == pytest.approx([4e-4, 2e-4])
    assert asked == [([], gpu_tools.PROTON_RUNS, gpu_tools.PROFILE_SECONDS, "--proton")]


def test_what_proton_cannot_record_says_why(replayed: Replayed) -> None:
    if torch.cuda.is_available():
        pytest.skip("here it could")
    with pytest.raises(ToolFailed, match=r"Proton recorded nothing: .*Error"):
        times(replayed)


def test_a_tool_that_takes_too_long_is_ended(
    replayed: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, "ncu", "import time; time.sleep(60)", monkeypatch)
    with pytest.raises(ToolFailed, match=r"more than 0\.3 s"):
        counters(replayed, 0.3)


def test_a_tool_is_ended_with_who_waits_for_it(
    replayed: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a session of its own, which Ctrl-C does not reach."""
    pid = tmp_path / "pid"
    script = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    tool(tmp_path, "ncu", script, monkeypatch)
    communicate = subprocess.Popen.communicate

    def interrupted(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.poll() is None and named:
            while not (pid.exists() and pid.read_text()):
                pass
            raise KeyboardInterrupt
        return communicate(self, *arguments, **named)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        counters(replayed)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_tool_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, replayed: Replayed) -> None:
    monkeypatch.setattr(gpu_tools, "_FOLDERS", ())
    monkeypatch.setenv("PATH", "/nowhere")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ToolFailed, match="compute-sanitizer is not installed"):
        sanitized(replayed, "memcheck")


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at rows+0x1f0 in softmax.py:12
=========     by thread (96,0,0) in block (2047,0,0)
=========     Access to 0x7f is out of bounds
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= Error: Race reported between Write access at sums+0x2a0
=========     and Read access at sums+0x3b0 [8192 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("check", "said", "sentence"),
    [
        ("memcheck", MEMCHECK, "Invalid __global__ read of size 4 bytes at rows"),
        ("racecheck", RACECHECK, "Race reported between Write access"),
    ],
)
def test_a_finding_is_told_in_the_tool_s_words(
    replayed: Replayed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    said: str,
    sentence: str,
) -> None:
    tool(tmp_path, "compute-sanitizer", f"print({said!r})\nraise SystemExit(86)", monkeypatch)
    assert sentence in sanitized(replayed, check)


def test_nothing_found_is_nothing_said(
    replayed: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, "compute-sanitizer", "print('========= ERROR SUMMARY: 0 errors')", monkeypatch)
    assert sanitized(replayed, "memcheck") == ""
    assert finding("========= Warning: Race reported between Read and Write\n") == ""


def test_a_sanitizer_that_fails_by_itself_finds_nothing(
    replayed: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(
        tmp_path,
        "compute-sanitizer",
        "print('========= Error: No attachable process')\nraise SystemExit(86)",
        monkeypatch,
    )
    with pytest.raises(ToolFailed, match="did not finish"):
        sanitized(replayed, "memcheck")


def test_races_are_looked_for_in_a_plan_s_kernels_and_its_preparation_s(
    replayed: Replayed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, made = (one_launch(name, TensorSpec((4,), (1,), "float32")).plans["default"] for name in "kp")
    artifact = replace(replayed.artifact, plans={"default": replace(plan, preparation=made)})
    seen = tmp_path / "seen"
    tool(
        tmp_path,
        "compute-sanitizer",
        f"import sys; open({str(seen)!r}, 'w').write(str(sys.argv))",
        monkeypatch,
    )
    assert sanitized(replace(replayed, artifact=artifact), "racecheck") == ""
    assert "kernel_name=k'" in seen.read_text() and "kernel_name=p'" in seen.read_text()
