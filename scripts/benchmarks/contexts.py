"""How many contexts a second a driver makes and ends, on however many GPUs: as many fresh processes confirmations have."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from ke_gym.errors import UserError
from ke_gym.evaluation.gpu_setting import gpu_environment
from ke_gym.evaluation.record import home

CLIENT = """
import ctypes
driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
input()
print(max(driver.cuInit(0), driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)), flush=True)
input()
print(driver.cuDevicePrimaryCtxRelease_v2(0), flush=True)
"""


class Client:
    """A process that makes a context on one GPU (named as in ``CUDA_VISIBLE_DEVICES``) when told, and ends it when told
    again."""

    def __init__(self, gpu: str) -> None:
        environment = {**os.environ, **gpu_environment(home()), "CUDA_VISIBLE_DEVICES": gpu}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def tell(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what has ended says why when it is asked
            print(file=self.process.stdin, flush=True)

    def done(self) -> None:
        """Wait until it has done what it was told. Raises ``UserError`` if it could not."""
        assert self.process.stdout is not None
        if (said := self.process.stdout.readline().strip()) != "0":
            self.process.kill()
            raise UserError(f"a context could not be made or ended ({said or self.process.communicate()[1]})")


def rate(gpus: Sequence[str], each: int) -> float:
    """Contexts a second, of ``each`` processes a GPU that begin at once, and end at once when all are there.

    Another process has each GPU open meanwhile, as a search has. Raises ``UserError`` where a GPU has no context to give.
    """
    holders = [Client(gpu) for gpu in gpus]
    clients = [Client(gpu) for gpu in gpus for _ in range(each)]
    try:
        _all(holders)
        return len(clients) / (_all(clients) + _all(clients))
    finally:
        for client in (*clients, *holders):
            client.process.kill()
            client.process.communicate()


def _all(clients: Sequence[Client]) -> float:
    """Tell all to go on; the seconds until the last has."""
    begin = time.perf_counter()
    for client in clients:
        client.tell()
    for client in clients:
        client.done()
    return time.perf_counter() - begin
