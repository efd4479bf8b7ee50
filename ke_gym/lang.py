"""What kernel modules import: ``kernels = lang.cpp(r'''extern "C" void rows(…) {…}''')``, ``lang.cuda(…)``.

While a module's ``forward`` is traced, calling a kernel records a launch. Anywhere else (a notebook, a test)
it compiles the source, keeps the binary in a private cache folder, and runs the kernel on real CPU tensors;
kernels for a GPU are only ever recorded.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ke_gym.languages import cpp as _cpp
from ke_gym.languages import cuda as _cuda
from ke_gym.languages import recording as _recording
from ke_gym.languages.declarations import Declaration, parse
from ke_gym.languages.launch import KernelError, Library, Namespace, check

__all__ = ["Kernel", "KernelError", "Kernels", "cpp", "cuda", "tensor_map"]


class Kernel:
    """One kernel: ``kernel(*args)`` takes tensors for pointers and numbers for the rest; returns nothing."""

    def __init__(self, kernels: Kernels, declaration: Declaration) -> None:
        self._kernels = kernels
        self.declaration = declaration
        self.__name__ = declaration.name

    def __call__(self, *args: Any) -> None:
        recorder = _recording.active()
        try:
            checked = check(self.declaration, args)
        except KernelError as error:
            if recorder is not None:
                recorder.reject("compile", str(error))
            raise
        if recorder is not None:
            arguments = tuple(
                _recording.Argument(p.name, p.ctype, value, p.writes)
                for p, value in zip(self.declaration.parameters, checked)
            )
            recorder.launch([_recording.Request(self._kernels.unit, self.declaration.name, arguments)])
        else:
            with torch.no_grad():
                self._kernels.library.call(self.declaration, checked)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{p.ctype} {p.name}" for p in self.declaration.parameters)
        return f"{self.declaration.name}({arguments})"


class Kernels(Namespace[Kernel]):
    """The kernels of one source, as attributes."""

    def __init__(self, unit: _cpp.Unit) -> None:
        self.unit = unit
        found = parse(unit.source)
        super().__init__({name: Kernel(self, found[name]) for name in found}, 'extern "C" function')

    @cached_property
    def library(self) -> Library:
        """The binary in this process, compiled on first use. Raises ``KernelError`` if that fails."""
        return Library(_cpp.cached(self.unit))


def cpp(source: str, flags: str | list[str] = "", compiler: str = "g++") -> Kernels:
    """C++20 source → the ``extern "C"`` kernels it defines.

    ``flags`` are added to the default ones: optimization, code generation, macros and warnings (``-O2``,
    ``-fno-…``, ``-mprefer-vector-width=512``, ``-DTILE=8``, ``--param …``); any other raises ``KernelError``.
    ``compiler`` is ``g++`` or ``clang++``. Headers ``<ke/math.h>`` and ``<ke/types.h>`` are at hand.
    """
    unit = _cpp.Unit(source, _cpp.parse_flags(flags), compiler)
    _recording.register(unit)
    return Kernels(unit)


def cuda(source: str, flags: str | list[str] = "", compiler: str = "") -> Namespace[_cuda.CudaKernel]:
    """CUDA C++17 source → the ``extern "C" __global__`` kernels it defines: ``kernels.rows[grid, block](x, out)``.

    ``kernels.rows.launched(grid, block, shared, cluster=…, cooperative=…, programmatic=…)`` gives launch
    attributes. ``flags`` are about the code (``-D…``, ``-use_fast_math``, ``-maxrregcount=…``); any other raises
    ``KernelError``. ``compiler`` is ``nvrtc`` or ``nvcc``; "" takes what is there, NVRTC first. Sources see CUDA's
    device headers where those are installed, never torch's.
    """
    return _cuda.kernels(source, flags, compiler)


def tensor_map(
    tensor: Tensor,
    box: tuple[int, ...],
    swizzle: int = 0,
    nan_fill: bool = False,
    writes: bool = False,
    shape: tuple[int, ...] = (),
    stride: tuple[int, ...] = (),
) -> _recording.Tile:
    """The TMA descriptor of a tensor, for a parameter ``const __grid_constant__ CUtensorMap map``.

    ``box`` elements per dimension are copied at once, swizzled over 0, 32, 64 or 128 bytes. Elements outside
    read as zeros, with ``nan_fill`` as NaN. ``writes``: the kernel stores through it. ``shape`` and ``stride`` (in
    elements; (): one after the other) describe the tensor's memory in another way than its own.
    """
    return _cuda.tensor_map(tensor, box, swizzle, nan_fill, writes, shape, stride)
