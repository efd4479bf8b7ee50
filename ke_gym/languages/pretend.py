"""A GPU to trace for, where there is none: fake tensors on it, and answers to a module's questions about it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from ke_gym.languages.device import Arch
from ke_gym.languages.module import FILE

_CUDA, _META, _DEVICE_TYPES = 1, 14, 22  # c10::DeviceType


@contextmanager
def pretending(arch: Arch) -> Iterator[None]:
    """Answer a module's questions about the GPU with what is known of ``arch``, wherever this runs."""
    facts = SimpleNamespace(
        name=f"NVIDIA {arch.name}",
        major=arch.capability[0],
        minor=arch.capability[1],
        multi_processor_count=arch.multiprocessors,
        warp_size=32,
        shared_memory_per_block_optin=arch.block_shared,
        shared_memory_per_multiprocessor=arch.shared,
        regs_per_multiprocessor=arch.registers,
        max_threads_per_multi_processor=32 * arch.warps,
    )
    _allow_fake_tensors()
    available = torch.cuda.is_available

    def is_available() -> bool:
        # torch itself must not believe it: it would set up a context.
        return sys._getframe(1).f_code.co_filename == FILE or available()

    answers: dict[str, Callable[..., Any]] = {
        "is_available": is_available,
        "get_device_properties": lambda device=None: facts,
        "get_device_capability": lambda device=None: arch.capability,
        "get_device_name": lambda device=None: facts.name,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
    }
    with ExitStack() as patched:
        for name, answer in answers.items():
            patched.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield


@functools.cache
def _allow_fake_tensors() -> None:
    """Let a CPU-only torch index fake CUDA tensors.

    Some of its functions enter the device of their argument first, which such a build refuses. Where torch was
    built with CUDA but finds no GPU, ``FakeTensorMode`` puts a guard that does nothing in the place of CUDA's
    (``torch._C._ensureCUDADeviceGuardSet``); this does the same, with the guard of the meta device.
    """
    if torch.version.cuda is not None:
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[_CUDA] = guards[_META]
