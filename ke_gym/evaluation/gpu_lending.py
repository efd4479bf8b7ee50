"""Device memory of the judge's in another process, and the bytes by which the two time a call there."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ke_gym.languages.plan import TensorSpec
from ke_gym.targets import cuda
from ke_gym.targets._memory import view
from ke_gym.targets.cuda_driver import Driver, at_address

READY, GO = b"r", b"g"
"""A timed call can begin, says who makes it; it shall begin, says the judge."""


def described(driver: Driver, tensor: Tensor) -> list[Any]:
    """What another process opens a tensor by: its allocation's handle, where in it, shape, stride, dtype."""
    spec = TensorSpec.of(tensor)
    handle, offset = (b"", 0) if not tensor.numel() else driver.share(tensor.data_ptr())
    return [handle.hex(), offset, list(spec.shape), list(spec.stride), spec.dtype]


def lent(driver: Driver, device: torch.device, opened: dict[str, int], told: Sequence[Any]) -> Tensor:
    """The tensor that the judge has told of (``described``); ``opened`` are its allocations that are open already, by handle."""
    handle, offset, shape, stride, dtype = told
    spec = TensorSpec(tuple(shape), tuple(stride), dtype)
    if not handle:
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.torch_dtype, device=device)
    if handle not in opened:
        opened[handle] = driver.open_shared(bytes.fromhex(handle))
    return view(at_address(opened[handle] + offset, spec.storage_bytes, device), spec, 0)


def await_go(sock: socket.socket) -> None:
    """Say that a call can begin, and wait until it shall. Raises ``EOFError`` once the judge is gone."""
    sock.send(READY)
    while True:  # without sleeping: the judge's clock runs from when it sends
        try:
            if sock.recv(1) != GO:
                raise EOFError("the judge is gone")
            return
        except BlockingIOError:
            continue


def worker_arguments(device: int, relaxed: bool) -> dict[str, Any]:
    """What a process that works for the judge of GPU number ``device`` is told; see ``take_device``."""
    return {"device": device, "cores": sorted(os.sched_getaffinity(0)), "relaxed": relaxed}


def take_device(args: dict[str, Any]) -> torch.device:
    """Have cores, precision and device as the judge has them; the device, which is not touched yet."""
    os.sched_setaffinity(0, args["cores"])
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = args["relaxed"]
    torch.backends.cudnn.allow_tf32 = args["relaxed"]
    cuda.show_only(args["device"])
    return torch.device("cuda", 0)
