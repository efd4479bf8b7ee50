"""The process that launches candidates' kernels where these could reach the memory of whoever launches them.

It knows no task, no seed and no expected output: memory comes from the judge's process, opened through the driver, and
what lies there afterwards the judge looks at itself. See ``gpu_apart`` for the judge's side. Whatever a kernel makes of
this process, a system-call filter keeps it to itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ke_gym.evaluation import _seccomp
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.gpu_lending import await_go, lent, take_device
from ke_gym.evaluation.gpu_stage import Died, first_line, foreign, wait_for
from ke_gym.evaluation.gpu_timing import Stopwatch
from ke_gym.languages.artifact import Artifact
from ke_gym.targets import cuda
from ke_gym.targets._memory import MemoryPlan
from ke_gym.targets.cuda_driver import Clocks, CudaError, Driver
from ke_gym.targets.cuda_executor import CudaRunner

OVER, FAILED = b"o", b"f"
"""The bytes after a timed call: it has ended; or could not begin, and the launcher says why."""


@dataclass
class _Loaded:
    """A plan that is ready to run, and the judge's memory that is open for it, by handle: where it begins."""

    opened: dict[str, int] = field(default_factory=dict)
    runner: CudaRunner | None = None


class Launcher:
    """Answers the judge's requests over ``channel``, one method each, until the judge is gone or the context lost."""

    def __init__(self, channel: Channel, driver: Driver, device: torch.device) -> None:
        self._channel, self._driver, self._device = channel, driver, device
        facts = cuda.facts(device.index or 0)
        self._watch = Stopwatch(device, facts.l2_bytes, Clocks(facts.uuid))
        self._loaded: dict[int, _Loaded] = {}
        self._next = 0

    def serve(self) -> None:
        """Answer until the judge is gone or this process is of no more use."""
        with contextlib.suppress(EOFError):
            self._channel.send({})
            while self._answer():
                pass

    def _answer(self) -> bool:
        """Answer one request; whether this process can answer another. Raises ``EOFError`` once the judge is gone."""
        header, blob = self._channel.recv(timeout=None)
        request = getattr(self, header.pop("do"))
        try:
            with foreign():
                answer = request(**header, **({"blob": blob} if blob else {})) or {}
        except Died as died:
            answer = {"died": died.outcome, "log": died.log[:4000], "fatal": died.fatal}
        self._channel.send(answer)
        return not answer.get("fatal", False)

    # -- requests --------------------------------------------------------------------------------------------

    def probe(self, tensor: list[Any]) -> None:
        """Add one to the judge's tensor: whether memory can be shared at all."""
        probe = _Loaded()
        self._tensor(probe, tensor).add_(1)
        torch.cuda.synchronize(self._device)
        self._close(probe)

    def seal(self) -> None:
        """From here on the system-call filter holds, where this machine's calls are known."""
        if _seccomp.supported():
            _seccomp.install(may_spawn=False)

    def load(
        self,
        shape_set: str,
        inputs: list[Any],
        state: dict[str, Any],
        outputs: list[Any],
        arena: list[Any] | None,
        memory: dict[str, Any] | None,
        prepared: list[Any] | None,
        preparing: list[Any] | None,
        blob: bytes,
    ) -> dict[str, Any]:
        """Load an artifact's kernels for memory of the judge's; the number they go by."""
        artifact, loaded = Artifact.from_bytes(blob), _Loaded()
        try:
            loaded.runner = CudaRunner(
                artifact,
                shape_set,
                [self._tensor(loaded, each) for each in inputs],
                {name: self._tensor(loaded, each) for name, each in state.items()},
                driver=self._driver,
                device=self._device,
                outputs=[self._tensor(loaded, each) for each in outputs],
                arena=None if arena is None else self._tensor(loaded, arena),
                memory=None if memory is None else _memory_plan(memory),
                prepared=None if prepared is None else [self._tensor(loaded, each) for each in prepared],
                preparing=None
                if preparing is None
                else (self._tensor(loaded, preparing[0]), _memory_plan(preparing[1])),
            )
        except BaseException:  # this process may go on: not what others lent may stay open
            self._close(loaded)
            raise
        self._next += 1
        self._loaded[self._next] = loaded
        return {"number": self._next, "capturable": loaded.runner.capturable}

    def unload(self, number: int) -> None:
        loaded = self._loaded.pop(number)
        self._runner(loaded).close()
        self._close(loaded)

    def place(self, number: int, inputs: list[Any], state: dict[str, Any], outputs: list[Any]) -> None:
        """See ``CudaRunner.place``."""
        loaded = self._loaded[number]
        self._runner(loaded).place(
            [self._tensor(loaded, each) for each in inputs],
            {name: self._tensor(loaded, each) for name, each in state.items()},
            [self._tensor(loaded, each) for each in outputs],
        )

    def run(self, number: int, patience: float) -> None:
        wait_for(self._runner(self._loaded[number]).run, patience, self._device)

    def prepare(self, number: int, patience: float, state: dict[str, Any]) -> None:
        """See ``CudaRunner.prepare``."""
        loaded = self._loaded[number]
        given = {name: self._tensor(loaded, each) for name, each in state.items()}
        wait_for(lambda: self._runner(loaded).prepare(given), patience, self._device)

    def time(self, number: int, what: str, patience: float, queue_s: float) -> dict[str, Any]:
        """One timed call of ``run`` or ``prepare``, between the judge's ``GO`` and ``OVER``; number 0 does nothing."""
        does: Callable[[], object] = _nothing
        if number:
            runner = self._runner(self._loaded[number])
            does = runner.prepare if what == "prepare" else runner.run
        self._watch.queue_s = queue_s
        try:
            sample = self._watch.time(does, patience, self._begin, self._over)
        except BaseException:
            self._channel.sock.send(FAILED)
            raise
        late = sample.seconds - sample.device_s
        return {
            "device_s": sample.device_s,
            "late": late,
            "hidden": sample.hidden,
            "queue_s": self._watch.queue_s,
        }

    def fill_scratch(self, number: int, byte: int) -> None:
        self._runner(self._loaded[number]).fill_scratch(byte)
        torch.cuda.synchronize(self._device)

    def step_times(self, number: int) -> dict[str, Any]:
        return {"steps": self._runner(self._loaded[number]).step_times()}

    def resources(self, number: int) -> dict[str, Any]:
        return {"resources": self._runner(self._loaded[number]).resources()}

    # -- plumbing --------------------------------------------------------------------------------------------

    @staticmethod
    def _runner(loaded: _Loaded) -> CudaRunner:
        assert loaded.runner is not None
        return loaded.runner

    def _tensor(self, loaded: _Loaded, described: list[Any]) -> Tensor:
        """The tensor that ``gpu_lending.described`` tells of, opened for ``loaded``."""
        return lent(self._driver, self._device, loaded.opened, described)

    def _close(self, loaded: _Loaded) -> None:
        for begin in loaded.opened.values():
            self._driver.close_shared(begin)

    def _begin(self) -> None:
        await_go(self._channel.sock)

    def _over(self) -> None:
        self._channel.sock.send(OVER)


def _nothing() -> None:
    """What the timing of a call adds to it is timed with this."""


def _memory_plan(data: dict[str, Any]) -> MemoryPlan:
    offsets, lengths = ({int(k): int(v) for k, v in data[name].items()} for name in ("offsets", "lengths"))
    return MemoryPlan(offsets, lengths, data["size"])


def serve(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of the process; ``fds`` holds its end of the connection to the judge."""
    link, device = Channel(socket.socket(fileno=fds[0])), take_device(args)
    try:
        torch.cuda.set_device(device)
        torch.set_default_device(device)
        launcher = Launcher(link, Driver(), device)
    except (RuntimeError, OSError, AssertionError, CudaError) as error:
        link.send({"died": "runtime", "log": first_line(error), "fatal": True})
    else:
        launcher.serve()
    os._exit(0)  # a lost context cannot be torn down in order
