"""The host lane for a GPU inside its sandbox: a module's ``forward`` or ``ModelNew``, run for real.

Until a module is loaded this process can be trusted; then nothing that it does or says. What keeps it honest is the
other side, ``gpu_host``: inputs and parameters lie in memory that the judge lends, filled while this process is stopped;
it tells where its outputs lie, and the judge copies them while it is stopped again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ke_gym.evaluation._host import answers, instantiate, use_binaries
from ke_gym.evaluation.channel import Channel, beginning
from ke_gym.evaluation.gpu_lending import await_go, lent, take_device
from ke_gym.evaluation.gpu_memory import lacks_memory
from ke_gym.evaluation.gpu_stage import first_line
from ke_gym.evaluation.sandbox import Sandbox, seal
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import Signature
from ke_gym.targets.cuda_driver import CudaError, Driver

ERROR_CHARACTERS = 4000
WAIT_FROM_S = 1e-3
"""Calls that take less are not waited for: the judge does so anyway. Longer ones must be: from some 1.3 ms on (an H200) the
device goes to and fro between processes that both have something to do."""


class Host:
    """Answers the judge's requests over ``link``, one method each, until the judge is gone."""

    def __init__(self, link: Channel, driver: Driver, device: torch.device) -> None:
        self._link, self._driver, self._device = link, driver, device
        self._opened: dict[str, int] = {}
        one = torch.zeros(1, device=device)
        self._forward: Callable[[], Any] = lambda: one
        self._wanted: list[Tensor] = [one]
        self._results: list[Tensor] = []
        self._waits = True
        self._least_work, self._least_answer = driver.least_work(one.data_ptr()), beginning(self.call())
        self._least_work()
        torch.cuda.synchronize(device)

    def serve(self) -> None:
        """Answer until the judge is gone."""
        with contextlib.suppress(EOFError):
            while True:
                header, blob = self._link.recv(timeout=None)
                request = getattr(self, header.pop("do"))
                try:
                    answer = request(**header, **({"blob": blob} if blob else {}))
                except Exception as error:
                    answer = {"error": _told(error), "lacks_memory": lacks_memory(error)}
                if answer is not None:
                    self._link.send(answer)

    # -- requests --------------------------------------------------------------------------------------------

    def load(
        self, artifact_bytes: int, shape_set: str, inputs: list[Any], state: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        """Let calls run an artifact's module on memory of the judge's; ``blob``: the artifact and the task's signature."""
        artifact = Artifact.from_bytes(blob[:artifact_bytes])
        signature = Signature.from_bytes(blob[artifact_bytes:])
        given = [self._tensor(each) for each in inputs]
        held = {name: self._tensor(each) for name, each in state.items()}
        specs = signature.outputs[shape_set]
        self._results, self._waits = [], True
        self._wanted = [
            torch.empty_strided(spec.shape, spec.stride, dtype=spec.torch_dtype, device=self._device)
            for spec in specs
        ]
        use_binaries(artifact)
        self._forward = instantiate(artifact.source, signature, shape_set, given, held, self._device)
        torch.cuda.synchronize(self._device)
        return {}

    def nothing(self) -> None:
        """The least that there can be to a call, which nobody can do without: to go on, to have something done on the device,
        which is not waited for, to answer."""
        await_go(self._link.sock)
        self._least_work()
        self._link.sock.send(self._least_answer)

    def timed(self) -> dict[str, Any]:
        """One call, between the judge's ``GO`` and the answer."""
        self._forget()
        await_go(self._link.sock)  # it is stopped as soon as it is ready, and goes on with GO
        return self.call()

    def call(self) -> dict[str, Any]:
        """Run; where the outputs lie."""
        begin = time.perf_counter()
        self._results = answers(self._forward(), self._wanted)
        outputs = [self._described(index) for index in range(len(self._results))]
        if self._waits:
            torch.cuda.synchronize(self._device)
            self._waits = time.perf_counter() - begin > WAIT_FROM_S
        return {"outputs": outputs}

    # -- plumbing --------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Let go of the last call's outputs; whoever leaves out what is already right there shall not find it."""
        for tensor in self._results:
            with contextlib.suppress(RuntimeError):  # one that overlaps itself
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
        self._results = []
        torch.cuda.synchronize(self._device)

    def _described(self, index: int) -> list[Any]:
        """What the judge opens an output by: its allocation's handle, where in it, stride."""
        tensor = self._results[index]
        if not tensor.numel():
            return ["", 0, list(tensor.stride())]
        try:
            handle, offset = self._driver.share(tensor.data_ptr())
        except CudaError:  # an input, or from a pool that cannot be lent
            self._results[index] = tensor = tensor.clone()
            handle, offset = self._driver.share(tensor.data_ptr())
        return [handle.hex(), offset, list(tensor.stride())]

    def _tensor(self, described: Sequence[Any]) -> Tensor:
        return lent(self._driver, self._device, self._opened, described)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]


def serve(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of the process; ``fds`` holds its end of the connection to the judge, the only one that it listens to."""
    torch.set_grad_enabled(False)
    link, device = Channel(socket.socket(fileno=fds[0])), take_device(args)
    try:
        torch.cuda.set_device(device)
        host = Host(link, Driver(), device)
    except (RuntimeError, OSError, AssertionError, CudaError) as error:
        link.send({"error": first_line(error), "lacks_memory": lacks_memory(error)})
        return
    seal(Sandbox("device"))
    link.send({})
    host.serve()
    os._exit(0)
