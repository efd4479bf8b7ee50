"""A live environment whose kernels are lists of numbers: everything but proposals and verdicts is real."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from ke_gym.candidate import Candidate
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.work import Work
from ke_gym.languages.plan import TensorSpec
from ke_gym.targets.cpu import Facts, Peaks
from ke_gym.tasks import Task
from tests.search.fakes import FakeProposer, judge

FACTS = Facts("m", "x86_64", 8, 32 << 10, 1 << 20, 32 << 20, 512, False)
PEAKS = Peaks(8, ((1 << 18, 1e12), (1 << 29, 1e11)), 1e12, 5e11)


class FakeEvaluator:
    """Counts who is open, and whether two tasks are ever judged at once."""

    open_now: list[str] = []
    judging: list[str] = []
    mixed = False
    lock = threading.Lock()

    def __init__(self, task: Task) -> None:
        self.task, self.target, self.threads = task, "cpu", 1
        self.facts, self.peaks = FACTS, PEAKS
        self.contract, self.shape_sets = "default", ["default"]
        work, spec = Work(1e6, 1e7, 1e7, 1.0), TensorSpec((64,), (1,), "float32")
        self.judge = SimpleNamespace(shapes={"default": SimpleNamespace(work=work, inputs=(spec,))})
        self.open_now.append(task.name)

    def build(self, candidate: Candidate) -> Any:
        return SimpleNamespace(binary_id=candidate.id)

    def evaluate(self, candidate: Candidate, incumbent: Candidate | None = None) -> Evaluation:
        with self.lock:
            self.judging.append(self.task.name)
            FakeEvaluator.mixed |= len(set(self.judging)) > 1
        try:
            return judge(candidate, incumbent)
        finally:
            with self.lock:
                self.judging.remove(self.task.name)

    def close(self) -> None:
        self.open_now.remove(self.task.name)


class LosingEvaluator(FakeEvaluator):
    """Loses every evaluation after the first draft, ``losses`` times."""

    losses = 1

    def evaluate(self, candidate: Candidate, incumbent: Candidate | None = None) -> Evaluation:
        if LosingEvaluator.losses and incumbent is not None:
            LosingEvaluator.losses -= 1
            raise EOFError("the worker is gone")
        return super().evaluate(candidate, incumbent)


def fake_proposer(task: Task) -> FakeProposer:
    return FakeProposer()


FAKE: dict[str, Any] = {"proposer": fake_proposer, "open_evaluator": FakeEvaluator}
