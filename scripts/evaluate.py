"""Judge kernels: are they right, how much faster are they, and how sure is that.

    python scripts/evaluate.py --task softmax --kernel my_softmax.py
    python scripts/evaluate.py --task problems/17_conv.py --kernel conv.py --baseline compile --json
    python scripts/evaluate.py --task softmax --kernel rows.py --target cuda --proton
    python scripts/evaluate.py --task softmax --kernel a.py b.py --bundle batch.keb --compile-only
    python scripts/evaluate.py --run-bundle batch.keb --results batch.json
    python scripts/evaluate.py --serve /shared/folder

TASK is a built-in task (see scripts/tasks.py list) or any KernelBench-format file; a kernel is a module with
`forward` or `ModelNew` (docs/kernel-modules.md). A bundle is compiled where no GPU is, and raced where one is.
Exit code 0 whenever a verdict was reached, whatever it is; 2 for bad arguments or a broken task file.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import bundle, exchange
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.gpu_tools import ToolFailed
from ke_gym.evaluation.opening import language_for, open_evaluator
from ke_gym.evaluation.profile import feedback
from ke_gym.evaluation.record import MachineRecord
from ke_gym.search.store import Setting, Store
from ke_gym.targets import cpu
from ke_gym.tasks.task import Task


@dataclass
class Args:
    """Judge kernels against a PyTorch reference."""

    task: str | None = None
    """A built-in task's name, or the path of a KernelBench-format file."""
    kernel: tuple[Path, ...] = ()
    """The kernel module, or several."""
    target: str = "cpu"
    """Where to run: cpu, cuda, or cuda:1 for the second GPU. Bundles are for cuda."""
    baseline: Literal["eager", "compile", "max-autotune"] = "eager"
    """What the speedup is against: PyTorch eager, torch.compile (about 20 s more), or its max-autotune mode."""
    threads: int | None = None
    """OpenMP threads for kernel and baseline alike; all cores by default."""
    again: bool = False
    """Measure again even if this machine has judged this very kernel before."""
    proton: bool = False
    """On a GPU: also what a call spends in each kernel, the library's too, by Triton's profiler. Judges anew."""
    json: bool = False
    """Print JSON instead of the table: one object, or a list for several kernels."""
    bundle: Path | None = None
    """With --compile-only: the file that gets the compiled kernels."""
    compile_only: bool = False
    """Compile for a GPU, here or elsewhere, and judge nothing."""
    arch: str = ""
    """The architecture to compile a bundle for (sm_90a if not given)."""
    run_bundle: Path | None = None
    """Judge the kernels of this bundle."""
    results: Path | None = None
    """With --run-bundle: the file that gets the results (by default the bundle's name with .json)."""
    serve: Path | None = None
    """Judge, on this machine's GPU, what searches elsewhere leave in this folder (optimize.py --exchange)."""


KEYS = (
    "task", "target", "language", "candidate", "outcome", "trust", "log", "error", "time_ms", "reference_ms",
    "speedup", "speedup_ci", "baseline", "kernel_coverage", "limiter", "cost",
)  # fmt: skip


def main(args: Args) -> None:
    console = Console(stderr=args.json)
    if args.proton and (args.target == "cpu" or args.run_bundle or args.serve or args.bundle):
        raise UserError(
            "--proton looks at what this machine's GPU judges, without bundles: choose --target cuda"
        )
    if args.run_bundle is not None:
        race_bundle(args, console)
        return
    if args.serve is not None:
        serve(args, args.serve, console)
        return
    if args.task is None or not args.kernel:
        raise UserError("name a --task and at least one --kernel, or a bundle with --run-bundle")
    if args.arch and not args.compile_only:
        raise UserError(
            "--arch is for --compile-only: what is judged here is compiled for the GPU that is here"
        )
    if (args.bundle is None) == args.compile_only:
        raise UserError(
            "--bundle FILE and --compile-only go together: compile now, race with --run-bundle FILE"
        )
    task = Task.load(args.task)
    language = language_for("cuda" if args.compile_only else args.target)
    candidates = [Candidate.from_file(path, language(path)) for path in args.kernel]
    if args.bundle is not None:
        made = bundle.compile_bundle([(str(p), task, c) for p, c in zip(args.kernel, candidates)], args.arch)
        made.write(args.bundle)
        for packed in made.packed:
            said = "compiled" if packed.artifact else f"{packed.outcome} {gist(packed.log)}"
            console.print(Text(f"{packed.label}: {said}"))
        return
    judged = judge(args, task, candidates, console)
    if args.json:
        brief = []
        for one in judged:
            data = json.loads(one.evaluation.to_json())
            times = {} if one.times is None else {"kernel_seconds": one.times}
            brief.append({**{key: data[key] for key in KEYS}, **times})
        print(json.dumps(brief if len(brief) > 1 else brief[0]))
        return
    for one in judged:
        console.print(table(one))


@dataclass
class Judged:
    """A candidate's evaluation, on which machine, whether it was ``known`` before, and seconds by kernel if they were
    asked for."""

    machine: str
    known: bool
    evaluation: Evaluation
    times: dict[str, float] | None = None


def judge(args: Args, task: Task, candidates: list[Candidate], console: Console) -> list[Judged]:
    """All candidates, judged now or before."""
    judged: list[Judged] = []
    status = Text(f"judging {len(candidates)} kernel(s) on {task.name}")
    with Store() as store, console.status(status):
        store.add_task(task)
        if args.target == "cpu" and not args.again:
            facts = cpu.facts()
            threads = facts.cores if args.threads is None else args.threads
            setting = Setting(task.id, "cpu", facts.fingerprint, args.baseline, threads)
            found = [store.evaluation(setting, candidate.id) for candidate in candidates]
            if all(found):
                return [Judged(facts.fingerprint, True, evaluation) for evaluation in found if evaluation]
        with open_evaluator(task, args.target, args.baseline, args.threads) as evaluator:
            machine = evaluator.facts.fingerprint
            setting = Setting(task.id, args.target, machine, args.baseline, evaluator.threads)
            for candidate in candidates:
                known = None if args.again or args.proton else store.evaluation(setting, candidate.id)
                evaluation = known or evaluator.evaluate(candidate)
                store.add_candidate(candidate)
                store.add_evaluation(setting, evaluation, replace=args.again or args.proton)
                judged.append(Judged(machine, known is not None, evaluation))
                if args.proton and evaluation.correct:
                    try:
                        judged[-1].times = evaluator.kernel_times(candidate)
                    except ToolFailed as failure:
                        console.print(Text(str(failure), style="red"))
    return judged


def gist(log: str) -> str:
    """A log in one line: the error at a traceback's end, or else how it begins."""
    lines = log.strip().splitlines() or [""]
    return lines[-1 if lines[0].lstrip().startswith(("File ", "Traceback ")) else 0]


def race_bundle(args: Args, console: Console) -> None:
    """Judge what a bundle holds, and write the results to one file."""
    path = args.run_bundle
    assert path is not None
    read = bundle.Bundle.read(path)
    if not read.packed:
        raise UserError(f"{path} holds no kernel; make one with --bundle FILE --compile-only")
    target = "cuda" if args.target == "cpu" else args.target
    facts: dict[str, object] = {}

    def opened(task: Task) -> Evaluator:
        evaluator = open_evaluator(task, target, args.baseline, args.threads)
        facts.update(vars(evaluator.facts))
        return evaluator

    def tell(judged: bundle.Judged) -> None:
        e = judged.evaluation
        speed = f"{e.speedup:.2f}x over {e.baseline}, {e.time_ms:.4f} ms" if e.speedup and e.time_ms else ""
        said = f"{e.task} {judged.label}: {e.outcome} {speed or gist(e.log)}"
        console.print(Text(said))

    judged = bundle.run_bundle(read, opened, tell)
    results = args.results or path.with_suffix(".json")
    text = bundle.results(judged, facts)
    bundle.write_file(results, text.encode())
    if args.json:
        print(text)


def serve(args: Args, folder: Path, console: Console) -> None:
    """Judge bundles as they appear, until a file called stop does, or Ctrl-C."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    if not torch.cuda.device_count():
        raise UserError("no NVIDIA GPU can be used here; serve the folder on a machine that has one")
    target = "cuda" if args.target == "cpu" else args.target
    console.print(Text(f"judging what appears in {folder}; a file {folder / exchange.STOP} ends it"))
    with contextlib.suppress(KeyboardInterrupt):
        exchange.serve(
            folder,
            lambda task, baseline: open_evaluator(task, target, baseline, args.threads),
            lambda order: console.print(Text(f"answered {order}")),
        )


def table(judged: Judged) -> Table:
    """The verdict for a person."""
    evaluation, record = judged.evaluation, MachineRecord(judged.machine)
    title = Text(f"{evaluation.task}: {evaluation.outcome}", style="table.title")
    shown = Table(title=title, show_header=False, title_justify="left")
    if evaluation.speedup is not None:
        ci = evaluation.speedup_ci
        sure = f", 95 % in [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else ", too few rounds for an interval"
        shown.add_row("speedup", Text(f"{evaluation.speedup:.2f}x over {evaluation.baseline}{sure}"))
        shown.add_row("time", f"{evaluation.reference_ms:.4g} ms → {evaluation.time_ms:.4g} ms")
    if evaluation.error is not None:
        error = evaluation.error
        if error.ratio < 1e300:  # the store keeps infinities as 1e308
            shown.add_row("error", f"{error.rel_l2:.1e} relative L2, {error.ratio:.2g}x the reference's own")
    for line in feedback(evaluation).splitlines()[1:]:
        key, _, value = line.partition(": ")
        if key != "speedup":
            shown.add_row(*map(Text, (key, value) if value and len(key) < 16 else ("", line)))
    cost = evaluation.cost
    shown.add_row(
        "cost", f"compile {cost.compile_s:.2f} s, check {cost.check_s:.2f} s, race {cost.race_s:.2f} s"
    )
    threads = f", {evaluation.threads} threads" if evaluation.target == "cpu" else ""
    shown.add_row("trust", f"{evaluation.trust} lane, sandbox {evaluation.sandbox}{threads}")
    if evaluation.reference_ms is not None:
        shown.add_row("machine", Text(record.sentence(evaluation.reference_ms / 1e3)))
    if judged.times is not None:
        taken = ", ".join(f"{name} {1e6 * seconds:.1f} us" for name, seconds in judged.times.items())
        shown.add_row("Proton", Text(f"{taken} (calls one after the other, caches as they are)"))
    if judged.known:
        shown.add_row("", "judged before on this machine; --again measures anew")
    return shown


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
