"""Worker processes in milliseconds: forked from one warm process that has torch imported and no threads.

    parent ──spawn──▶ zygote ──fork──▶ waiter (trusted) ──fork──▶ worker (sandboxed, first of its namespace)

The waiter alone holds the line on which the worker's end is reported, so a worker cannot forge its own exit.
Killing the worker kills everything it started. When the parent dies, by whatever cause, the zygote sees the
connection close, and the kernel kills waiter and worker after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ke_gym.evaluation.channel import Channel, ProtocolError
from ke_gym.evaluation.leash import Leash
from ke_gym.evaluation.sandbox import Sandbox

LOG_BYTES = 64 << 10
START_TIMEOUT = 120.0
SPAWN_TIMEOUT = 30.0
END_SECONDS = 30.0
"""How long a process may take to be gone once it is killed."""
SPIN = "1000"  # loops that an idle OpenMP thread waits before it sleeps, some 15 us


@dataclass(frozen=True)
class Exit:
    """How a worker ended: an exit code, or the number of the signal that killed it."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.code}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(self.signal).name
            return f"{name} ({signal.strsignal(self.signal)})"
        return f"signal {self.signal}"


class Worker:
    """The parent's handle on one worker. ``close`` (or ``with``) leaves nothing behind."""

    def __init__(self, pid: int, pidfd: int, channel: Channel, status: Channel, log_fd: int) -> None:
        self.pid = pid
        self.channel = channel
        self._status = status
        self._log_fd = log_fd
        self._exit: Exit | None = None
        self.leash = Leash(pidfd, -1)
        # The number could only have been reused if the process were gone: then the pidfd is readable.
        with contextlib.suppress(FileNotFoundError):
            stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            if self.leash.alive():
                self.leash.stat = stat
            else:
                os.close(stat)

    def freeze(self) -> None:
        """Stop every thread of the worker; returns once it has stopped (or died)."""
        self.leash.freeze()

    def thaw(self) -> None:
        """Let a frozen worker go on."""
        self.leash.thaw()

    def kill(self) -> None:
        """Kill the worker and everything it started. Does not wait."""
        self.leash.kill()

    def wait(self, timeout: float | None = None) -> Exit:
        """How the worker ended. Raises ``TimeoutError`` if it has not within ``timeout`` seconds."""
        if self._exit is None:
            try:
                status = int(self._status.recv(timeout, limit=0)[0]["status"])
            except EOFError:
                self._exit = Exit(signal=int(signal.SIGKILL))  # the zygote is gone, and all with it
            else:
                code = os.waitstatus_to_exitcode(status)
                self._exit = Exit(code=code) if code >= 0 else Exit(signal=-code)
        return self._exit

    @property
    def frozen(self) -> bool:
        return self.leash.frozen

    def log(self, limit: int = 4000) -> str:
        """What the worker wrote to its standard error (the first 64 KiB of it), untrusted text."""
        data = os.pread(self._log_fd, LOG_BYTES, 0).rstrip(b"\0")
        text = data.decode("utf-8", "replace")
        text = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
        return text if len(text) <= limit else "…" + text[-limit:]

    def close(self) -> None:
        """Kill the worker if it still lives, wait for its end, release everything."""
        if self._log_fd < 0:
            return
        self.kill()
        with contextlib.suppress(TimeoutError, ProtocolError):
            self.wait(END_SECONDS)
        self.leash.close()
        os.close(self._log_fd)
        self._log_fd = -1
        self.channel.close()
        self._status.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SpawnError(RuntimeError):
    """A worker could not be started."""


class Zygote:
    """The process that workers are forked from. Starts at once, and again if it should die.

    ``threads``: OpenMP threads of every worker; ``environment``: what else they have. Safe to use from several
    threads. A context manager; closing it ends every worker it made.
    """

    def __init__(self, threads: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self.threads = threads
        self._environment = dict(environment or {})
        self._lock = threading.Lock()
        self._closed = False
        self._ready: dict[str, Any] | None = None
        self._start()

    @property
    def sandbox_level(self) -> str:
        """``"full"``, or ``"partial: <what is missing and why>"``."""
        with self._lock:
            return str(self._await_ready()["level"])

    @property
    def pid(self) -> int:
        return self._process.pid

    def spawn(
        self,
        entry: str,
        args: dict[str, Any] | None = None,
        fds: Sequence[int] = (),
        sandbox: Sandbox = Sandbox("trusted"),  # noqa: B008 - frozen
    ) -> Worker:
        """Start ``module:function`` as ``function(channel, args, fds)`` in a process of its own.

        ``args`` must be JSON; ``fds`` arrive under other numbers, in order, and stay the caller's. Raises
        ``SpawnError`` when the zygote cannot fork, also after a restart.
        """
        for last in (False, True):
            with self._lock:
                before = self._process
            try:
                return self._spawn(entry, args or {}, fds, sandbox)
            except (EOFError, TimeoutError) as error:
                with self._lock:
                    if last or self._closed:
                        reason = "it is closed" if self._closed else f"it died twice: {self._log_tail()}"
                        raise SpawnError(f"the zygote did not start {entry}: {reason}") from error
                    broken = self._process.poll() is not None or isinstance(error, TimeoutError)
                    if broken and self._process is before:  # else another thread has started it again
                        self._stop()
                        self._start()
        raise AssertionError("unreachable")

    def _spawn(self, entry: str, args: dict[str, Any], fds: Sequence[int], sandbox: Sandbox) -> Worker:
        channel, channel_end = Channel.pair()
        status, status_end = Channel.pair()
        log_fd = sealed_memory(LOG_BYTES, "log")
        try:
            request = {"entry": entry, "args": args, "sandbox": asdict(sandbox)}
            with channel_end, status_end, self._lock:
                if self._closed:
                    raise EOFError("closed")
                self._await_ready()
                passed = [channel_end.fileno(), status_end.fileno(), log_fd, *fds]
                self._control.send(request, fds=passed, timeout=SPAWN_TIMEOUT)
            reply, _ = status.recv(SPAWN_TIMEOUT, limit=0, accept_fds=True)
            if "error" in reply:
                raise SpawnError(f"{entry}: {reply['error']}")
            (pidfd,) = status.take_fds()
        except BaseException:
            os.close(log_fd)
            channel.close()
            status.close()
            raise
        return Worker(int(reply["pid"]), pidfd, channel, status, log_fd)

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._stop()

    def _start(self) -> None:
        self._control, theirs = Channel.pair()
        self._log_fd = os.memfd_create("zygote-log", os.MFD_CLOEXEC)
        self._ready = None
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ke_gym.evaluation.zygote", str(theirs.fileno())],
                env=worker_environment(self.threads) | self._environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log_fd,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt at the terminal is for the parent to handle
            )

    def _stop(self) -> None:
        self._control.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._log_fd)

    def _await_ready(self) -> dict[str, Any]:
        if self._ready is None:
            try:
                self._ready = self._control.recv(START_TIMEOUT)[0]
            except EOFError as error:
                raise EOFError(self._log_tail()) from error
        return self._ready

    def _log_tail(self) -> str:
        return os.pread(self._log_fd, 1 << 20, 0).decode("utf-8", "replace")[-2000:].strip()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sealed_memory(size: int, name: str) -> int:
    """An anonymous file of exactly ``size`` bytes, for ever: nobody can shrink it under a mapping.

    (Reading past the end of a shrunken file would kill the reader.)
    """
    import fcntl

    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    # Whoever is given a read-only descriptor must not open it again for writing (and may not change modes).
    os.fchmod(fd, 0o400)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def worker_environment(threads: int) -> dict[str, str]:
    """The whole environment of zygote and workers: nothing of the parent's comes with it but the paths.

    Large blocks are kept on the heap and the heap is never given back (``MALLOC_*``), so that neither the
    reference nor a candidate pays page faults in every call: both are measured in the steady state.

    Each OpenMP thread has a core of its own and soon sleeps when it has nothing to do. Otherwise a call now and
    then takes a multiple of the scheduler's tick longer: two threads meet on one core, or one that idly spins
    keeps the parent, which holds the clock, from noticing that the call is over.
    """
    import torch

    roots = [Path(__file__).resolve().parents[2], Path(torch.__file__).resolve().parents[1]]
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(map(str, roots))),
        "OMP_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": ",".join(f"{{{core}}}" for core in sorted(os.sched_getaffinity(0))[:threads]),
        "GOMP_SPINCOUNT": SPIN,
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's would start its threads at import
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 62),
    }


if __name__ == "__main__":
    from ke_gym.evaluation._zygote_main import main

    main(socket.socket(fileno=int(sys.argv[1])))
