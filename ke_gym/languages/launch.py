"""What a kernel may be called with, checked loudly, and the call itself."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

import torch

from ke_gym.languages import recording
from ke_gym.languages.declarations import SCALARS, Declaration, Parameter

K = TypeVar("K")


class KernelError(Exception):
    """A kernel called with arguments it does not take, or one that does not exist or compile."""


def refused(message: str) -> KernelError:
    """The error to raise, of which the trace that is going on, if any, is told."""
    if (recorder := recording.active()) is not None:
        recorder.reject("compile", message)
    return KernelError(message)


class Namespace(Generic[K]):
    """The kernels of one source, as attributes. ``kind`` is what such a source calls them."""

    def __init__(self, kernels: Mapping[str, K], kind: str) -> None:
        self._kernels, self._kind = kernels, kind

    def __getattr__(self, name: str) -> K:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._kernels:
            return self._kernels[name]
        near = get_close_matches(name, self._kernels, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it defines {', '.join(self._kernels) or 'none'}"
        raise refused(f"no kernel {name!r}: the source has no {self._kind} of that name; {hint}")

    def __dir__(self) -> list[str]:
        return sorted(self._kernels)


def check(kernel: Declaration, args: Sequence[Any], device: str = "cpu") -> tuple[Any, ...]:
    """The arguments as the kernel takes them: tensors as they are, numbers as ``int``, ``float`` or ``bool``.

    Tensors must lie on ``device``; for a GPU also those that a module made on the CPU when it was loaded.

    Raises ``KernelError`` naming the kernel, the argument's position (from 1) and its parameter.
    """
    if kernel.returns != "void":
        raise KernelError(f"kernel {kernel.name!r} returns {kernel.returns}; a kernel must return void")
    if len(args) != len(kernel.parameters):
        names = ", ".join(p.name for p in kernel.parameters)
        raise KernelError(
            f"kernel {kernel.name!r} takes {len(kernel.parameters)} arguments ({names}), got {len(args)}"
        )
    return tuple(
        _argument(kernel, i, p, a, device) for i, (p, a) in enumerate(zip(kernel.parameters, args), 1)
    )


def _argument(kernel: Declaration, position: int, parameter: Parameter, value: Any, device: str) -> Any:
    where = f"kernel {kernel.name!r}, argument {position} ({parameter.name!r})"
    if parameter.problem:
        raise KernelError(f"{where}: {parameter.problem}")
    if parameter.pointer:
        return _tensor(where, parameter, value, device)
    if isinstance(value, torch.Tensor):
        raise KernelError(
            f"{where}: {parameter.ctype} expected, got a tensor; pass a number or declare a pointer"
        )
    if parameter.ctype == "bool":
        if value not in (0, 1):
            raise KernelError(f"{where}: bool expected, got {value!r}")
        return bool(value)
    if parameter.ctype in ("float", "double"):
        return _real(where, parameter, value)
    return _integer(where, parameter, value)


def _tensor(where: str, parameter: Parameter, value: Any, device: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise KernelError(f"{where}: a tensor expected for {parameter.ctype}, got {_kind(value)}")
    if value.device.type not in ("cpu", device) or value.layout != torch.strided:
        place = "CPU" if device == "cpu" else "GPU"
        raise KernelError(f"{where}: a dense {place} tensor expected, got {value.layout} on {value.device}")
    if value.dtype != parameter.pointee:
        raise KernelError(
            f"{where}: {parameter.ctype} takes {_name(parameter.pointee)}, got a {_name(value.dtype)} tensor"
        )
    return value


def _real(where: str, parameter: Parameter, value: Any) -> float:
    if isinstance(value, (str, bool)) or not hasattr(value, "__float__"):
        raise KernelError(f"{where}: {parameter.ctype} expected, got {_kind(value)}")
    return float(value)


def _integer(where: str, parameter: Parameter, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise KernelError(f"{where}: {parameter.ctype} expected, got {_kind(value)}") from None
    if SCALARS[parameter.ctype](number).value != number:
        raise KernelError(f"{where}: {number} does not fit into {parameter.ctype}")
    return number


def fits(ctype: str, value: Any) -> bool:
    """Whether a plan may pass this plain value as this C type."""
    if ctype == "bool":
        return isinstance(value, bool)
    if ctype in ("float", "double"):
        return isinstance(value, float)
    return ctype in SCALARS and type(value) is int and SCALARS[ctype](value).value == value


def _kind(value: Any) -> str:
    if isinstance(value, (int, float, str)) or value is None:
        return f"{type(value).__name__} {value!r}" if value is not None else "None"
    return f"a {type(value).__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Library:
    """A compiled binary in this process: kernels by name, called with checked arguments."""

    def __init__(self, path: str) -> None:
        self._handle = ctypes.CDLL(path)
        self._functions: dict[str, Any] = {}

    def call(self, kernel: Declaration, args: Sequence[Any]) -> None:
        """Run the kernel now; ``args`` come from ``check``."""
        function = self._functions.get(kernel.name)
        if function is None:
            function = getattr(self._handle, kernel.name)
            function.restype = None
            function.argtypes = [
                ctypes.c_void_p if p.pointer else SCALARS[p.ctype] for p in kernel.parameters
            ]
            self._functions[kernel.name] = function
        function(*(a.data_ptr() if p.pointer else a for p, a in zip(kernel.parameters, args)))
