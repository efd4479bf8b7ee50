"""Where kernels find out whether they are being traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ke_gym.languages.cpp import Unit
from ke_gym.languages.declarations import Declaration


class Recorder(Protocol):
    """Takes launches in place of running them."""

    def launch(self, unit: Unit, kernel: Declaration, args: tuple[Any, ...]) -> None: ...

    def reject(self, outcome: str, message: str) -> None: ...


_active: list[Recorder] = []
_units: list[dict[str, Unit]] = []


def active() -> Recorder | None:
    """The recorder of the trace that is running, if one is."""
    return _active[-1] if _active else None


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Send every launch to ``recorder``."""
    _active.append(recorder)
    try:
        yield
    finally:
        _active.pop()


@contextmanager
def collecting() -> Iterator[dict[str, Unit]]:
    """Collect the units that ``lang`` is given, by name."""
    units: dict[str, Unit] = {}
    _units.append(units)
    try:
        yield units
    finally:
        _units.remove(units)


def register(unit: Unit) -> None:
    """Tell whoever collects of a unit."""
    for units in _units:
        units[unit.name] = unit
