"""Stopping another process and letting it go on, by descriptors of it: whoever has them may."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

STOP_SECONDS = 10.0
"""How long a process may take to stand still."""


class Leash:
    """``pidfd`` and ``stat``, its ``/proc/PID/stat`` (-1: it had ended before that could be opened), are closed with it."""

    def __init__(self, pidfd: int, stat: int) -> None:
        self.pidfd, self.stat = pidfd, stat
        self.frozen = False

    def freeze(self) -> None:
        """Stop every thread of the process; returns once it has stopped, or died: one that does not stop is killed."""
        self._signal(signal.SIGSTOP)
        self.frozen = True
        deadline = time.monotonic() + STOP_SECONDS
        while self.stat >= 0 and time.monotonic() < deadline:
            try:
                state = os.pread(self.stat, 512, 0).rpartition(b")")[2][1:2]
            except ProcessLookupError:
                return
            if state in b"TtZX":
                return
        self.kill()

    def thaw(self) -> None:
        """Let a frozen process go on."""
        self.frozen = False
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process. Does not wait."""
        self._signal(signal.SIGKILL)

    def alive(self, seconds: float = 0.0) -> bool:
        """Whether it has not ended; waits for its end so long at the most."""
        watched = select.poll()
        watched.register(self.pidfd, select.POLLIN)
        return not watched.poll(1e3 * seconds)

    def close(self) -> None:
        """Let go of the process, which stays as it is."""
        for fd in (self.pidfd, self.stat):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.stat = -1

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)
