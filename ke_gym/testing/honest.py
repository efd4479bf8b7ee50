"""Honest kernels that no evaluation may reject: what the generator writes, and the library's own calls.

For every built-in task, each of the generator's first drafts (fused, unfused, library-heavy: different
algorithms and summation orders for the same task), and the reference itself under another name. And those
written by hand for the small tasks of the exploits: online softmax, Welford, Kahan, packed and blocked products,
workspaces, views, the library mixed with kernels, `ModelNew`, the host lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ke_gym.candidate import Candidate
from ke_gym.codegen import Program
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.tasks import library
from ke_gym.tasks.task import Task

DRAFTS = 3
FOLDER = Path(__file__).parent / "honest_kernels"


@dataclass(frozen=True)
class Honest:
    """One kernel module that computes what its task asks for."""

    name: str
    task: str
    candidate: Candidate


@dataclass(frozen=True)
class Result:
    """How an honest kernel was judged."""

    kernel: Honest
    evaluation: Evaluation

    @property
    def ok(self) -> bool:
        return self.evaluation.correct


def honest(task: Task) -> Iterator[Honest]:
    """The honest kernels of one task."""
    program = Program.from_task(task)
    for number, schedule in enumerate(program.seeds()[:DRAFTS]):
        source = program.emit(schedule)
        yield Honest(f"{task.name}, draft {number}", task.name, Candidate(source, proposer="rewriter"))
    if not task.backward:
        renamed = task.source.replace("class Model(", "class ModelNew(").replace(
            "super(Model", "super(ModelNew"
        )
        yield Honest(f"{task.name}, the reference", task.name, Candidate(renamed))


def handwritten() -> list[Honest]:
    """The kernel modules of ``honest_kernels``, named after their task and what they do."""
    files = sorted(file for file in FOLDER.glob("*.py") if not file.name.startswith("_"))
    return [Honest(f.stem, f.stem.split("__")[0], Candidate.from_file(f)) for f in files]


def run(names: Iterable[str] | None = None) -> list[Result]:
    """Judge the honest kernels of the named tasks, or of the whole library, on the tasks' own sizes."""
    results = []
    for name in names if names is not None else library():
        task = library()[name]
        with Evaluator(task) as evaluator:
            results += [Result(kernel, evaluator.evaluate(kernel.candidate)) for kernel in honest(task)]
    return results
