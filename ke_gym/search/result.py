"""``Result``: what a search found for one task."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ke_gym.candidate import Candidate
from ke_gym.deploy import Kernel
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.files import write_whole
from ke_gym.languages.artifact import Artifact
from ke_gym.proposers.base import NOTHING, Usage
from ke_gym.tasks import Reference, Task

FORMAT = 1


@dataclass(frozen=True)
class Result:
    """The outcome of one search. Times are milliseconds; ``speedup`` is 1.0 where nothing correct was found.

    ``result.kernel(*inputs)`` runs the best kernel, or the reference where the kernel was not proven;
    ``result.report()`` is the path of the HTML report.
    """

    task: Task
    target: str
    baseline: str
    best: Candidate | None
    evaluation: Evaluation | None
    artifact: Artifact | None
    evaluations: int
    valid: float
    seconds: float
    seed_correct: bool
    """Whether the search's first candidate was correct."""
    stopped: str
    floor_ms: float
    run_dir: Path
    module: nn.Module | None = None
    """The user's own module, if the task was made from one."""
    usage: Usage = NOTHING
    """What models were asked in all; nothing where none was."""
    dollars: float = 0.0
    proof: Proof | None = None
    """How far the task's checks can be trusted; None where that was not tried: for the built-in suite, by exchange."""
    refused: dict[str, int] = field(default_factory=dict)
    """Why candidates were not taken: outcome → how many; "no gain": correct, but not faster."""
    time: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Where the time of this process went: phase → seconds, and how often it was entered (``evaluation.account``)."""

    @property
    def speedup(self) -> float:
        """Baseline time over best time."""
        return self.evaluation.speedup or 1.0 if self.evaluation else 1.0

    @property
    def speedup_ci(self) -> tuple[float, float]:
        """The 95 % interval of ``speedup``."""
        return self.evaluation.speedup_ci or (1.0, 1.0) if self.evaluation else (1.0, 1.0)

    @property
    def faster(self) -> bool:
        """Whether the whole interval lies above 1: something beats the reference."""
        return self.speedup_ci[0] > 1.0

    @property
    def reference_ms(self) -> float | None:
        return self.evaluation.reference_ms if self.evaluation else None

    @property
    def best_ms(self) -> float | None:
        return self.evaluation.time_ms if self.evaluation else None

    @property
    def kernel_coverage(self) -> float | None:
        return self.evaluation.kernel_coverage if self.evaluation else None

    @property
    def source(self) -> str:
        """The best kernel module's text; empty if none was correct."""
        return self.best.source if self.best else ""

    @cached_property
    def reference(self) -> Reference:
        """Parameters are read from here, and unproven inputs run here: the user's own module if there is one."""
        if self.module is not None:
            return Reference(self.module)
        return self.task.reference(self.task.contract(self.target))

    @cached_property
    def kernel(self) -> Kernel:
        """A callable in place of the reference; without a faster kernel it *is* the reference."""
        return Kernel(self.task, self.reference, self.artifact if self.faster else None, self.target)

    def report(self) -> Path:
        """The self-contained HTML report of the run."""
        return self.run_dir / "report.html"

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``scripts/optimize.py --json``."""
        return {
            "task": self.task.name,
            "target": self.target,
            "baseline": self.baseline,
            "reference_ms": self.reference_ms,
            "best_ms": self.best_ms,
            "speedup": self.speedup,
            "speedup_ci": list(self.speedup_ci),
            "kernel_coverage": self.kernel_coverage,
            "evaluations": self.evaluations,
            "valid": round(self.valid, 4),
            "seconds": round(self.seconds, 2),
            "run_dir": str(self.run_dir),
        }

    def verdict(self) -> str:
        """What was found, or that nothing was, and how close to the floor one is; a warning if the task is weak."""
        return " ".join(filter(None, (self._found(), self.warning())))

    def warning(self) -> str:
        """What a reader has to know of a task whose checks let wrong versions of it through; "" if they don't."""
        if self.proof is None or self.proof.ok:
            return ""
        return (
            f"Warning: the checks of {self.task.name} accept wrong versions of it ({', '.join(self.proof.survivors)}),"
            " so a kernel may be as wrong."
        )

    def _found(self) -> str:
        name = self.task.name
        if self.evaluation is None:
            if self.valid:
                return (
                    f"{name}: no candidate was confirmed: the best of {self.evaluations} failed when measured again"
                    " after the search; the reference stays."
                )
            return f"{name}: none of {self.evaluations} candidates was correct; the reference stays."
        low, high = self.speedup_ci
        if self.faster:
            return (
                f"{name}: {self.speedup:.2f}x faster than {self.baseline} [{low:.2f}, {high:.2f}],"
                f" {self.reference_ms:.3f} ms -> {self.best_ms:.3f} ms."
            )
        text = (
            f"{name}: nothing beats the reference ({self.baseline}); the best of {self.evaluations}"
            f" candidates is {self.speedup:.2f}x [{low:.2f}, {high:.2f}]."
        )
        if self.floor_ms > 0 and self.reference_ms:
            share = 100 * self.floor_ms / self.reference_ms
            text += (
                f" The reference takes {self.reference_ms:.3f} ms, and this machine's floor for the task's"
                f" bytes and FLOPs is {self.floor_ms:.3f} ms: it is at {share:.0f} % of what is possible."
            )
        return text

    def _repr_html_(self) -> str:
        """A notebook shows the verdict and the report's place."""
        return f"<p>{self.verdict()}</p><p>Report: <code>{self.report()}</code></p>"

    def write(self) -> None:
        """``best.py``, ``artifact.bin`` and ``result.json`` into the run's folder."""
        if self.best is not None:
            write_whole(self.run_dir / "best.py", self.best.source.encode())
        if self.artifact is not None:
            write_whole(self.run_dir / "artifact.bin", self.artifact.to_bytes())
        data = {
            "format": FORMAT,
            **self.to_dict(),
            "seed_correct": self.seed_correct,
            "refused": self.refused,
            "stopped": self.stopped,
            "verdict": self.verdict(),
            "floor_ms": self.floor_ms,
            "time": self.time,
            "dollars": self.dollars,
            "usage": self.usage.to_dict(),
            "proof": asdict(self.proof) if self.proof else None,
            "evaluation": json.loads(self.evaluation.to_json()) if self.evaluation else None,
        }
        write_whole(self.run_dir / "result.json", json.dumps(data, indent=1).encode())
