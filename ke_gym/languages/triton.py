"""Triton: ``@triton.jit`` kernels launched from a module, traced and compiled to cubins; no GPU is needed.

A launch compiles what Triton would compile for these very arguments: specialized on divisibility by 16, on
values of 1 and on constexprs. ``@triton.autotune`` measures nothing here: its configurations become the
alternatives of the launch, for others to race. Works with Triton 3.6 and 3.7.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ke_gym.errors import UserError
from ke_gym.languages import recording
from ke_gym.languages.cubin import resources
from ke_gym.languages.device import Arch
from ke_gym.languages.launch import KernelError
from ke_gym.languages.module import ModuleLanguage
from ke_gym.languages.plan import Geometry, Scratch
from ke_gym.languages.pretend import pretending
from ke_gym.languages.recording import Argument, Built, Request, Tile
from ke_gym.languages.ttir import written

ALTERNATIVES = 32
"""How many autotune configurations of one launch are compiled."""

_POINTEES = {
    "fp32": "float", "fp64": "double", "fp16": "half", "bf16": "bf16", "i1": "bool", "u1": "bool",
    "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t", "u8": "uint8_t",
}  # fmt: skip
_SCALARS = {
    "fp32": "float", "fp64": "double", "i1": "bool", "u1": "bool", "i8": "int8_t", "i16": "int16_t",
    "i32": "int32_t", "i64": "int64_t", "u8": "uint8_t", "u32": "uint32_t", "u64": "uint64_t",
}  # fmt: skip
_SWIZZLES = (0, 32, 64, 128)


class Triton(ModuleLanguage):
    """The language ``triton``: Triton kernels, ``lang.cuda`` sources and ATen calls, for NVIDIA GPUs."""

    name = "triton"
    targets = ("cuda",)
    device = "cuda"

    @contextmanager
    def environment(self, arch: Arch) -> Iterator[None]:
        with pretending(arch), launching(arch):
            yield


@dataclass(frozen=True)
class _Binary:
    """A compiled kernel as a unit of an artifact; ``warps``, ``stages`` and the like are in ``settings``."""

    cubin: bytes
    settings: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"triton_{hashlib.sha256(self.cubin).hexdigest()[:16]}"

    def build(self, seconds: float, arch: str) -> Built:
        return Built(self.cubin, settings=dict(self.settings))


class _Pointer:
    """A tensor as Triton's specialization sees it: its dtype, and an address of its alignment."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype

    def data_ptr(self) -> int:
        """Storages of a plan are aligned to 256 bytes."""
        return 256 + int(self.tensor.storage_offset()) * self.tensor.dtype.itemsize

    def ptr_range(self) -> int:
        return self.tensor.untyped_storage().nbytes()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


class _Driver:
    """What Triton asks of a driver to compile; it can launch nothing."""

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        self.utils = SimpleNamespace(get_device_properties=lambda device=0: _properties(arch))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self._arch.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self._arch.capability

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        raise KernelError(f"kernels are compiled here, not launched ({kind})")


def _properties(arch: Arch) -> dict[str, int]:
    return {
        "max_shared_mem": arch.block_shared,
        "max_num_regs": arch.registers,
        "multiprocessor_count": arch.multiprocessors,
        "warpSize": 32,
        "sm_clock_rate": 0,
        "mem_clock_rate": 0,
        "mem_bus_width": 0,
    }


@contextmanager
def launching(arch: Arch) -> Iterator[None]:
    """Record launches of Triton kernels. Raises ``UserError`` where Triton is not installed."""
    try:
        import triton
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise UserError("Triton is not installed: pip install 'ke-gym[triton]'") from error
    launcher = _Launcher(arch, JITFunction.run)
    known = triton.runtime.driver._active
    with tempfile.TemporaryDirectory(prefix="ke_gym_triton_") as cache:
        settings = mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache})
        jit = mock.patch.object(JITFunction, "run", lambda fn, *args, **kw: launcher.jit(fn, args, kw))
        tuner = mock.patch.object(Autotuner, "run", lambda t, *args, **kw: launcher.autotuned(t, args, kw))
        triton.runtime.driver.set_active(_Driver(arch))
        try:
            with settings, jit, tuner:
                yield
        finally:
            triton.runtime.driver._active = known


class _Launcher:
    """Turns calls of kernels into recorded launches."""

    def __init__(self, arch: Arch, run: Callable[..., Any]) -> None:
        self._arch = arch
        self._run = run
        self._gathered: list[Request] | None = None
        self._label = ""

    def jit(self, fn: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if options.pop("warmup", False):
            raise KernelError("kernel.warmup(...) has no place in a module that is traced; launch the kernel")
        grid = options.pop("grid")
        request = self._request(fn, args, options, grid)
        if self._gathered is not None:
            self._gathered.append(request)
        else:
            _recorder().launch([request])

    def autotuned(self, tuner: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        from triton.compiler.errors import CompilationError

        recorder = _recorder()
        tuner.nargs = dict(zip(tuner.arg_names, args))
        configs = list(tuner.prune_configs({k: v for k, v in options.items() if k not in ("grid", "warmup")}))
        if self._gathered is not None:
            raise KernelError("an autotuned kernel cannot be a configuration of another")
        self._gathered, refused = [], []
        try:
            for config in configs[:ALTERNATIVES]:
                self._label = ", ".join(f"{k}={v}" for k, v in config.all_kwargs().items())
                if config.pre_hook is not None:
                    config.pre_hook({**tuner.nargs, **options, **config.all_kwargs()})
                try:
                    tuner.fn.run(*args, **options, **config.all_kwargs())
                except (KernelError, CompilationError) as error:
                    refused.append(f"{self._label}: {error}")
            requests = self._gathered
        finally:
            self._gathered, self._label, tuner.nargs = None, "", None
        if not requests:
            message = f"no configuration of {tuner.base_fn.__name__} can be built; {'; '.join(refused)}"
            recorder.reject("constraints", message)
            raise KernelError(message)
        recorder.launch(requests)

    def _request(self, fn: Any, args: tuple[Any, ...], options: dict[str, Any], grid: Any) -> Request:
        names = [parameter.name for parameter in fn.params]
        given = fn.signature.bind(*args, **{k: v for k, v in options.items() if k in names})
        given.apply_defaults()
        values = {name: _stand_in(value) for name, value in given.arguments.items()}
        rest = {k: v for k, v in options.items() if k not in names}
        with torch.utils._python_dispatch._disable_current_modes():
            kernel = self._run(fn, grid=None, warmup=True, **values, **rest)
        meta = kernel.metadata
        self._check(kernel)
        sizes = grid({**given.arguments, **rest}) if callable(grid) else grid
        geometry = _geometry(kernel.name, sizes, meta)
        cubin = kernel.asm["cubin"]
        arguments = _arguments(kernel, given.arguments)
        missing = len(resources(cubin)[kernel.name].parameters) - len(arguments)
        blocks = math.prod(geometry.grid)
        scratch = [getattr(meta, f"{kind}_scratch_size", 0) for kind in ("global", "profile")][:missing]
        for size in scratch:
            arguments.append(Argument("scratch", "void*", Scratch(size * blocks) if size else None))
        settings = {key: getattr(meta, key) for key in ("num_warps", "num_stages", "num_ctas")}
        unit = _Binary(cubin, (("compiler", "triton"), *settings.items()))
        return Request(unit, kernel.name, tuple(arguments), geometry, self._label)

    def _check(self, kernel: Any) -> None:
        """Device limits that the compiler does not look at."""
        shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
        problem = ""
        if shared > self._arch.block_shared:
            problem = (
                f"{shared} bytes of shared memory a block; {self._arch.name} has {self._arch.block_shared}"
            )
        elif 32 * warps > self._arch.block_threads:
            problem = f"{32 * warps} threads a block; {self._arch.name} takes {self._arch.block_threads}"
        if problem:
            message = f"kernel {kernel.name!r} needs {problem}: smaller blocks or fewer stages"
            if self._gathered is None:
                _recorder().reject("constraints", message)
            raise KernelError(message)


def _recorder() -> recording.Recorder:
    recorder = recording.active()
    if recorder is None:
        raise KernelError("kernels are launched from forward only, not while the module is loaded")
    return recorder


def _stand_in(value: Any) -> Any:
    """What Triton gets to see of an argument."""
    if isinstance(value, Tensor):
        return _Pointer(value)
    if isinstance(value, tuple):
        return tuple(_stand_in(v) for v in value)
    return value


def _geometry(kernel: str, grid: Sequence[int], meta: Any) -> Geometry:
    sizes = [int(n) for n in ((grid,) if isinstance(grid, int) else grid)]
    if not 1 <= len(sizes) <= 3 or any(n < 1 for n in sizes):
        raise KernelError(f"kernel {kernel!r}: {tuple(sizes)} is no grid; give 1 to 3 positive sizes")
    x, y, z = (*sizes, 1, 1)[:3]
    blocks = getattr(meta, "num_ctas", 1)
    return Geometry(
        (x * blocks, y, z),
        (32 * meta.num_warps, 1, 1),
        (blocks, 1, 1),
        meta.shared,
        bool(getattr(meta, "launch_cooperative_grid", False)),
        bool(getattr(meta, "launch_pdl", False)),
    )


def _arguments(kernel: Any, given: dict[str, Any]) -> list[Argument]:
    """What is passed, in order: arguments that are constexprs, or 1 and so specialized, are not."""
    found: list[Argument] = []
    writes = written(kernel.asm["ttir"], kernel.name)
    descriptors = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())

    def visit(name: str, kind: Any, value: Any) -> None:
        if kind == "constexpr":
            return
        if isinstance(kind, tuple):
            for position, (inner, part) in enumerate(zip(kind, value)):
                visit(f"{name}[{position}]", inner, part)
            return
        if kind.startswith("tensordesc"):
            tile = _tile(name, value, next(descriptors, None))
            found.append(Argument(name, "CUtensorMap", tile, len(found) in writes))
            found.extend(Argument(name, "int32_t", int(n)) for n in value.shape)
            found.extend(Argument(name, "int64_t", int(n)) for n in value.strides)
            return
        if kind.startswith("*"):
            pointee = _POINTEES.get(kind.removeprefix("*k").removeprefix("*"))
            if pointee is None:
                raise KernelError(f"kernel {kernel.name!r}, argument {name!r}: a pointer to {kind[1:]}")
            tensor = value if isinstance(value, Tensor) else None
            writing = len(found) in writes
            found.append(Argument(name, f"{'' if writing else 'const '}{pointee}*", tensor, writing))
            return
        if kind not in _SCALARS:
            raise KernelError(f"kernel {kernel.name!r}, argument {name!r}: a plan cannot hold a {kind}")
        ctype = _SCALARS[kind]
        convert = {"float": float, "double": float, "bool": bool}.get(ctype, int)
        found.append(Argument(name, ctype, convert(value)))

    for name, kind in kernel.src.signature.items():
        visit(name, kind, given[name])
    return found


def _tile(name: str, value: Any, meta: dict[str, Any] | None) -> Tile:
    if meta is None or meta.get("fp4_padded") or getattr(value, "round_f32_to_tf32", False):
        raise KernelError(f"argument {name!r}: a plan cannot hold this kind of tensor descriptor")
    shape, stride = (tuple(int(n) for n in sizes) for sizes in (value.shape, value.strides))
    box = tuple(int(n) for n in meta["block_size"])
    return Tile(value.base, shape, stride, box, _SWIZZLES[meta["swizzle"]], value.padding == "nan")
