"""Who uses a GPU, of all threads and processes of this project on a machine, whoever started them."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ke_gym.errors import UserError
from ke_gym.evaluation.account import ALONE, SHARING, WAITING, Account

FOLDER = Path("/tmp/ke_gym-locks")
"""Where devices' locks lie: in one place for all users, wherever each has its own files."""


class DeviceLock:
    """Whoever times something has the device alone; who only computes on it (checks, draws, ends) shares it.

    Who times comes first, one after the other in the order in which they came: the fewer changes between the two, the
    less anybody waits for others to end. A thread keeps what it has in inner contexts: alone, it needs no more; one
    that shares the device lets go of it before it gets it alone, and shares it again afterwards. These are file locks,
    which end with their process. Raises ``UserError`` where there can be none.
    """

    def __init__(self, uuid: str, account: Account | None = None) -> None:
        try:
            FOLDER.mkdir(mode=0o700)
            FOLDER.chmod(0o1777)  # whatever the umask says
        except FileExistsError:
            pass
        except OSError as error:
            raise _no_lock(error) from error
        self._device, self._wish, self._line = (
            FOLDER / f"gpu-{uuid}.{name}" for name in ("lock", "wish", "next")
        )
        self._account = account or Account()
        self._mine = threading.local()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else uses the device."""
        with self._held(fcntl.LOCK_EX, ALONE):
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Nobody has the device alone."""
        with self._held(fcntl.LOCK_SH, SHARING):
            yield

    @contextmanager
    def _held(self, mode: int, name: str) -> Iterator[None]:
        outer: int | None = self._mine.__dict__.get("mode")
        if outer in (mode, fcntl.LOCK_EX):
            yield
            return
        if outer is not None:
            self._mine.files.close()
        self._take(mode)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._account.add(name, time.perf_counter() - start)
            self._mine.files.close()
            self._mine.mode = None
            if outer is not None:
                self._take(outer)

    def _take(self, mode: int) -> None:
        with self._account.within(WAITING), ExitStack() as files:
            if mode == fcntl.LOCK_EX:
                # As long as anybody wishes so, or has it alone, nobody comes in to share it.
                files.enter_context(_locked(self._wish, fcntl.LOCK_SH))
                with _locked(self._line, fcntl.LOCK_EX):
                    files.enter_context(_locked(self._device, fcntl.LOCK_EX))
            else:
                with _locked(self._wish, fcntl.LOCK_EX):
                    files.enter_context(_locked(self._device, fcntl.LOCK_SH))
            self._mine.files, self._mine.mode = files.pop_all(), mode


@contextmanager
def _locked(path: Path, mode: int) -> Iterator[None]:
    file = _opened(path)
    try:
        fcntl.flock(file, mode)
        yield
    finally:
        os.close(file)


def _opened(path: Path) -> int:
    """A file to lock, which may be another user's: to read is enough. Raises ``UserError``."""
    problem = OSError()
    # In such a folder not everybody may ask for what is there already to be made.
    for making in (0, os.O_CREAT, 0):
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | making, 0o644)
            if making and os.fstat(file).st_uid == os.geteuid():
                os.fchmod(file, 0o644)  # whatever the umask says
            return file
        except OSError as error:
            problem = error
    raise _no_lock(problem)


def _no_lock(error: OSError) -> UserError:
    return UserError(
        f"a GPU cannot be shared with others on this machine ({error}); let everybody read and write {FOLDER}"
    )
