"""CUDA C++: the ``__global__`` kernels of a source, launched from a module, traced and compiled to a cubin."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ke_gym.languages import nvrtc, recording
from ke_gym.languages.declarations import Declaration, Parameter, parse
from ke_gym.languages.device import Arch
from ke_gym.languages.launch import KernelError, Namespace, check, refused
from ke_gym.languages.module import ModuleLanguage
from ke_gym.languages.plan import Dim3, Geometry
from ke_gym.languages.pretend import pretending
from ke_gym.languages.recording import Argument, Built, Request, Tile

Sizes = int | Sequence[int]

_QUALIFIERS = re.compile(
    r"__(?:launch_bounds|cluster_dims|block_size|maxnreg)__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)"
    r"|\b__(?:global|device|host|forceinline|noinline|grid_constant)__\b"
)
_KERNEL = re.compile(r"\b__global__\b[^;{]*?\b([A-Za-z_]\w*)\s*\((?=[^;]*\{)")
_SPELLINGS = {"__half": "half", "__nv_bfloat16": "bf16", "nv_bfloat16": "bf16", "uint": "unsigned"}
_MAP = "CUtensorMap"


class Cuda(ModuleLanguage):
    """The language ``cuda``: ``lang.cuda`` sources and ATen calls, for NVIDIA GPUs."""

    name = "cuda"
    targets = ("cuda",)
    device = "cuda"

    @contextmanager
    def environment(self, arch: Arch) -> Iterator[None]:
        with pretending(arch):
            yield


@dataclass(frozen=True)
class CudaUnit:
    """One CUDA C++ source with its flags and compiler ("": what is there); compiles into one cubin."""

    source: str
    flags: tuple[str, ...] = ()
    compiler: str = ""

    @cached_property
    def name(self) -> str:
        text = "\0".join((self.compiler, *self.flags, self.source))
        return f"cuda_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def build(self, seconds: float, arch: str) -> Built:
        """See ``recording.Unit``."""
        cubin, log = nvrtc.compile_cubin(self.source, self.flags, arch, self.compiler, seconds)
        warnings = tuple(line for line in log.splitlines() if " warning" in line)[:20]
        used = self.compiler or nvrtc.tools()[0]
        return Built(cubin, warnings, settings={"compiler": used, "flags": [*nvrtc.FLAGS, *self.flags]})


def parse_kernels(source: str) -> dict[str, Declaration]:
    """The ``extern "C" __global__`` functions that the source defines, by name."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    plain = _QUALIFIERS.sub(blank, source)
    for spelled, known in _SPELLINGS.items():
        plain = re.sub(rf"\b{spelled}\b", known.ljust(len(spelled)), plain)
    kernels = set(_KERNEL.findall(re.sub(r"//[^\n]*", "", source)))
    kernels |= set(_KERNEL.findall(_QUALIFIERS.sub(lambda m: m[0] if "global" in m[0] else "", source)))
    return {name: _described(found) for name, found in parse(plain).items() if name in kernels}


def _described(kernel: Declaration) -> Declaration:
    """The same with TMA descriptors, which only kernels of a GPU take."""
    return replace(kernel, parameters=tuple(_parameter(p) for p in kernel.parameters))


def _parameter(parameter: Parameter) -> Parameter:
    words = parameter.ctype.replace("const", " ").split()
    if parameter.problem and words[:1] == [_MAP] and "*" not in parameter.ctype:
        return Parameter(words[-1] if len(words) > 1 else parameter.name, _MAP)
    return parameter


class CudaKernel:
    """One kernel: ``kernel[grid, block](*args)``, ``kernel[grid, block, shared_bytes](*args)``.

    Sizes are a number, or up to three along x, y and z. ``launched`` takes what else a launch can have.
    """

    def __init__(self, unit: CudaUnit, declaration: Declaration) -> None:
        self._unit = unit
        self.declaration = declaration
        self.__name__ = declaration.name

    def __getitem__(self, where: tuple[Any, ...]) -> CudaLaunch:
        if not isinstance(where, tuple) or len(where) not in (2, 3):
            raise refused(f"kernel {self.__name__!r}: give [grid, block] or [grid, block, shared_bytes]")
        return self.launched(*where)

    def launched(
        self,
        grid: Sizes,
        block: Sizes,
        shared: int = 0,
        *,
        cluster: Sizes = 1,
        cooperative: bool = False,
        programmatic: bool = False,
    ) -> CudaLaunch:
        """With ``shared`` bytes of dynamic shared memory, blocks in clusters, and launch attributes."""
        try:
            geometry = Geometry(
                self._sizes("grid", grid), self._sizes("block", block), self._sizes("cluster", cluster),
                int(shared), bool(cooperative), bool(programmatic),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise refused(str(error)) from None
        return CudaLaunch(self, geometry)

    def _sizes(self, what: str, sizes: Sizes) -> Dim3:
        numbers = [int(n) for n in ((sizes,) if isinstance(sizes, int) else sizes)]
        if not 1 <= len(numbers) <= 3 or any(n < 1 for n in numbers):
            raise ValueError(f"kernel {self.__name__!r}: {sizes!r} is no {what}; give 1 to 3 positive sizes")
        x, y, z = (*numbers, 1, 1)[:3]
        return x, y, z

    def record(self, geometry: Geometry, args: tuple[Any, ...]) -> None:
        """Record the launch. Raises ``KernelError``: for arguments it does not take, or when nothing traces."""
        recorder = recording.active()
        if recorder is None:
            raise KernelError(
                f"kernel {self.__name__!r} is launched outside of a trace: build the module, run its artifact"
            )
        try:
            plain = [p for p in self.declaration.parameters if p.ctype != _MAP]
            tiles = dict(enumerate(args))
            maps = {i for i, p in enumerate(self.declaration.parameters) if p.ctype == _MAP}
            others = tuple(v for i, v in tiles.items() if i not in maps)
            checked = iter(check(replace(self.declaration, parameters=tuple(plain)), others, "cuda"))
            values = [self._tile(p, tiles.get(i)) if i in maps else next(checked)
                      for i, p in enumerate(self.declaration.parameters)]  # fmt: skip
        except KernelError as error:
            raise refused(str(error)) from error
        arguments = tuple(
            Argument(p.name, p.ctype, v, p.writes or (isinstance(v, Tile) and v.writes))
            for p, v in zip(self.declaration.parameters, values)
        )
        recorder.launch([Request(self._unit, self.__name__, arguments, geometry)])

    def _tile(self, parameter: Parameter, value: Any) -> Tile:
        if not isinstance(value, Tile):
            raise KernelError(
                f"kernel {self.__name__!r}, argument {parameter.name!r}: a TMA descriptor expected; "
                "make one with lang.tensor_map(tensor, box)"
            )
        last = sum((size - 1) * step for size, step in zip(value.shape, value.stride))
        end = (value.tensor.storage_offset() + last + 1) * value.tensor.itemsize
        if len(value.shape) != len(value.stride) or end > value.tensor.untyped_storage().nbytes():
            raise KernelError(
                f"kernel {self.__name__!r}, argument {parameter.name!r}: shape {value.shape} by stride {value.stride} "
                "reaches beyond the tensor's memory, or has other dimensions"
            )
        return value

    def __repr__(self) -> str:
        arguments = ", ".join(f"{p.ctype} {p.name}" for p in self.declaration.parameters)
        return f"{self.declaration.name}({arguments})"


@dataclass(frozen=True)
class CudaLaunch:
    """A kernel with its geometry, ready to be called with arguments."""

    kernel: CudaKernel
    geometry: Geometry

    def __call__(self, *args: Any) -> None:
        self.kernel.record(self.geometry, args)


def kernels(source: str, flags: str | list[str], compiler: str) -> Namespace[CudaKernel]:
    """See ``lang.cuda``."""
    unit = CudaUnit(source, nvrtc.parse_flags(flags), compiler)
    recording.register(unit)
    found = parse_kernels(source)
    return Namespace(
        {name: CudaKernel(unit, found[name]) for name in found}, 'extern "C" __global__ function'
    )


def tensor_map(
    tensor: Tensor,
    box: Sequence[int],
    swizzle: int,
    nan_fill: bool,
    writes: bool,
    shape: Sequence[int] = (),
    stride: Sequence[int] = (),
) -> Tile:
    """See ``lang.tensor_map``."""
    sizes = tuple(int(n) for n in shape) or tuple(tensor.shape)
    steps = tuple(int(n) for n in stride)
    if not steps:
        steps = (
            tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes))) if shape else tuple(tensor.stride())
        )
    return Tile(tensor, sizes, steps, tuple(int(n) for n in box), swizzle, nan_fill, writes)
