"""Kernels compared and timed on a GPU, in a process that is replaced when one of them hangs or faults."""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import lanes
from benchmarks.forms import Failed, Form
from ke_gym.evaluation.gpu_stage import TRIES
from ke_gym.evaluation.gpu_timing import Stopwatch
from ke_gym.languages.artifact import Artifact
from ke_gym.targets import cuda
from ke_gym.targets.cuda_driver import Clocks, Driver
from ke_gym.targets.cuda_executor import CudaRunner
from ke_gym.tasks.reference import Reference
from ke_gym.tasks.task import Task

COMPILED = "max-autotune-no-cudagraphs"
"""The mode of ``torch.compile`` that forms are raced against."""
WRONG = 5e-2
"""Relative L2 error above which a kernel is wrong."""
ROUNDS, RACE_SECONDS = 60, 10.0
PATIENCE = 25.0
"""Seconds without an answer after which the process that has the GPU is given up."""
_CALLS, _WARM, _SEED = 7, 2, 3


class Over(Exception):
    """There is no time left."""


@dataclass(frozen=True)
class Raced:
    """A form's microseconds, the compiled reference's in the same rounds, the median of their ratios."""

    us: float
    compiled_us: float
    over: float


class Trial:
    """A task on the GPU of this process: its reference, one drawing of its inputs, a clock."""

    def __init__(self, task: Task) -> None:
        relaxed = task.precision != "strict"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = relaxed
        self._device = torch.device("cuda", 0)
        self._contract = task.contract("cuda")
        self._reference = task.reference(self._contract, device="cuda")
        self._inputs = task.inputs(self._contract, _SEED, device="cuda")
        self._state = {name: tensor.detach() for name, tensor in self._reference.state.items()}
        self._driver = Driver()
        facts = cuda.facts(0)
        self._watch = Stopwatch(self._device, facts.l2_bytes, Clocks(facts.uuid))

    def eager(self) -> float:
        """Microseconds of the reference as it is."""
        return self._time(lambda: self._reference(*self._inputs))

    def compiled(self) -> float:
        """Microseconds of the compiled reference, which is compiled or loaded now."""
        return self._time(lambda: self._rival(*self._inputs))

    def look(self, form: Form) -> tuple[float, float | None]:
        """The form's error on the drawing, and its microseconds unless it is wrong."""
        with self._running(form) as run:
            error = max(relative(got, wanted) for got, wanted in zip(run(), self._wanted, strict=True))
            return error, self._time(run) if error <= WRONG else None

    def race(self, *forms: Form) -> list[Raced]:
        """The forms and the compiled reference, each called once in every round, in random order."""
        with ExitStack() as stack:
            runs = [stack.enter_context(self._running(form)) for form in forms]
            clocks = [self._clock(run) for run in (lambda: self._rival(*self._inputs), *runs)]
            times: list[list[float]] = [[] for _ in clocks]
            end = time.monotonic() + RACE_SECONDS
            for number in range(ROUNDS):
                for i in random.sample(range(len(clocks)), len(clocks)):
                    times[i].append(clocks[i]())
                if number >= _CALLS and time.monotonic() > end:
                    break
        rival, *ours = times
        return [Raced(median(t), median(rival), median(r / own for r, own in zip(rival, t))) for t in ours]

    @functools.cached_property
    def _rival(self) -> Reference:
        return self._reference.compiled(COMPILED)

    @functools.cached_property
    def _wanted(self) -> list[Tensor]:
        return [tensor.detach() for tensor in self._reference(*self._inputs)]

    @contextmanager
    def _running(self, form: Form) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        artifact = Artifact.from_bytes(form.artifact)
        runner = CudaRunner(
            artifact, self._contract, self._inputs, self._state, driver=self._driver, device=self._device
        )
        try:
            runner.prepare()
            yield runner.run
            torch.cuda.synchronize()
        finally:
            runner.close()

    def _time(self, run: Callable[[], object]) -> float:
        once = self._clock(run)
        return median([once() for _ in range(_WARM + _CALLS)][_WARM:])

    def _clock(self, run: Callable[[], object]) -> Callable[[], float]:
        """Microseconds of one call, as the evaluator times it, once it has run a few times."""
        for _ in range(_WARM):
            run()

        def once() -> float:
            for _ in range(TRIES):
                sample = self._watch.time(run, PATIENCE)
                if sample.hidden:
                    break
            return 1e6 * sample.seconds

        return once


def relative(got: Tensor, wanted: Tensor) -> float:
    """The relative L2 error, of integers the share that differs; infinite where one has no number."""
    if not wanted.is_floating_point():
        return float((got != wanted).double().mean())
    away = torch.where(got == wanted, 0.0, got.double() - wanted.double()).norm()
    error = float(away / wanted.double().nan_to_num(0.0, 0.0, 0.0).norm().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


@dataclass(frozen=True)
class Job:
    """What the process that has the GPU does next: a method of ``Trial``, for a task."""

    what: str
    task: bytes
    forms: tuple[Form, ...] = ()


_LAST: dict[bytes, Trial] = {}


@torch.no_grad()
def answer(job: Job) -> Any:
    """Do the job; the task's trial is kept for the next. Raises ``Failed``."""
    try:
        if job.task not in _LAST:
            _LAST.clear()
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
            _LAST[job.task] = Trial(Task.from_bytes(job.task))
        return getattr(_LAST[job.task], job.what)(*job.forms)
    except Exception as error:  # not all of them pickle
        raise Failed(f"{type(error).__name__}: {error}") from None


class Bench:
    """The process that has the GPU: another one after a form that hung or left the device in doubt.

    ``answers`` does the jobs there. Nothing goes on after ``end``, by the monotonic clock.
    """

    def __init__(
        self,
        lane: lanes.Lane,
        end: float = math.inf,
        answers: Callable[[Job], Any] = answer,
        patience: float = PATIENCE,
    ) -> None:
        self._lane, self._end, self._answers, self._patience = lane, end, answers, patience

    def ask(self, what: str, task: Task, *forms: Form) -> Any:
        """The answer to a ``Job``. Raises ``Failed``, or ``Over`` if there is no time left."""
        try:
            self._lane.run(callable, self._answers, self._end)  # to start and to import is not to hang
            until = min(self._end, time.monotonic() + self._patience)
            return self._lane.run(self._answers, Job(what, task.to_bytes(), forms), until)
        except lanes.Late:
            if time.monotonic() >= self._end:
                raise Over from None
            raise Failed(f"hung, no answer within {self._patience:.0f} s") from None
        except Failed:
            self._look_after_device()
            raise
        except Exception as error:
            self._lane.close()
            raise Failed(str(error)) from None

    def _look_after_device(self) -> None:
        """End the process if a fault has taken its context, or if the device does not come to an end."""
        try:
            self._lane.run(torch.cuda.synchronize, None, time.monotonic() + self._patience)
        except Exception:
            self._lane.close()
