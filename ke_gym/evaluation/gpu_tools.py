"""What tools say of a kernel: NVIDIA's ``ncu`` of where its time goes, ``compute-sanitizer`` of its accesses; Triton's
Proton of what each kernel of a plan takes.

They watch ``gpu_replay`` run the plan in a process of its own, which takes seconds: the first is for new best kernels, the
second for finalists, the third for whoever asks. None is needed: where a tool is missing, refused or too slow, it says
nothing.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ke_gym.evaluation import gpu_replay
from ke_gym.evaluation.zygote import worker_environment
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Launch
from ke_gym.tasks.task import Task

METRICS = {
    "time_ns": "gpu__time_duration.sum",
    "dram": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_bytes": "dram__bytes.sum",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "fma": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
    "issue": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "stall_memory": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "stall_shared": "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "stall_barrier": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
}
"""A dozen metrics by the names that profiles give them; shares are percent, stalls warps waiting per issue."""
PROFILE_SECONDS, SANITIZE_SECONDS = 60.0, 30.0
"""On one H200: ``ncu`` takes 6 to 7 s, ``memcheck`` 4 to 5, ``racecheck`` 8 and, with much shared memory, minutes."""
PROTON_RUNS = 20
CHECKS = ("memcheck", "racecheck")
_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")
_FOUND = 86
"""The exit status by which ``compute-sanitizer`` tells that it found something."""


class ToolFailed(Exception):
    """A tool is missing, was refused, or did not end in time; its own words."""


class TooSlow(ToolFailed):
    """A tool did not end in time."""


@dataclass(frozen=True)
class Replayed:
    """What is to be watched: a plan on one GPU, by its number among those that ``environment`` shows.

    ``blocks``: so many of every launch's blocks at the most; 0 for all.
    """

    task: Task
    artifact: Artifact
    shape_set: str
    device: int
    environment: dict[str, str]
    blocks: int = 0

    def under(
        self, command: Sequence[str], runs: int, seconds: float, *options: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the plan under a tool, or with ``gpu_replay``'s ``options``. Raises ``TooSlow`` if that takes longer than
        ``seconds``."""
        with tempfile.TemporaryDirectory(prefix="ke-replay-") as folder:
            (Path(folder) / gpu_replay.TASK).write_bytes(self.task.to_bytes())
            (Path(folder) / gpu_replay.ARTIFACT).write_bytes(self.artifact.to_bytes())
            process = subprocess.Popen(
                [*command, sys.executable, "-P", "-m", "ke_gym.evaluation.gpu_replay",
                 folder, self.shape_set, str(self.device), str(runs), str(self.blocks), *options],
                env={**worker_environment(1), **self.environment, "TMPDIR": folder, "HOME": folder},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )  # fmt: skip
            try:
                said, _ = process.communicate(timeout=seconds)
            except BaseException as error:  # Ctrl-C, too, which a session of its own does not see
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                tool = Path(command[0]).name if command else "Proton"
                raise TooSlow(f"{tool} took more than {seconds:g} s") from None
        return subprocess.CompletedProcess(command, process.returncode, said)


def find(name: str) -> str:
    """Where a tool of the toolkit is. Raises ``ToolFailed`` if it is not."""
    homes = [f"{os.environ[v]}/bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *homes, *_FOLDERS])
    found = shutil.which(name, path=path)
    if found is None:
        raise ToolFailed(f"{name} is not installed")
    return found


def counters(replayed: Replayed, seconds: float = PROFILE_SECONDS) -> dict[str, dict[str, float]]:
    """``METRICS`` of every kernel of the plan, by ``ncu``; clocks are left as they are. Raises ``ToolFailed``."""
    command = [
        find("ncu"), "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base",
        "--metrics", ",".join(METRICS.values()),
    ]  # fmt: skip
    done = replayed.under(command, 1, seconds)
    found = parse(done.stdout)
    if not found:
        raise ToolFailed(f"ncu gave no counters: {_problem(done.stdout)}")
    return found


def parse(text: str) -> dict[str, dict[str, float]]:
    """Counters by kernel (the time-weighted mean over its launches; times and bytes: sums) from ``ncu --csv``."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    names = {metric: name for name, metric in METRICS.items()}
    launches: dict[tuple[str, str], dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = names.get(row.get("Metric Name") or "")
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue  # n/a: this device does not count it
        if name is not None:
            launches.setdefault((row["Kernel Name"].partition("(")[0], row["ID"]), {})[name] = value
    kernels: dict[str, dict[str, float]] = {}
    for kernel in dict.fromkeys(kernel for kernel, _ in launches):
        mine = [counted for (name, _), counted in launches.items() if name == kernel]
        kernels[kernel] = {name: _pooled(mine, name) for name in METRICS if any(name in c for c in mine)}
    return kernels


def _pooled(launches: list[dict[str, float]], name: str) -> float:
    counted = [c for c in launches if name in c]
    if name in ("time_ns", "dram_bytes"):
        return sum(c[name] for c in counted)
    weights = [c.get("time_ns", 1.0) or 1.0 for c in counted]
    return sum(w * c[name] for w, c in zip(weights, counted)) / sum(weights)


def times(replayed: Replayed, seconds: float = PROFILE_SECONDS) -> dict[str, float]:
    """Seconds a call of the plan spends in each kernel, a library's too, by Proton; the largest first.

    The mean of calls one after the other: caches are as the call before has left them. Raises ``ToolFailed``.
    """
    done = replayed.under([], PROTON_RUNS, seconds, gpu_replay.PROTON)
    recorded = next((line for line in done.stdout.splitlines() if line.startswith("[{")), "")
    if done.returncode or not recorded:
        raise ToolFailed(f"Proton recorded nothing: {_problem(done.stdout)}")
    found: dict[str, float] = {}
    pending = [node for node in json.loads(recorded) if "frame" in node]
    while pending:
        node = pending.pop()
        pending += node.get("children", [])
        if taken := node["metrics"].get("time (ns)"):
            name = node["frame"]["name"]
            found[name] = found.get(name, 0.0) + taken / 1e9 / PROTON_RUNS
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def sanitized(replayed: Replayed, check: str, seconds: float = SANITIZE_SECONDS) -> str:
    """What ``compute-sanitizer`` finds in one run of the plan, its own sentence; "" if nothing.

    ``check`` is one of ``CHECKS``. Raises ``ToolFailed``, and ``TooSlow`` after ``seconds``.
    """
    command = [find("compute-sanitizer"), "--tool", check, "--error-exitcode", str(_FOUND)]
    if check == "racecheck":  # of the plan's own kernels alone: it takes minutes where memcheck takes seconds
        command += ["--racecheck-report", "analysis"]
        plan = replayed.artifact.plans[replayed.shape_set]
        steps = (*plan.steps, *(plan.preparation.steps if plan.preparation is not None else ()))
        for name in sorted({step.kernel for step in steps if isinstance(step, Launch)}):
            command += ["--kernel-name", f"kernel_name={name}"]
    outside = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation: bounds are its own
    watched = replace(replayed, environment={**replayed.environment, **outside})
    done = watched.under(command, 1, seconds)
    if done.returncode == 0:
        return ""
    if done.returncode == _FOUND and (sentence := finding(done.stdout)):
        return f"compute-sanitizer ({check}): {sentence}"
    raise ToolFailed(f"compute-sanitizer did not finish: {_problem(done.stdout)}")


def finding(text: str) -> str:
    """The first finding in what ``compute-sanitizer`` printed, with the kernel it was seen in; "" if none.

    Warnings of ``racecheck`` are none: they are about order within a warp that the hardware keeps.
    """
    lines = [line.lstrip("= ").strip() for line in text.splitlines() if line.startswith("=====")]
    for at, line in enumerate(lines):
        if line.startswith(("Invalid ", "Error: Race", "Misaligned", "Out-of-range")):
            where = [other for other in lines[at + 1 : at + 3] if other.startswith(("at ", "by thread"))]
            return " ".join([line, *where])
    return ""


def _problem(text: str) -> str:
    """The line in which a tool says why not."""
    lines = [line.strip("= \t") for line in text.splitlines() if line.strip("= \t")]
    marked = [line for line in lines if "ERR" in line or "rror" in line]
    return (marked or lines or ["it said nothing"])[0][:300]
