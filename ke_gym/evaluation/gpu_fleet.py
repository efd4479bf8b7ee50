"""Several GPUs for one search: every candidate is judged on whichever is free.

Each GPU has an evaluator of its own: a judge process, a lock that this process holds while it measures, records of
its own noise. Builds are shared and keep to the processor's cores. A candidate and its incumbent are raced against
each other and the baseline in one process on one device, so what is reported, ratios, does not depend on which it
was; for this all GPUs are of one kind.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.gpu_client import GpuClient
from ke_gym.evaluation.gpu_evaluator import GpuEvaluator
from ke_gym.evaluation.race import Race
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.languages.artifact import Artifact
from ke_gym.targets import cuda
from ke_gym.tasks.task import Task

T = TypeVar("T")


def open_gpus(task: Task, target: str = "cuda", baseline: str = "eager", **options: Any) -> Evaluator:
    """The evaluator for all GPUs like the first that CUDA shows; see ``GpuEvaluator`` for options and errors."""
    first = GpuEvaluator(task, target, baseline, **options)
    others = [number for number in first.alike if number != 0]
    return GpuFleet(first, others) if others else first


class GpuFleet(Evaluator):
    """Judges candidates for one task on the GPU of ``first`` and on those with the numbers ``others``.

    The others open meanwhile and join when they are ready; one that can't be opened, or is lost later, is left out
    with a warning. Raises ``UserError`` once none is left. ``devices`` are at work at once.
    """

    facts: cuda.Facts  # type: ignore[assignment]

    def __init__(self, first: GpuEvaluator, others: Sequence[int]) -> None:
        self._first = first
        self.task, self.target, self.baseline = first.task, first.target, first.baseline
        self.threads, self.folder = first.threads, first.folder
        self.facts, self.record, self.sandbox = first.facts, first.record, first.sandbox
        self.zygote, self.builder = first.zygote, first.builder
        self.shape_sets, self.hidden, self.contract = first.shape_sets, first.hidden, first.contract
        self.build_timeout, self.call_timeout = first.build_timeout, first.call_timeout
        self._cores, self._builds, self.account = first._cores, first._builds, first.account
        self.devices = 1 + len(others)
        self._turn = threading.Condition()
        self._opened, self._members = [first], [first]
        self._free = [first]
        self._opening = len(others)
        self._closed = False
        self._lost: UserError | None = None
        self._state = ExitStack()
        self._state.callback(self._close_all)
        pool = self._state.enter_context(ThreadPoolExecutor(len(others), thread_name_prefix="open-gpu"))
        for number in others:
            pool.submit(self._join, number)

    @property
    def judge(self) -> GpuClient:  # type: ignore[override]
        """The first GPU's: what it says of the task holds for all."""
        return self._first.judge

    @property
    def peaks(self) -> cuda.Peaks:  # type: ignore[override]
        """The first GPU's."""
        return self._first.peaks

    def prove(self) -> Proof | None:
        """See ``Evaluator.prove``; on the first GPU."""
        return self._first.prove()

    def ready(self) -> None:
        """See ``Evaluator.ready``."""
        with self._turn:
            self._turn.wait_for(lambda: not self._opening)

    def build(self, candidate: Candidate) -> Artifact:
        """See ``Evaluator.build``."""
        return self._first.build(candidate)

    def settled(self, candidate: Candidate) -> Artifact:
        """See ``Evaluator.settled``; all GPUs' choices are shared."""
        return self._first.settled(candidate)

    def decide(self, candidate: Candidate, rival: Candidate) -> Evaluation:
        """See ``Evaluator.decide``; on the first GPU, whose record this one shows."""
        with self._one(self._first) as member:
            return member.decide(candidate, rival)

    def ahead(self, candidate: Candidate, rival: Candidate) -> bool:
        """See ``Evaluator.ahead``; on the first GPU, whose record this one shows."""
        return self._on_one(lambda member: member.ahead(candidate, rival), self._first)

    def final(self, candidate: Candidate) -> Evaluation:
        """See ``Evaluator.final``."""
        return self._on_one(lambda member: member.final(candidate))

    def race_baseline(self, candidate: Candidate) -> tuple[float, tuple[float, float]]:
        """See ``Evaluator.race_baseline``; on the first GPU."""
        with self._one(self._first) as member:
            return member.race_baseline(candidate)

    def kernel_times(self, candidate: Candidate) -> dict[str, float]:
        """See ``Evaluator.kernel_times``; on the first GPU."""
        with self._one(self._first) as member:
            return member.kernel_times(candidate)

    def compile_baseline(self, baseline: str) -> None:
        """See ``Evaluator.compile_baseline``; on the first GPU alone, for ``race_baseline``: verdicts' baseline stays."""
        with self._one(self._first) as member:
            member.compile_baseline(baseline)

    def aa_race(self, artifact: Artifact) -> Race:
        """See ``Evaluator.aa_race``; on the first GPU, whose record this one shows."""
        with self._one(self._first) as member:
            return member.aa_race(artifact)

    def _judged(
        self, base: Evaluation, artifact: Artifact, rival: Artifact | None, absent: str
    ) -> Evaluation:
        return self._on_one(lambda member: member._judged(base, artifact, rival, absent))

    # -- who is free -----------------------------------------------------------------------------------------

    def _on_one(self, act: Callable[[GpuEvaluator], T], wanted: GpuEvaluator | None = None) -> T:
        """``act`` on a GPU that is free (see ``_one``); if that one is lost meanwhile, on another."""
        while True:
            with self._one(wanted) as member:
                try:
                    return act(member)
                except UserError as error:
                    self._leave(member, error)

    @contextmanager
    def _one(self, wanted: GpuEvaluator | None = None) -> Iterator[GpuEvaluator]:
        """A GPU that nobody else uses: ``wanted``, if it still takes part.

        Raises the last one's ``UserError`` if there is none left.
        """

        def able() -> list[GpuEvaluator]:
            return [m for m in self._free if m is wanted or wanted not in self._members]

        with self._turn:
            self._turn.wait_for(lambda: able() or not (self._members or self._opening))
            if not self._free:
                assert self._lost is not None
                raise self._lost
            member = able()[0]
            self._free.remove(member)
        try:
            yield member
        finally:
            with self._turn:
                if member in self._members:
                    self._free.append(member)
                self._turn.notify_all()

    def _join(self, number: int) -> None:
        first, member = self._first, None
        problem: Exception | None = None
        try:
            if not self._closed:
                member = GpuEvaluator(
                    self.task, self.target, self.baseline, self.threads, self.folder,
                    build_timeout=self.build_timeout, call_timeout=self.call_timeout, device=number, beside=first,
                )  # fmt: skip
        except Exception as error:
            problem = error
        finally:
            with self._turn:
                self._opening -= 1
                if member is not None:
                    self._opened.append(member)
                    self._members.append(member)
                    self._free.append(member)
                self._turn.notify_all()
        if problem is not None:
            self._tell(f"GPU {number}", problem)

    def _leave(self, member: GpuEvaluator, error: UserError) -> None:
        with self._turn:
            self._members.remove(member)
            self._lost = error
        member.judge.close()  # no more: the others share the first one's processes
        self._tell(f"GPU {member.facts.uuid}", error)

    def _tell(self, which: str, error: Exception) -> None:
        self.devices -= 1
        warnings.warn(f"{which} takes no further part in this search: {error}", stacklevel=2)

    def _close_all(self) -> None:
        for member in reversed(self._opened):
            member.close()

    def close(self) -> None:
        """See ``Evaluator.close``."""
        self._closed = True
        super().close()
