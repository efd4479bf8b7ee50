"""Judge one kernel: is it right, how much faster is it, and how sure is that.

    python scripts/evaluate.py --task softmax --kernel my_softmax.py
    python scripts/evaluate.py --task problems/17_conv.py --kernel conv.py --baseline compile --json

TASK is a built-in task (see scripts/tasks.py list) or any KernelBench-format file; the kernel is a module
with `forward` or `ModelNew` (docs/kernel-modules.md). Exit code 0 whenever a verdict was reached, whatever it
is; 2 for bad arguments or a broken task file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.profile import feedback
from ke_gym.evaluation.record import MachineRecord
from ke_gym.search.store import Setting, Store
from ke_gym.targets import cpu
from ke_gym.tasks.task import Task


@dataclass
class Args:
    """Judge one kernel against a PyTorch reference."""

    task: str
    """A built-in task's name, or the path of a KernelBench-format file."""
    kernel: Path
    """The kernel module."""
    target: str = "cpu"
    """Where to run."""
    baseline: Literal["eager", "compile", "max-autotune"] = "eager"
    """What the speedup is against: PyTorch eager, torch.compile (about 20 s more), or its max-autotune mode."""
    threads: int | None = None
    """OpenMP threads for kernel and baseline alike; all cores by default."""
    again: bool = False
    """Measure again even if this machine has judged this very kernel before."""
    json: bool = False
    """Print one JSON object instead of the table."""


KEYS = (
    "task", "target", "language", "candidate", "outcome", "trust", "log", "error", "time_ms", "reference_ms",
    "speedup", "speedup_ci", "baseline", "kernel_coverage", "limiter", "cost",
)  # fmt: skip


def main(args: Args) -> None:
    task = Task.load(args.task)
    candidate = Candidate.from_file(args.kernel)
    console = Console(stderr=args.json)
    with Store() as store, console.status(f"judging {args.kernel} on {task.name}"):
        facts = cpu.facts()
        setting = Setting(
            task.id,
            args.target,
            facts.fingerprint,
            args.baseline,
            facts.cores if args.threads is None else args.threads,
        )
        known = None if args.again else store.evaluation(setting, candidate.id)
        evaluation = known or judge(args, task, candidate)
        store.add_task(task)
        store.add_candidate(candidate)
        store.add_evaluation(setting, evaluation)
    if args.json:
        data = json.loads(evaluation.to_json())
        print(json.dumps({key: data[key] for key in KEYS}))
    else:
        console.print(table(evaluation, MachineRecord(facts.fingerprint), known is not None))


def judge(args: Args, task: Task, candidate: Candidate) -> Evaluation:
    with Evaluator(task, args.target, args.baseline, args.threads) as evaluator:
        return evaluator.evaluate(candidate)


def table(evaluation: Evaluation, record: MachineRecord, known: bool) -> Table:
    """The verdict for a person."""
    shown = Table(title=f"{evaluation.task}: {evaluation.outcome}", show_header=False, title_justify="left")
    if evaluation.speedup is not None:
        ci = evaluation.speedup_ci
        sure = f", 95 % in [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else ", too few rounds for an interval"
        shown.add_row("speedup", f"{evaluation.speedup:.2f}x over {evaluation.baseline}{sure}")
        shown.add_row("time", f"{evaluation.reference_ms:.3f} ms → {evaluation.time_ms:.3f} ms")
    if evaluation.error is not None:
        error = evaluation.error
        shown.add_row("error", f"{error.rel_l2:.1e} relative L2, {error.ratio:.2g}x the reference's own")
    for line in feedback(evaluation).splitlines()[1:]:
        key, _, value = line.partition(": ")
        if key != "speedup":
            shown.add_row(*((key, value) if value and len(key) < 16 else ("", line)))
    cost = evaluation.cost
    shown.add_row(
        "cost", f"compile {cost.compile_s:.2f} s, check {cost.check_s:.2f} s, race {cost.race_s:.2f} s"
    )
    shown.add_row(
        "trust", f"{evaluation.trust} lane, sandbox {evaluation.sandbox}, {evaluation.threads} threads"
    )
    if evaluation.reference_ms is not None:
        shown.add_row("machine", record.sentence(evaluation.reference_ms / 1e3))
    if known:
        shown.add_row("", "judged before on this machine; --again measures anew")
    return shown


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
