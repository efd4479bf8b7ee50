"""Generated CUDA C++ modules run on a CPU, thread by thread (see ``cuda_host.h``): the arithmetic, not the device."""

from __future__ import annotations

import ctypes
import inspect
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ke_gym import lang
from ke_gym.codegen import Program
from ke_gym.codegen.schedule import Schedule
from ke_gym.languages.cuda import parse_kernels, tensor_map
from ke_gym.tasks import Task
from tests.codegen.interpret import compare, imported
from tests.codegen.interpret import program as for_triton

HERE = Path(__file__).parent
# Schedules that take rows in several passes, and tasks whose accesses are whole vectors.
IN_PASSES = {
    "softmax": (("columns", 64), ("rows", 4)),
    "cumsum": (("columns", 64), ("rows", 8)),
    "column_mean": (("rows", 16),),
    "layer_norm": (("columns", 16), ("warps", 1)),
}
VECTORS = HERE / "vectors"
IN_VECTORS = [
    ("rows", (), "load<4>(x, row * 128 + at)"),
    ("rows", (("columns", 64),), "load<4>(x, row * 128 + at)"),
    ("rows", (("rows", 8), ("warps", 1)), "load<4>(x, row * 128 + at)"),
    ("elements", (), "load<2>(x, at)"),
    ("elements", (("rows", 1024),), "load<8>(x, at)"),
]


IN_BAGS = [
    (name if name == "embedding_bag" else str(HERE / "bags" / f"{name}.py"), launch)
    for name, launch in (
        ("embedding_bag", ()),
        ("embedding_bag", (("rows", 1), ("columns", 32), ("warps", 1))),
        ("mean", ()),
        ("mean", (("rows", 64), ("warps", 8))),
        ("wide", ()),
        ("wide", (("columns", 128), ("rows", 2), ("warps", 4))),
        ("wide", (("columns", 512), ("rows", 4), ("warps", 2))),
    )
]


_MEMORY = "extern __shared__ __align__(1024) unsigned char memory[];"
_ON_HOST = "unsigned char* const memory = host::memory;"


@cache
def program(name: str) -> Program:
    """The task's program in CUDA C++, at its small odd sizes."""
    return Program(name, tuple(replace(graph, language="cuda") for graph in for_triton(name).graphs))


class HostKernels:
    """The kernels of one CUDA C++ source, compiled for this CPU into ``folder``."""

    def __init__(self, source: str, folder: Path) -> None:
        entries = [
            f'extern "C" void on_host_{name}(unsigned along, unsigned across, unsigned x, unsigned y, void** arguments) '
            f"{{ host::Runner<{name}>::run(along, across, x, y, arguments); }}"
            for name in parse_kernels(source)
        ]
        for header in ("cuda_fp16.h", "cuda_bf16.h"):
            (folder / header).touch()
        (folder / "kernels.cpp").write_text(
            "\n".join(['#include "cuda_tensor_cores_host.h"', source.replace(_MEMORY, _ON_HOST), *entries])
        )
        command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-o", "kernels.so", "kernels.cpp"]
        done = subprocess.run(
            [*command, f"-I{HERE}", "-I."], cwd=folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[:3000]
        self.library = ctypes.CDLL(str(folder / "kernels.so"))

    def __getattr__(self, name: str) -> Any:
        return _Kernel(getattr(self.library, f"on_host_{name}"))


class HostTiles(ctypes.Structure):
    """A tensor that travels as tiles (``CUtensorMap`` in the header)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_longlong * 5) for name in ("shape", "stride", "box")),
        ("size", ctypes.c_longlong),
        ("swizzle", ctypes.c_longlong),
    )

    @classmethod
    def of(cls, tensor: torch.Tensor, box: tuple[int, ...], **described: Any) -> HostTiles:
        tile = tensor_map(tensor, box, **{"swizzle": 0, "nan_fill": False, "writes": False} | described)
        size = tensor.element_size()
        assert tile.stride[-1] == 1 and tile.swizzle in (0, 128) and tensor.data_ptr() % 16 == 0
        assert not any(stride * size % 16 for stride in tile.stride[:-1]) and max(tile.box) <= 256
        more = (1,) * (5 - len(tile.shape))
        listed = ((ctypes.c_longlong * 5)(*more, *sizes) for sizes in (tile.shape, tile.stride, tile.box))
        return cls(tensor.data_ptr(), *listed, size, tile.swizzle)


class _Kernel:
    def __init__(self, entry: Any) -> None:
        self.entry = entry

    def __getitem__(self, where: tuple[Any, ...]) -> Callable[..., None]:
        along, across = where[0] if isinstance(where[0], tuple) else (where[0], 1)
        x, y = where[1] if isinstance(where[1], tuple) else (where[1], 1)

        def launch(*given: torch.Tensor | HostTiles) -> None:
            places = (g.data_ptr() if isinstance(g, torch.Tensor) else ctypes.addressof(g) for g in given)
            self.entry(along, across, x, y, (ctypes.c_void_p * len(given))(*places))

        return launch


def ran(
    source: str, folder: Path, inputs: tuple[Any, ...], state: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What a module returns whose kernels run on this CPU, those on tensor cores too."""
    weights = {name.replace(".", "_"): value.detach() for name, value in state.items()}
    with (
        patch.object(lang, "cuda", lambda source: HostKernels(source, folder)),
        patch.object(lang, "tensor_map", HostTiles.of),
    ):
        forward = imported(source, folder).forward
        names = list(inspect.signature(forward).parameters)[len(inputs) :]
        result: torch.Tensor = forward(*inputs, *(weights[name] for name in names))
    return result


def check(name: str, schedule: Schedule, folder: Path) -> None:
    """Whether the module computes what the reference does, inputs with infinities and NaN included."""
    with patch.object(lang, "cuda", lambda source: HostKernels(source, folder)):
        module = imported(program(name).emit(schedule), folder)
    compare(module, Task.load(name))
