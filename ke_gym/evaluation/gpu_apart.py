"""The judge's side of the process that launches kernels for it: see ``gpu_launcher``.

Only where kernels can reach ordinary memory of the process that launches them (``pageableMemoryAccess``). All memory
that kernels are given is the judge's, lent through the driver; contents, references, oracle, seeds, statistics and the
clock that has the last word stay here. What the launcher says of times is checked against that clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ke_gym.evaluation.channel import Channel, ProtocolError
from ke_gym.evaluation.gpu_launcher import OVER
from ke_gym.evaluation.gpu_lending import GO, READY, described
from ke_gym.evaluation.gpu_stage import Died
from ke_gym.evaluation.gpu_timing import Hung, Sample, settled, spin_s
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Plan
from ke_gym.targets._memory import MemoryPlan
from ke_gym.targets.cuda_driver import CudaError, Driver

START_SECONDS = 60.0
GRACE_SECONDS = 10.0
NULL_CALLS = 9
QUEUE_S, STEP_QUEUE_S = 100e-6, 40e-6
"""What enqueuing a call may take at the most, and each of its steps: what is beyond is not taken off the time."""
RESOURCES = ("registers", "local", "shared", "threads", "dynamic", "blocks")
_OUTCOMES = ("constraints", "runtime", "timeout")


class Unfit(Exception):
    """Kernels cannot be launched from another process here; why."""


class Apart:
    """The connection to a launcher. Raises ``Died`` for what a candidate's device code does to it.

    ``patience`` are the seconds that the next run may take. Raises ``Unfit`` if memory cannot be shared.
    """

    def __init__(self, channel: Channel, driver: Driver, device: torch.device) -> None:
        self._channel, self._driver, self._device = channel, driver, device
        self._queue_s = 0.0
        self._null_s = 0.0
        self.patience = GRACE_SECONDS
        try:
            self._receive(START_SECONDS)
            self._lend()
            self.ask("seal")
            self._lend()
            self._time_nothing()
        except CudaError as error:
            raise Unfit(str(error)) from error
        except Died as died:
            raise Unfit(died.log) from died

    def _lend(self) -> None:
        probe = torch.zeros(1024, device=self._device)
        self.ask("probe", tensor=self.described(probe))
        if not bool((probe == 1).all()):
            raise Unfit("memory lent to another process is not the same there")

    def runner(
        self,
        artifact: Artifact,
        shape_set: str,
        inputs: Sequence[Tensor],
        state: Mapping[str, Tensor],
        outputs: Sequence[Tensor],
        arena: Tensor | None = None,
        memory: MemoryPlan | None = None,
        prepared: Sequence[Tensor] | None = None,
        preparing: tuple[Tensor, MemoryPlan] | None = None,
    ) -> ApartRunner:
        """See ``CudaRunner``."""
        answer = self.ask(
            "load",
            artifact.to_bytes(),
            shape_set=shape_set,
            arena=None if arena is None else self.described(arena),
            memory=None if memory is None else vars(memory),
            prepared=None if prepared is None else [self.described(tensor) for tensor in prepared],
            preparing=None if preparing is None else [self.described(preparing[0]), vars(preparing[1])],
            **self.placement(inputs, state, outputs),
        )
        return ApartRunner(self, artifact, shape_set, answer, arena, memory)

    def time(
        self,
        runner: ApartRunner | None,
        what: str,
        patience: float,
        mhz: int,
        over: Callable[[], object] = int,
    ) -> Sample:
        """One timed call of ``what`` a runner does; its time is what the launcher claims unless the clock here says more.

        ``over`` is called as soon as that clock stands, before the launcher is listened to any further.
        """
        torch.cuda.synchronize(self._device)
        number, most_s = (0, QUEUE_S) if runner is None else (runner.number, runner.queue_s)
        queue_s = min(self._queue_s, most_s)
        self._send("time", number=number, what=what, patience=patience, queue_s=queue_s)
        self._await(READY, GRACE_SECONDS)
        begin = time.perf_counter()
        try:
            self._channel.sock.send(GO)
        except OSError as error:
            raise Died("runtime", "the process that launches kernels is gone") from error
        self._await(OVER, patience + GRACE_SECONDS)
        wall = time.perf_counter() - begin
        over()
        said = self._receive(GRACE_SECONDS)
        host_s = max(0.0, wall - spin_s(queue_s) - self._null_s)
        with sense():
            self._queue_s = max(0.0, float(said["queue_s"]))
            device_s = min(wall, max(1e-9, float(said["device_s"])))
            late, hidden = min(wall, max(0.0, float(said["late"]))), bool(said["hidden"])
        return Sample(settled(device_s + late, host_s), device_s, host_s, hidden, mhz)

    def _time_nothing(self) -> None:
        """What the way to the launcher and back adds to a call. Nothing foreign is loaded yet."""
        samples = [self.time(None, "", GRACE_SECONDS, 0) for _ in range(NULL_CALLS)]
        self._null_s = sorted(sample.host_s or 0.0 for sample in samples)[NULL_CALLS // 2]

    # -- plumbing --------------------------------------------------------------------------------------------

    def placement(
        self, inputs: Sequence[Tensor], state: Mapping[str, Tensor], outputs: Sequence[Tensor]
    ) -> dict[str, Any]:
        return {
            "inputs": [self.described(tensor) for tensor in inputs],
            "state": {name: self.described(tensor) for name, tensor in state.items()},
            "outputs": [self.described(tensor) for tensor in outputs],
        }

    def described(self, tensor: Tensor) -> list[Any]:
        """See ``gpu_lending.described``."""
        return described(self._driver, tensor)

    def ask(self, do: str, blob: bytes = b"", **arguments: Any) -> dict[str, Any]:
        torch.cuda.synchronize(self._device)  # what is in the memory lent is what was put there
        self._send(do, blob, **arguments)
        return self._receive(self.patience + GRACE_SECONDS)

    def _send(self, do: str, blob: bytes = b"", **arguments: Any) -> None:
        try:
            self._channel.send({"do": do, **arguments}, blob)
        except (EOFError, TimeoutError) as error:
            raise Died("runtime", "the process that launches kernels is gone") from error

    def _receive(self, timeout: float) -> dict[str, Any]:
        try:
            answer, _ = self._channel.recv(timeout, limit=0)
        except TimeoutError as error:
            raise Hung(timeout) from error
        except (EOFError, ProtocolError) as error:
            raise Died("runtime", "the process that launches kernels died") from error
        if "died" in answer:
            with sense():
                log, fatal = str(answer["log"]), bool(answer["fatal"])
                outcome = _OUTCOMES[_OUTCOMES.index(answer["died"])]
            raise Died(outcome, log, fatal)
        return answer

    def _await(self, wanted: bytes, timeout: float) -> None:
        try:
            byte = self._channel.recv_byte(timeout)
        except TimeoutError as error:
            raise Hung(timeout) from error
        if byte != wanted:
            self._receive(GRACE_SECONDS)  # raises what went wrong
            raise _nonsense()


@contextmanager
def sense() -> Iterator[None]:
    """What the launcher said is read inside. Raises ``Died`` where it is not what was asked for."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise _nonsense() from error


def _nonsense() -> Died:
    return Died("runtime", "the process that launches kernels answered nonsense")


class ApartRunner:
    """A ``CudaRunner`` in the launcher's process; what it runs has ended when a method returns."""

    def __init__(
        self,
        apart: Apart,
        artifact: Artifact,
        shape_set: str,
        answer: dict[str, Any],
        arena: Tensor | None,
        memory: MemoryPlan | None,
    ) -> None:
        self._apart = apart
        with sense():
            self.number, self.capturable = int(answer["number"]), bool(answer["capturable"])
        self.plan = artifact.plans[shape_set]
        self.queue_s = QUEUE_S + STEP_QUEUE_S * max(_steps(self.plan), _steps(self.plan.preparation))
        """Seconds that enqueuing a call may take."""
        self._arena, self._memory = arena, memory
        self.step_names: list[str] = []

    @property
    def arena(self) -> Tensor:
        """The memory of the intermediates, if it was given."""
        assert self._arena is not None
        return self._arena

    @property
    def memory(self) -> MemoryPlan:
        assert self._memory is not None
        return self._memory

    @property
    def patience(self) -> float:
        """Seconds that the next run may take."""
        return self._apart.patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._apart.patience = seconds

    def timed(self, what: str, patience: float, mhz: int, over: Callable[[], object] = int) -> Sample:
        """See ``Apart.time``."""
        return self._apart.time(self, what, patience, mhz, over)

    def run(self) -> None:
        self._apart.ask("run", number=self.number, patience=self._apart.patience)

    def prepare(self, state: Mapping[str, Tensor]) -> None:
        given = self._apart.placement([], state, [])["state"]
        self._apart.ask("prepare", number=self.number, patience=self._apart.patience, state=given)

    def place(self, inputs: Sequence[Tensor], state: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> None:
        self._apart.ask("place", number=self.number, **self._apart.placement(inputs, state, outputs))

    def fill_scratch(self, byte: int) -> None:
        self._apart.ask("fill_scratch", number=self.number, byte=byte)

    def step_times(self) -> list[tuple[str, float]]:
        answer = self._apart.ask("step_times", number=self.number)
        with sense():
            steps = [(str(name), float(seconds)) for name, seconds in answer["steps"]]
        self.step_names = [name for name, _ in steps]
        return steps

    def resources(self) -> dict[str, dict[str, int]]:
        answer = self._apart.ask("resources", number=self.number)
        with sense():
            found = answer["resources"].items()
            return {name: {what: int(taken[what]) for what in RESOURCES} for name, taken in found}

    def close(self) -> None:
        self._apart.ask("unload", number=self.number)


def _steps(plan: Plan | None) -> int:
    return 0 if plan is None else len(plan.steps)
