"""The judge's side of the host lane on a GPU: a module's own Python in a locked-in process, on memory lent to it.

That process (``_gpu_host``) may do what it likes, so nothing it says is believed:

- it is stopped whenever the clock does not run, and inputs are put into the memory it works on only then;
- before they are, and when a call is over, its device is seen to be idle: no kernel of its may wait there for what comes,
  or be in the way of whoever has the device next; what begins once they are there, as a stream may that waits for memory,
  is part of the call;
- the clock is the judge's, from when it goes on until it has stopped and the device does nothing any more, which shows in
  how quickly the judge's own work is done there; less the least that any call takes, as a process beside it shows, which
  nothing foreign is ever loaded into;
- where its outputs lie it tells; what they are the judge looks at while it is stopped.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ke_gym.evaluation.channel import Channel, ProtocolError
from ke_gym.evaluation.gpu_client import GONE
from ke_gym.evaluation.gpu_lending import GO, READY, described
from ke_gym.evaluation.gpu_memory import Block, Placement, damaged, poison, taken_elsewhere
from ke_gym.evaluation.gpu_stage import Crowded, Died, ShapeSet, Stage, copy_all
from ke_gym.evaluation.gpu_timing import Sample
from ke_gym.evaluation.leash import Leash
from ke_gym.languages.plan import Plan, TensorSpec
from ke_gym.targets._memory import MemoryPlan, view
from ke_gym.targets.cuda_driver import CudaError, at_address

START_SECONDS, LOAD_SECONDS, GRACE_SECONDS = 60.0, 60.0, 10.0
NULL_CALLS = 15
SPINS = 20_000
"""So often the judge looks for an answer without sleeping: some 20 ms, beyond which waking up does not matter."""
RESOLUTION_S = 20e-6
"""A call that takes less cannot be told from the least there can be, and counts as this."""
IDLE_S, BUSY_S = 0.15e-3, 0.1
"""A device that does nothing answers in less at the second try; for up to 14 ms not, while the driver makes contexts. One
where somebody's kernel does not end takes 0.2 ms at the least, mostly 1 to 2.4, which is its slice of time (an H200)."""
QUIET = 15
"""So often in a row a device must answer quickly for nothing to have begun there: 0.3 ms, longer than it takes to change
from one context to another."""
MAPPINGS = 16
"""Allocations of the process that are kept open at the most."""


class HostProcess:
    """One such process; ``link`` and ``leash`` lead to it. Methods raise ``Died``: nothing is asked of it then any more,
    and the judge lives on.
    """

    _request = "timed"

    def __init__(self, link: Channel, leash: Leash, stage: Stage) -> None:
        self._link, self._leash = link, leash
        self._driver, self._device, self._watch = stage.driver, stage.device, stage.watch
        self._mark = torch.zeros(1, device=stage.device)
        self._mapped: dict[str, tuple[int, int]] = {}
        self._lost: tuple[str, str] | None = None
        self._loaded = False
        self._early_s = 0.0
        self._outputs = [self._mark.clone()]
        try:
            self._receive(START_SECONDS)
        except Died as died:
            self.close()
            kind = Crowded if isinstance(died, Crowded) else Died
            said = f"forward cannot be traced, and its Python cannot be run on this GPU: {died.log}"
            raise kind("constraints", said, fatal=False) from died

    def close(self) -> None:
        """Let go of the process, which whoever started it ends."""
        self._unmap()
        self._link.close()
        self._leash.close()

    def _fill(self) -> None:
        """Put a call's contents where it takes them from. It stands still."""

    def _call(self, patience: float, timed: bool) -> float:
        """One call on fresh contents, and where the outputs go; the seconds until the device was free again."""
        if self._lost is not None:
            raise Died(*self._lost, fatal=False)
        self._ready(patience)
        if timed:
            self._idle()
        self._fill()
        torch.cuda.synchronize(self._device)
        self._early_s = self._begun() if timed else 0.0
        if timed:
            self._watch.flush()
            torch.cuda.synchronize(self._device)
        seconds = self._early_s + self._go(patience)
        answer = self._receive(GRACE_SECONDS)
        told = answer.get("outputs")
        if not isinstance(told, list) or len(told) != len(self._outputs):
            raise self._nonsense()
        for each, output in zip(told, self._outputs):
            output.copy_(self._opened(each, TensorSpec.of(output)))
        torch.cuda.synchronize(self._device)
        return seconds

    def _ready(self, patience: float) -> None:
        """Let the process come to where it waits for ``GO``, and stop it there."""
        self._leash.thaw()
        self._send({"do": self._request})
        try:
            self._link.wait(patience + GRACE_SECONDS)
        except TimeoutError:
            raise self._timed_out(patience) from None
        try:
            ready = self._link.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            raise self._end("runtime", GONE) from None
        if ready != READY:
            self._receive(GRACE_SECONDS)  # raises what went wrong
            raise self._nonsense()
        self._link.sock.recv(1)
        self._leash.freeze()

    def _go(self, patience: float) -> float:
        link, leash = self._link, self._leash
        if link.readable():
            raise self._nonsense()  # an answer to a call that has not been made
        begin = time.perf_counter()
        try:
            link.sock.send(GO)
        except OSError:
            raise self._end("runtime", GONE) from None
        leash.thaw()
        try:
            for _ in range(SPINS):
                if link.readable():
                    break
            else:
                link.wait(patience)
        except TimeoutError:
            raise self._timed_out(patience) from None
        leash.freeze()
        return self._idle() - begin

    def _idle(self) -> float:
        """Wait until the device does nothing; when that was, by the clock here.

        The first touch brings the judge's context back and tells nothing.
        """
        start = time.perf_counter()
        self._touch_device()
        now = time.perf_counter()
        while now < start + BUSY_S:
            before = now
            self._touch_device()
            now = time.perf_counter()
            if now - before < IDLE_S:
                return before
        raise self._busy()

    def _begun(self) -> float:
        """Seconds that the device takes for what began when contents were put there; mostly nothing did, and it is 0.

        The judge's context has the device, so every touch tells.
        """
        start = now = last = time.perf_counter()
        quick = 0
        while quick < QUIET:
            before = now
            self._touch_device()
            now = time.perf_counter()
            quick += 1
            if now - before >= IDLE_S:
                last, quick = now, 0
            if now > start + BUSY_S:
                raise self._busy()
        return last - start

    def _touch_device(self) -> None:
        """The least that can be done there, to its end."""
        self._mark.add_(1)
        torch.cuda.synchronize(self._device)

    # -- plumbing --------------------------------------------------------------------------------------------

    def _opened(self, told: Any, wanted: TensorSpec) -> Tensor:
        """The output that the process tells of, whatever it says, as the judge sees it."""
        try:
            handle, offset, stride = told
            seen = TensorSpec(wanted.shape, tuple(int(step) for step in stride), wanted.dtype)
            if len(seen.stride) != len(seen.shape) or min(seen.stride, default=0) < 0:
                raise ValueError("not its strides")
            if not seen.storage_bytes:
                return torch.empty_strided(
                    seen.shape, seen.stride, dtype=seen.torch_dtype, device=self._device
                )
            begin, size = self._mapping(str(handle))
            at = int(offset)
            if at < 0 or at % seen.torch_dtype.itemsize or at + seen.storage_bytes > size:
                raise ValueError("outside of its allocation")
            return view(at_address(begin + at, seen.storage_bytes, self._device), seen, 0)
        except (CudaError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise self._nonsense() from error

    def _mapping(self, handle: str) -> tuple[int, int]:
        """Where an allocation of the process's begins here, and its size."""
        if handle not in self._mapped:
            if len(self._mapped) >= MAPPINGS:
                self._unmap()
            begin = self._driver.open_shared(bytes.fromhex(handle))
            self._mapped[handle] = begin, self._driver.extent(begin)[1]
        return self._mapped[handle]

    def _unmap(self) -> None:
        for begin, _ in self._mapped.values():
            with contextlib.suppress(CudaError):
                self._driver.close_shared(begin)
        self._mapped.clear()

    def _send(self, header: dict[str, Any], blob: bytes = b"") -> None:
        try:
            self._link.send(header, blob)
        except TimeoutError as error:
            raise self._timed_out(GRACE_SECONDS) from error
        except EOFError as error:
            raise self._end("runtime", GONE) from error

    def _receive(self, timeout: float) -> dict[str, Any]:
        try:
            answer, _ = self._link.recv(timeout, limit=0)
        except TimeoutError as error:
            raise self._timed_out(timeout) from error
        except EOFError as error:
            raise self._end("runtime", GONE) from error
        except ProtocolError as error:
            raise self._nonsense() from error
        if "error" in answer:
            log = str(answer["error"])[:4000]
            if answer.get("lacks_memory") is not True:
                raise self._end("runtime", log)
            died = self._end("constraints", f"not enough device memory: {log}")
            raise Crowded(died.outcome, died.log, fatal=False) if self._others_have_it() else died
        return answer

    def _others_have_it(self) -> bool:
        """Whether other processes have memory of the device that this one says it lacks: of one that a module is loaded into
        not its word counts, but what is taken when it has ended."""
        if not self._loaded:
            return True
        self._leash.kill()
        self._leash.alive(GRACE_SECONDS)
        return bool(taken_elsewhere(RuntimeError()))

    def _busy(self) -> Died:
        return self._end("constraints", "it keeps the device busy when its calls are over")

    def _timed_out(self, seconds: float) -> Died:
        self._leash.kill()
        return self._end("timeout", f"no answer within {seconds:.3g} s")

    def _nonsense(self) -> Died:
        return self._end("runtime", "the process of its Python answered out of turn, or nonsense")

    def _end(self, outcome: str, log: str) -> Died:
        """What every call comes to from now on."""
        self._lost = outcome, log
        return Died(outcome, log, fatal=False)


class NullHost(HostProcess):
    """One that nothing is ever loaded into: what there is to a call besides what is called.

    Mostly the device's way from the judge's context to another and back, 0.2 ms, which changes with what the machine does.
    So it is measured again before every call that is timed. One in ten of these calls takes half as long again, which is too
    much to take off: the median of the last few is taken.
    """

    _request = "nothing"

    def __init__(self, link: Channel, leash: Leash, stage: Stage) -> None:
        super().__init__(link, leash, stage)
        self._seen: deque[float] = deque(maxlen=NULL_CALLS)

    def seconds(self) -> float:
        """The median of the last few calls, one of them made now."""
        while len(self._seen) < NULL_CALLS:
            self._seen.append(self._call(GRACE_SECONDS, timed=True))
        self._seen.append(self._call(GRACE_SECONDS, timed=True))
        return median(self._seen)


class HostRunner(HostProcess):
    """A module of the host lane with the face of a ``CudaRunner``; its outputs and intermediates are its own.

    ``null`` is a process beside it.
    """

    capturable = False
    _address = 0
    """Where what is lent begins."""

    def __init__(self, link: Channel, leash: Leash, stage: Stage, chosen: ShapeSet, null: NullHost) -> None:
        super().__init__(link, leash, stage)
        self._null = null
        self.patience = GRACE_SECONDS
        """Seconds that the next run may take."""
        self.plan = Plan((), (), (), chosen.outputs, "cuda")
        self.arena = torch.empty(0, dtype=torch.uint8, device=stage.device)
        self.memory = MemoryPlan({}, {}, 0)
        self.step_names: list[str] = []
        self._given: list[Tensor] = []
        self._names = list(chosen.state)
        placement = Placement.of((*chosen.inputs, *chosen.state.values()))
        size = Block.room(placement)
        try:
            self._address = self._driver.allocate(size)
            self._lent = Block(placement, stage.device, at_address(self._address, size, stage.device))
            self._lent.jump(stage.rng)
            poison(self._lent.bytes, placement.used, 0)
        except BaseException:
            self.close()
            raise

    def load(self, blob: bytes, artifact_bytes: int, shape_set: str) -> None:
        """Load the module; ``blob``: its artifact and the task's signature."""
        lent = [described(self._driver, tensor) for tensor in self._lent.tensors]
        first = len(lent) - len(self._names)
        places = {"inputs": lent[:first], "state": dict(zip(self._names, lent[first:]))}
        torch.cuda.synchronize(self._device)
        self._send({"do": "load", "artifact_bytes": artifact_bytes, "shape_set": shape_set, **places}, blob)
        self._loaded = True
        self._receive(LOAD_SECONDS)
        self._leash.freeze()
        self._idle()

    # -- as a CudaRunner -------------------------------------------------------------------------------------

    def place(self, inputs: Sequence[Tensor], state: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> None:
        """Where contents come from and outputs go to: memory of the judge's, which the process never sees."""
        self._given, self._outputs = [*inputs, *state.values()], list(outputs)

    def run(self) -> None:
        """One call that nobody times; what it wrote to its inputs is written to those it was given."""
        self._call(self.patience, timed=False)
        lent = self._lent
        if damaged(lent.bytes, lent.placement.used) is not None:
            raise Died("correctness", "wrote outside of its inputs and parameters", fatal=False)
        copy_all(self._given, lent.tensors)

    def timed(self, what: str, patience: float, mhz: int, over: Callable[[], object] = int) -> Sample:
        """One timed call; ``over`` is called once its outputs are there, while the process stands still."""
        try:
            nothing = self._null.seconds()
        except Died as died:
            # Nobody's fault: as if there had been no room, it is tried again in other processes.
            said = f"the process that calls are timed beside was lost: {died.log}"
            raise Crowded("constraints", said) from died
        seconds = max(RESOLUTION_S, self._call(patience, timed=True) - nothing)
        over()
        return Sample(seconds, seconds, None, not self._early_s, mhz)

    def prepare(self, state: Mapping[str, Tensor]) -> None:
        """There is nothing to prepare."""

    def fill_scratch(self, byte: int) -> None:
        """Nobody knows what it keeps between calls."""

    def step_times(self) -> list[tuple[str, float]]:
        return []

    def resources(self) -> dict[str, dict[str, int]]:
        return {}

    def close(self) -> None:
        """See ``HostProcess``; what was lent is the judge's again."""
        super().close()
        if self._address:
            self._driver.release(self._address)

    def _fill(self) -> None:
        copy_all(self._lent.tensors, self._given)
