"""Where kernels find out whether they are being traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ke_gym.languages.plan import Geometry, TensorMap


@dataclass(frozen=True)
class Built:
    """A binary, what the compiler said (``warnings``; ``remarks`` on loops), and how it was called."""

    binary: bytes
    warnings: tuple[str, ...] = ()
    remarks: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


class Unit(Protocol):
    """What becomes one binary of an artifact; equal names, equal binaries."""

    @property
    def name(self) -> str: ...

    def build(self, seconds: float, arch: str) -> Built:
        """Compile within ``seconds``, for a GPU of ``arch``. Raises ``KernelError``."""
        ...


@dataclass(frozen=True)
class Tile:
    """What a kernel's TMA descriptor is made from: ``plan.TensorMap`` with the tensor itself for its number.

    ``shape`` and ``stride`` in elements, from the tensor's first on.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0
    nan_fill: bool = False
    writes: bool = False
    """Whether the kernel may store through it."""

    def map(self, value: int) -> TensorMap:
        """The plan's argument, if the tensor is value number ``value``."""
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return TensorMap(value, self.shape, self.stride, dtype, self.box, self.swizzle, self.nan_fill)


@dataclass(frozen=True)
class Argument:
    """What is passed: a tensor for a pointer, a ``Tile`` for a TMA descriptor, ``None``, ``Scratch``, a number.

    ``name`` is the parameter's; ``writes`` says whether the kernel may write through the pointer.
    """

    name: str
    ctype: str
    value: Any
    writes: bool = False


@dataclass(frozen=True)
class Request:
    """One launch that a module asks for. ``geometry`` on a GPU; ``label`` sets alternatives apart."""

    unit: Unit
    kernel: str
    arguments: tuple[Argument, ...]
    geometry: Geometry | None = None
    label: str = ""


class Recorder(Protocol):
    """Takes launches in place of running them."""

    def launch(self, requests: Sequence[Request]) -> None:
        """One launch; where there are several requests, any of them will do."""
        ...

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
