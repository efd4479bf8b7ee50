"""Inside the zygote: import everything once, then fork waiters and workers on request."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pkgutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from ke_gym.evaluation._libc import (
    LIBC,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    PR_SET_THP_DISABLE,
    prctl,
)
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.sandbox import Sandbox, enter, seal, unshare

# The first process of a namespace does not die of these by default, so they are made to end it.
_INIT_IGNORES = (signal.SIGABRT, signal.SIGXCPU)

CORES = os.sched_getaffinity(0)  # before OpenMP binds this thread to the first

Entry = Callable[[Channel, dict[str, Any], list[int]], None]


def main(sock: socket.socket) -> NoReturn:
    """Serve spawn requests until the parent is gone."""
    # Reference and candidate alike: whether the heap gets huge pages would otherwise depend on the machine's
    # setting, and shared memory does not get them.
    prctl(PR_SET_THP_DISABLE, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # waiters leave no zombies
    _warm()
    control = Channel(sock)
    level = probe_level()
    control.send({"ready": True, "level": level})
    while True:
        try:
            request, _ = control.recv(accept_fds=True)
        except EOFError:
            os._exit(0)
        fds = control.take_fds()
        status = Channel(socket.socket(fileno=fds[1]))
        try:
            function = _resolve(request["entry"])
            if (threads := len(os.listdir("/proc/self/task"))) != 1:
                raise RuntimeError(
                    f"importing it left {threads} threads running; workers could not be forked"
                )
        except Exception as error:
            status.send({"error": f"{type(error).__name__}: {error}"})
        else:
            sandbox = Sandbox(**{**request["sandbox"], "read_only": tuple(request["sandbox"]["read_only"])})
            if os.fork() == 0:
                _wait_for_worker(function, request["args"], sandbox, level == "full", fds, status)
        status.close()
        for fd in (fds[0], *fds[2:]):
            os.close(fd)


def _warm() -> None:
    """Import what workers will need. No OpenMP region may run here: its threads would not survive a fork."""
    import torch

    import ke_gym.languages
    from ke_gym.languages.base import languages
    from ke_gym.languages.plan import TensorSpec
    from ke_gym.languages.trace import trace

    for module in pkgutil.iter_modules(ke_gym.languages.__path__, "ke_gym.languages."):
        importlib.import_module(module.name)
    for name in ("lang", "targets.executor", "evaluation.arms", "evaluation.builder", "evaluation.shared"):
        importlib.import_module(f"ke_gym.{name}")
    languages()
    # A first trace loads the meta kernels and what they import. It would look for GPUs, and so start the driver
    # and a thread of its, which no fork survives.
    ask, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    trace(lambda x: torch.softmax(x @ x + 1, -1), [TensorSpec((4, 4), (4, 1), "float32")], {})
    torch.cuda.is_available = ask
    # Libraries behind ATen ask the system about its processor once; the sandbox shows no /proc/cpuinfo.
    one = torch.zeros(1, dtype=torch.int64)
    torch.nn.functional.embedding_bag(one, torch.zeros(1, 16), one)
    gc.collect()
    gc.freeze()  # collections in workers leave the shared pages alone


def _resolve(entry: str) -> Entry:
    module, _, name = entry.partition(":")
    function: Entry = getattr(importlib.import_module(module), name)
    return function


def probe_level() -> str:
    """Lock a throw-away process in as fully as possible; what is refused tells the level."""
    log = os.memfd_create("probe")
    ours, theirs = Channel.pair()
    if os.fork() == 0:
        fds = [os.dup(theirs.fileno()), theirs.fileno(), log]
        _wait_for_worker(_no_work, {}, Sandbox("run"), True, fds, Channel(theirs))
    theirs.close()
    with ours:
        reason = ours.recv()[0].get("error")
    os.close(log)
    return f"partial: no private file system, network and processes ({reason})" if reason else "full"


def _no_work(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """What the probe runs."""


def _wait_for_worker(
    function: Entry,
    args: dict[str, Any],
    sandbox: Sandbox,
    isolate: bool,
    fds: list[int],
    status: Channel,
) -> NoReturn:
    """The waiter: make the namespaces, fork the worker into them, report its end. Never returns."""
    try:
        zygote = os.getppid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != zygote:
            os._exit(1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        isolated = isolate and sandbox.kind != "trusted"
        if isolated:
            unshare()
        elif sandbox.kind == "compile":
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        gate, far_gate = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            gate.close()
            _work(function, args, sandbox, isolated, fds, far_gate)
        far_gate.close()
        pidfd = os.pidfd_open(pid)
        if not gate.recv(1):
            raise OSError(os.pread(fds[2], 1 << 16, 0).decode("utf-8", "replace").strip().rpartition("\n")[2])
        status.send({"pid": pid}, fds=[pidfd])
        _close_all_but({status.fileno()})
        _, result = os.waitpid(pid, 0)
        if isolated and os.waitstatus_to_exitcode(result) in _INIT_IGNORES:
            result = os.waitstatus_to_exitcode(result)  # as if by the signal
        _kill_orphans()
        status.send({"status": result})
    except BaseException as error:
        with contextlib.suppress(Exception):
            status.send({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _kill_orphans() -> None:
    """Without a process namespace, what a compiler left behind falls to the waiter (its subreaper)."""
    while True:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as children:
            for pid in children.read().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _work(
    function: Entry,
    args: dict[str, Any],
    sandbox: Sandbox,
    isolated: bool,
    fds: list[int],
    gate: socket.socket,
) -> NoReturn:
    """The worker: lock the door, then do the work. Never returns."""
    code = 1
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(fds[2], 2)
        channel_fd, passed = fds[0], fds[3:]
        _close_all_but({0, 1, 2, channel_fd, gate.fileno(), *passed})
        # OpenMP has bound this thread to the first core and will bind the rest of its team to the others: a
        # candidate's further threads shall not gain further cores. Compilers may run on any.
        if sandbox.kind == "compile":
            os.sched_setaffinity(0, CORES)
        enter(sandbox, isolated)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: the change of user resets it
        if sandbox.kind != "trusted":
            for name in [n for n in os.environ if n.startswith("MALLOC_") or n == "PYTHONPATH"]:
                del os.environ[name]  # compilers that a worker starts are not measured
        if isolated:
            for number in _INIT_IGNORES:
                LIBC.signal(int(number), ctypes.cast(LIBC._exit, ctypes.c_void_p))
        if sandbox.kind != "compile":
            _start_team()
        if sandbox.kind != "device":
            seal(sandbox)
        gate.send(b"r")  # fails if the waiter died before its death could reach us
        gate.close()
        function(Channel(socket.socket(fileno=channel_fd)), args, passed)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        with contextlib.suppress(BaseException):
            sys.stderr.write(traceback.format_exc())
            sys.stderr.flush()
    os._exit(code & 0xFF)


def _start_team() -> None:
    """Start torch's OpenMP threads and the compilers', each on its core, which no sealed process could."""
    import torch

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.zeros(threads << 16)
    with contextlib.suppress(OSError):  # a system without libgomp has no kernels that need it
        openmp = ctypes.CDLL("libgomp.so.1")
        openmp.GOMP_parallel(openmp.omp_get_thread_num, None, threads, 0)


def _close_all_but(keep: set[int]) -> None:
    last = -1
    for fd in [*sorted(keep), 1 << 20]:
        if fd > last + 1:  # an empty range would close everything
            os.closerange(last + 1, fd)
        last = fd
