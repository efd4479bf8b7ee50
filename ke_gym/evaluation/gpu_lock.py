"""Who uses a GPU, of all threads and processes of this project on a machine."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ke_gym.evaluation.account import ALONE, SHARING, WAITING, Account


class DeviceLock:
    """Whoever times something has the device alone; who only computes on it (checks, opens a process) shares it.

    A thread keeps what it has in inner contexts: alone, it needs no more; one that shares the device lets go of it
    before it gets it alone, and shares it again afterwards. Who waits is next: a second lock, held while waiting, keeps
    whoever had the device just now from taking it again. Both are file locks, which end with their process.
    """

    def __init__(self, folder: Path, uuid: str, account: Account | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / f"gpu-{uuid}.{name}" for name in ("lock", "next")]
        self._account = account or Account()
        self._mine = threading.local()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else uses the device."""
        with self._held(fcntl.LOCK_EX):
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Nobody has the device alone."""
        with self._held(fcntl.LOCK_SH):
            yield

    @contextmanager
    def _held(self, mode: int) -> Iterator[None]:
        held: tuple[int, int] | None = self._mine.__dict__.get("held")
        if held is not None and held[1] in (mode, fcntl.LOCK_EX):
            yield
            return
        file = (
            held[0]
            if held is not None
            else os.open(self._files[0], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )
        try:
            self._take(file, mode)
            self._mine.held = file, mode
            start = time.perf_counter()
            try:
                yield
            finally:
                self._account.add(ALONE if mode == fcntl.LOCK_EX else SHARING, time.perf_counter() - start)
                self._mine.held = held
                if held is not None:
                    self._take(file, held[1])
        finally:
            if held is None:
                os.close(file)

    def _take(self, file: int, mode: int) -> None:
        """Give back what is held, stand in line, and take."""
        with self._account.within(WAITING):
            fcntl.flock(file, fcntl.LOCK_UN)
            line = os.open(self._files[1], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(line, fcntl.LOCK_EX)
                fcntl.flock(file, mode)
            finally:
                os.close(line)
