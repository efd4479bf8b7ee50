"""Device memory that a kernel is given: tensors apart from each other, red zones and poison around and in them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ke_gym.evaluation.shared import POISON, RED_BYTE, zones
from ke_gym.languages.plan import TensorSpec
from ke_gym.targets._memory import view
from ke_gym.targets.cuda_driver import OUT_OF_MEMORY, CudaError

ALIGNMENT = 256
RED_ZONE = 4096
OVERHEAD = 2 << 30
"""Bytes that a process may have of the device besides what torch knows of: contexts, code, workspaces."""
KEPT_SHARE, SCARCE = 1 / 32, 1 / 8
"""The share of a device's memory that a process may keep without using it, unless less than so much is free."""
_LACKING = re.compile(r"(CUDA|cu\w+) error: .*(out of memory|ALLOC(ATION)?_FAILED)")
_ASKED = re.compile(r"Tried to allocate ([\d.]+) ([KMG]iB)")
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SHIFTS = 64
"""A block's tensors may begin at this many multiples of the alignment: pointers are new in every call."""


@dataclass(frozen=True)
class Placement:
    """Byte offsets of tensors in ``size`` bytes, each with a red zone on both sides."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, specs: Sequence[TensorSpec]) -> Placement:
        offsets, end = [], 0
        for spec in specs:
            offsets.append(_align(end + RED_ZONE))
            end = offsets[-1] + spec.storage_bytes
        return cls(tuple(specs), tuple(offsets), _align(end + RED_ZONE))

    @property
    def used(self) -> list[tuple[int, int]]:
        """(offset, length) of every tensor, in bytes."""
        return [(offset, spec.storage_bytes) for spec, offset in zip(self.specs, self.offsets)]


def lacks_memory(error: BaseException) -> bool:
    """Whether it is the device's memory that was lacking: torch's allocator, a library's workspace, or the driver says so."""
    if isinstance(error, CudaError):
        return error.code == OUT_OF_MEMORY
    text = isinstance(error, RuntimeError) and _LACKING.match(str(error))
    return isinstance(error, torch.OutOfMemoryError) or bool(text)


def taken_elsewhere(error: BaseException) -> int | None:
    """About how many bytes of the current device other processes have; 0 for little, or if what this one has and then lacked
    would be too much for the whole device; None if the device says nothing more: its context is lost."""
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:
        return None
    own = torch.cuda.memory_reserved()
    asked = _ASKED.search(str(error))
    lacked = float(asked[1]) * _UNITS[asked[2]] if asked else 0.0
    taken = total - free - own
    return taken if taken > OVERHEAD and own + lacked <= total - OVERHEAD else 0


def give_back(device: torch.device, size: int) -> None:
    """Give memory that is not used back to the device, for others to have, if it is more than ``KEPT_SHARE`` of its ``size``
    or others are short of it.

    Not for every bit of it: to give and take is the driver's work, which waits while it makes any GPU's contexts.
    """
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if unused > KEPT_SHARE * size or (unused and torch.cuda.mem_get_info(device)[0] < SCARCE * size):
        torch.cuda.empty_cache()


class Block:
    """Memory for the tensors of a placement, which lie elsewhere in it after every ``shift``."""

    def __init__(self, placement: Placement, device: torch.device, raw: Tensor | None = None) -> None:
        """``raw``: the ``room`` bytes to take for it, which are the caller's; new ones if None."""
        self.placement = placement
        room = self.room(placement)
        self._raw = torch.empty(room, dtype=torch.uint8, device=device) if raw is None else raw
        self.shift(0)

    @staticmethod
    def room(placement: Placement) -> int:
        """The bytes that a block takes."""
        return placement.size + SHIFTS * ALIGNMENT

    def shift(self, steps: int) -> None:
        """Let the tensors begin ``steps`` (below ``SHIFTS``) times 256 bytes into the memory."""
        begin = steps * ALIGNMENT
        self.bytes = self._raw[begin : begin + self.placement.size]
        pairs = zip(self.placement.specs, self.placement.offsets)
        self.tensors = [view(self.bytes, spec, offset) for spec, offset in pairs]

    def lay(self, specs: Sequence[TensorSpec]) -> None:
        """See the tensors' memory in these layouts, until the next shift; none may need more bytes than it has."""
        self.tensors = [
            view(self.bytes, spec, at) for spec, at in zip(specs, self.placement.offsets, strict=True)
        ]

    def jump(self, rng: random.Random) -> None:
        """Move the tensors to a random place."""
        self.shift(rng.randrange(SHIFTS))


def ring(memory: Tensor, used: Sequence[tuple[int, int]]) -> None:
    """Fill bytes with ``RED_BYTE`` where they are not used."""
    for begin, end in zones(used, memory.numel()):
        memory[begin:end].fill_(RED_BYTE)


def poison(memory: Tensor, used: Sequence[tuple[int, int]], pattern: int) -> None:
    """Fill bytes with ``POISON[pattern]`` where they are used and with ``RED_BYTE`` everywhere else."""
    ring(memory, used)
    for offset, length in used:
        memory[offset : offset + length].fill_(POISON[pattern])


def damaged(memory: Tensor, used: Sequence[tuple[int, int]]) -> int | None:
    """The first byte outside of ``used`` that no longer holds ``RED_BYTE``, or None."""
    for begin, end in zones(used, memory.numel()):
        wrong = memory[begin:end] != RED_BYTE
        if bool(wrong.any()):
            return begin + int(wrong.to(torch.uint8).argmax())
    return None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits (NaN included)."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = integers[a.element_size()]
    return bool(torch.equal(a.contiguous().view(kind), b.contiguous().view(kind)))


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
