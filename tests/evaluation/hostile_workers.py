"""What the tests run inside worker processes: each entry tries something and says what came of it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.sandbox import Sandbox, seal

F_SETSIG = 10
LIBC = ctypes.CDLL(None, use_errno=True)


def echo(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    header, blob = channel.recv(300)
    channel.send({**header, "args": args, "pid": os.getpid()}, blob)


def idle(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    channel.send({"pid": os.getpid()})
    channel.recv(None)


def fail(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    raise RuntimeError("this worker fails on purpose")


def leave(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    os._exit(args["code"])


def crash(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    ctypes.string_at(0)


def abort(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    os.abort()


def chatter(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    os.write(1, b"to nowhere")
    for _ in range(100):
        try:
            os.write(2, b"\x1b[31mnoise" + b"." * 4096)
        except OSError:
            break
    channel.send({"done": True})


def spin(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """A background thread counts in shared memory while the main thread waits."""
    counter = (ctypes.c_uint64 * 1).from_buffer(mmap.mmap(fds[0], 8))

    def count() -> None:
        while True:
            counter[0] += 1

    threading.Thread(target=count, daemon=True).start()
    channel.send({})
    channel.recv(None)


def bomb(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    blocks = []
    for _ in range(1 << 20):
        blocks.append(bytearray(1 << 24))


def burn(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    while True:
        pass


def daemonize(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Leave a process of a session of its own behind."""
    child = subprocess.Popen(["sleep", args["seconds"]], start_new_session=True)
    channel.send({"started": child.poll() is None})
    channel.recv(None)


def attempt(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Try ``args["what"]``; answer with an errno name, or ``"ok"`` and what was found."""
    if args.get("kind") == "device":
        seal(Sandbox("device"))
    try:
        found = ATTEMPTS[args["what"]](args, fds)
    except OSError as error:
        channel.send({"result": errno.errorcode.get(error.errno or 0, str(error))})
    else:
        channel.send({"result": "ok", "found": found})


def _syscall(number: int, *arguments: int) -> int:
    result = LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return int(result)


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _thread() -> int:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(1))
    thread.start()
    thread.join()
    return len(done)


def _clear_death_signal() -> None:
    if LIBC.prctl(1, 0, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def _timer() -> int:
    """One that lets this process go on when it is stopped."""
    event = ctypes.create_string_buffer(struct.pack("<qii48x", 0, signal.SIGCONT, 0))
    number = 222 if platform.machine() == "x86_64" else 107
    return _syscall(number, 1, ctypes.addressof(event), ctypes.addressof(ctypes.c_int()))


def _map_writable(fds: list[int]) -> None:
    mmap.mmap(fds[0], 16, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _reopen(fds: list[int]) -> None:
    os.close(os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR))


def _fill_tmp() -> int:
    written = 0
    with open("/tmp/large", "wb") as file:
        for _ in range(1 << 12):
            file.write(bytes(1 << 20))
            written += 1
    return written


ATTEMPTS: dict[str, Callable[[dict[str, Any], list[int]], Any]] = {
    "fork": lambda args, fds: _fork(),
    "vfork": lambda args, fds: subprocess.run(["/bin/true"], check=True).returncode,
    "exec": lambda args, fds: os.execv("/bin/true", ["true"]),
    "thread": lambda args, fds: _thread(),
    "socket": lambda args, fds: socket.socket(socket.AF_INET, socket.SOCK_STREAM).fileno(),
    "unix socket": lambda args, fds: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).fileno(),
    "ptrace": lambda args, fds: LIBC.ptrace(16, 1, 0, 0) and _raise_errno(),
    "kill": lambda args, fds: os.kill(args["pid"], signal.SIGKILL),
    "unshare": lambda args, fds: LIBC.unshare(0x10000000) and _raise_errno(),
    "mount": lambda args, fds: LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None) and _raise_errno(),
    "io_uring": lambda args, fds: _syscall(425, 1, 0),
    "clone3": lambda args, fds: _syscall(435, 0, 0),
    "memfd": lambda args, fds: os.memfd_create("x"),
    "death signal": lambda args, fds: _clear_death_signal(),
    "timer": lambda args, fds: _timer(),
    "signal of a descriptor": lambda args, fds: fcntl.fcntl(0, F_SETSIG, signal.SIGCONT),
    "read": lambda args, fds: len(Path(args["path"]).read_bytes()),
    "list": lambda args, fds: sorted(os.listdir(args["path"])),
    "write": lambda args, fds: Path(args["path"]).touch(),
    "fill": lambda args, fds: _fill_tmp(),
    "environment": lambda args, fds: dict(os.environ),
    "descriptors": lambda args, fds: _descriptors(),
    "move": lambda args, fds: _move(),
    "identity": lambda args, fds: [os.getuid(), os.getgid(), os.getgroups(), os.getpid()],
    "map writable": lambda args, fds: _map_writable(fds),
    "write input": lambda args, fds: os.write(fds[0], b"x"),
    "reopen": lambda args, fds: _reopen(fds),
    "chmod": lambda args, fds: os.fchmod(fds[0], 0o700),
    "truncate": lambda args, fds: os.ftruncate(fds[0], 0),
    "compiler": lambda args, fds: _compile(),
    "scanned memory": lambda args, fds: _scan(args["needle"]),
    "sleep": lambda args, fds: time.sleep(args["seconds"]),
}


def _raise_errno() -> None:
    raise OSError(ctypes.get_errno(), "refused")


def _move() -> list[int]:
    """Where this thread may run after asking for every core."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


def _descriptors() -> list[int]:
    open_ones = []
    for fd in range(256):
        try:
            os.fstat(fd)
        except OSError:
            continue
        open_ones.append(fd)
    return open_ones


def _compile() -> str:
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", "/tmp/a.so"]
    program = b"#include <vector>\nint f() { return std::vector<int>(3).size(); }"
    done = subprocess.run(command, input=program, capture_output=True)
    return done.stderr.decode() if done.returncode else ctypes.CDLL("/tmp/a.so")._name


def _scan(needle: str) -> bool:
    return any(needle in str(value) for value in (*os.environ.values(), *sys.argv))
