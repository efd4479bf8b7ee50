"""One timed call on a GPU: L2 flushed, enqueued behind a spinning kernel, by device events and the host's clock.

The spin hides what it costs to enqueue the call, so that a library of many small launches and one kernel are
measured alike: by what the device does. Device events are read in this trusted process, but lie in memory that
a kernel might find; the host's clock, which none can reach, has the last word. Nothing locks the clocks: calls
that ran while the device was throttled are told apart by their clock, and whole rounds are dropped.
(ARCHITECTURE.md, "On a GPU"; NVBench.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ke_gym.targets.cuda_driver import Clocks, runtime

FLUSH_TIMES = 2
"""How many times the size of L2 is written before a call."""
THROTTLED = 0.75
"""A call at less than this share of the highest clock seen does not count (NVBench)."""
_SPIN_S, _MOST_SPIN_S = 30e-6, 0.02
_WARM_S, _WARM_MOST_S = 0.015, 0.5
_HOST_SLACK, _HOST_SLACK_S = 1.25, 60e-6
_LATE_S = 50e-6


def spin_s(queue_s: float) -> float:
    """Seconds that the spin before a call takes, if enqueuing it takes ``queue_s``."""
    return _SPIN_S + 2 * min(queue_s, _MOST_SPIN_S)


def settled(device_s: float, host_s: float | None) -> float:
    """What counts: the time between events, unless the host's clock says clearly more."""
    if host_s is not None and host_s > _HOST_SLACK * device_s + _HOST_SLACK_S:
        return host_s
    return device_s


class Hung(Exception):
    """The device did not finish within ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within {seconds:.3g} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Sample:
    """One call.

    ``seconds`` is what counts: ``device_s`` (between events), unless the host's clock (``host_s``, None where
    it could not see the start) says clearly more. ``hidden``: everything was enqueued before it began.
    """

    seconds: float
    device_s: float
    host_s: float | None
    hidden: bool
    mhz: int

    @property
    def disputed(self) -> bool:
        """Whether the device's events claim clearly less than the host's clock saw."""
        return self.seconds > self.device_s


class Stopwatch:
    """Times calls on torch's current stream of one device. ``l2_bytes`` is the size of its L2 cache."""

    def __init__(self, device: torch.device, l2_bytes: int, clocks: Clocks) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_TIMES * l2_bytes, dtype=torch.uint8, device=device)
        self._clocks = clocks
        self._cycles_per_s = 1e6 * (clocks.most_mhz() or 2000)
        self.queue_s = _SPIN_S
        self.top_mhz = 0

    def flush(self) -> None:
        """Let nothing of a call's contents be in L2; enqueued, not waited for."""
        self._flush.zero_()

    def warm_up(self) -> None:
        """Keep the device busy until its clock has risen."""
        begin = time.perf_counter()
        while (spent := time.perf_counter() - begin) < _WARM_MOST_S:
            runtime._sleep(int(0.005 * self._cycles_per_s))
            torch.cuda.synchronize(self._device)
            if self.mhz() >= THROTTLED * self._clocks.most_mhz() and spent > _WARM_S:
                break

    def time(
        self,
        run: Callable[[], object],
        patience: float,
        go: Callable[[], object] = int,
        over: Callable[[], object] = int,
    ) -> Sample:
        """Time ``run``, which enqueues work and does not wait for it. Raises ``Hung`` after ``patience`` s.

        ``go`` is called right before everything that belongs to the call, ``over`` right after it.
        """
        start, stop = (runtime.Event(enable_timing=True) for _ in range(2))
        clock = time.perf_counter
        self.flush()
        torch.cuda.synchronize(self._device)
        go()
        runtime._sleep(int(spin_s(self.queue_s) * self._cycles_per_s))
        start.record()
        begin = clock()
        run()
        queued = clock() - begin
        stop.record()
        hidden = not start.query()
        while not start.query():
            pass
        seen = clock()
        while not stop.query():
            if clock() - seen > patience:
                raise Hung(patience)
        done = clock()
        torch.cuda.synchronize(self._device)
        late = clock() - done
        over()
        self.queue_s = min(_MOST_SPIN_S, queued if not hidden else 0.8 * self.queue_s + 0.2 * queued)
        device_s = start.elapsed_time(stop) / 1e3
        host_s = done - seen if hidden else None
        # Work that outlives the event on another stream is part of the call.
        seconds = device_s + (late if late > _LATE_S + 0.2 * device_s else 0.0)
        seconds = settled(seconds, host_s)
        return Sample(seconds, device_s, host_s, hidden, self.mhz())

    def mhz(self) -> int:
        """The device's clock now."""
        mhz = self._clocks.mhz()
        self.top_mhz = max(self.top_mhz, mhz)
        return mhz

    def throttled(self, samples: list[Sample]) -> bool:
        """Whether one of a round's calls ran at a clock too low to be compared with the others."""
        return any(0 < sample.mhz < THROTTLED * self.top_mhz for sample in samples)
