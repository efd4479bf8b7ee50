"""Where an evaluator's time goes: seconds by phase, and how often each was entered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

BUILDING = "building"
"""Builds go on side by side and beside the rest: their seconds are those of all cores together."""
WAITING = "waiting for the device"
"""While others have it."""
ALONE, SHARING = "device alone", "device shared"
"""How long a device was held, by whom else it may have been; counted besides the phases."""


class Account:
    """Seconds by phase, of all threads. Within a phase another may begin: its seconds are its own alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent: dict[str, tuple[float, int]] = {}
        self._thread = threading.local()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything within counts as ``name``, but for what inner phases take."""
        inner_of: list[float] = self._thread.__dict__.setdefault("inner_of", [])
        start = time.perf_counter()
        inner_of.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            own = whole - inner_of.pop()
            if inner_of:
                inner_of[-1] += whole
            self.add(name, own)
            here = self._thread.__dict__.setdefault("here", {})
            here[name] = here.get(name, 0.0) + own

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """``phase`` in a thread that is in one already; elsewhere nothing is counted."""
        if self._thread.__dict__.get("inner_of"):
            with self.phase(name):
                yield
        else:
            yield

    def add(self, name: str, seconds: float) -> None:
        """Count a phase that took so long."""
        with self._lock:
            before, times = self._spent.get(name, (0.0, 0))
            self._spent[name] = before + seconds, times + 1

    def total(self, name: str) -> float:
        """Seconds of one phase so far."""
        with self._lock:
            return self._spent.get(name, (0.0, 0))[0]

    def here(self, name: str) -> float:
        """Seconds of one phase so far, in this thread."""
        return float(self._thread.__dict__.get("here", {}).get(name, 0.0))

    def spent(self) -> dict[str, tuple[float, int]]:
        """Seconds and entries by phase, so far."""
        with self._lock:
            return {name: (round(seconds, 3), times) for name, (seconds, times) in self._spent.items()}


def together(accounts: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """The sum of what accounts have spent."""
    total: dict[str, tuple[float, int]] = {}
    for account in accounts:
        for name, (seconds, times) in account.items():
            before, count = total.get(name, (0.0, 0))
            total[name] = before + seconds, count + times
    return total
