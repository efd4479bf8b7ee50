"""Tensors in memory that several processes share, and where in it each of them lies."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ke_gym.evaluation.zygote import sealed_memory
from ke_gym.languages.plan import TensorSpec

ALIGNMENT = 64
RED_ZONE = 256
RED_BYTE = 0xA5
POISON = (0xFF, 0x5A)  # NaN in every float format and -1; then large finite values


class SharedBuffer:
    """``size`` bytes of anonymous memory that can be passed to other processes by file descriptor.

    The creator maps it read-write; a process that was given ``read_only_fd`` can never write to it.
    """

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self.fd = sealed_memory(self.size, "buffer")
        self._bytes = _map(self.fd, self.size, writable=True)

    @classmethod
    def from_fd(cls, fd: int, size: int, writable: bool = True) -> SharedBuffer:
        """The buffer of another process behind ``fd``, which is this object's from now on."""
        buffer = cls.__new__(cls)
        buffer.size, buffer.fd = max(size, 1), fd
        buffer._bytes = _map(fd, buffer.size, writable)
        return buffer

    def read_only_fd(self) -> int:
        """A new descriptor through which the memory can only be read; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def bytes(self) -> torch.Tensor:
        """All of it, as uint8."""
        return self._bytes

    def tensor(self, spec: TensorSpec, offset: int = 0) -> torch.Tensor:
        """A view of the buffer, ``offset`` bytes into it (a multiple of the element size)."""
        dtype = spec.torch_dtype
        if offset % dtype.itemsize or offset + spec.storage_bytes > self.size:
            raise ValueError(f"{spec} does not fit at byte {offset} of {self.size}")
        if spec.storage_bytes == 0:
            return torch.empty_strided(spec.shape, spec.stride, dtype=dtype)
        flat = self._bytes[offset : offset + spec.storage_bytes].view(dtype)
        return flat.as_strided(spec.shape, spec.stride)

    def close(self) -> None:
        """Close the descriptor. The mapping lives as long as a tensor refers to it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> SharedBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map(fd: int, size: int, writable: bool) -> torch.Tensor:
    """Every page is mapped now, so that no timed call pays for faults."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=protection)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors
        return torch.frombuffer(memory, dtype=torch.uint8)


@dataclass(frozen=True)
class Layout:
    """Where tensors lie in one buffer of ``bytes`` bytes: inputs (or outputs), then the state by name."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    state: tuple[str, ...]
    bytes: int

    @classmethod
    def plan(
        cls,
        specs: Sequence[TensorSpec],
        state: Mapping[str, TensorSpec] | None = None,
        rng: random.Random | None = None,
    ) -> Layout:
        """Place the tensors in order, 64-byte aligned, with red zones before, between and after them.

        ``rng`` adds random gaps (up to a page), so that no result depends on one lucky placement.
        """
        everything = [*specs, *(state or {}).values()]
        offsets, end = [], 0
        for spec in everything:
            gap = ALIGNMENT * rng.randrange(4096 // ALIGNMENT) if rng else 0
            offsets.append(_align(end + RED_ZONE + gap))
            end = offsets[-1] + spec.storage_bytes
        return cls(tuple(everything), tuple(offsets), tuple(state or ()), _align(end + RED_ZONE))

    @property
    def used(self) -> list[tuple[int, int]]:
        """(offset, length) of every tensor, in bytes."""
        return [(offset, spec.storage_bytes) for spec, offset in zip(self.specs, self.offsets)]

    def views(self, buffer: SharedBuffer) -> list[torch.Tensor]:
        """A view of every tensor, in order."""
        return [buffer.tensor(spec, offset) for spec, offset in zip(self.specs, self.offsets)]

    def split(self, buffer: SharedBuffer) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Views of the inputs, in order, and of the state, by name."""
        views = self.views(buffer)
        count = len(views) - len(self.state)
        return views[:count], dict(zip(self.state, views[count:]))

    def to_dict(self) -> dict[str, Any]:
        specs = [[spec.shape, spec.stride, spec.dtype] for spec in self.specs]
        return {"specs": specs, "offsets": self.offsets, "state": self.state, "bytes": self.bytes}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        """The inverse of ``to_dict`` (between our own processes: not validated)."""
        specs = tuple(
            TensorSpec(tuple(shape), tuple(stride), dtype) for shape, stride, dtype in data["specs"]
        )
        return cls(specs, tuple(data["offsets"]), tuple(data["state"]), data["bytes"])


def zones(used: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The (start, end) ranges of ``size`` bytes that no (offset, length) of ``used`` covers."""
    gaps, end = [], 0
    for offset, length in sorted(used):
        if offset > end:
            gaps.append((end, offset))
        end = max(end, offset + length)
    return gaps + ([(end, size)] if size > end else [])


def poison(memory: torch.Tensor, used: Sequence[tuple[int, int]], pattern: int) -> None:
    """Fill a buffer's bytes with ``POISON[pattern]`` and everything around ``used`` with ``RED_BYTE``.

    By memset, not by torch: OpenMP threads still spinning in this process would disturb the next timed call.
    """
    start = memory.data_ptr()
    for begin, end in zones(used, memory.numel()):
        ctypes.memset(start + begin, RED_BYTE, end - begin)
    for offset, length in used:
        ctypes.memset(start + offset, POISON[pattern], length)


def damaged(memory: torch.Tensor, used: Sequence[tuple[int, int]]) -> int | None:
    """The first byte outside ``used`` that no longer holds ``RED_BYTE``, or None."""
    start = memory.data_ptr()
    for begin, end in zones(used, memory.numel()):
        held = ctypes.string_at(start + begin, end - begin)
        left = held.lstrip(bytes([RED_BYTE]))
        if left:
            return end - len(left)
    return None


def nearest(byte: int, used: Sequence[tuple[int, int]], what: str) -> str:
    """Where a stray byte lies, in words about the tensor next to it."""
    after = [(byte - o - n, f"past the end of {what} {i}") for i, (o, n) in enumerate(used) if byte >= o + n]
    before = [(o - byte, f"before {what} {i}") for i, (o, n) in enumerate(used) if byte < o]
    distance, where = min(after + before, default=(byte, "into memory that holds none"))
    return f"{distance} bytes {where}"


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
