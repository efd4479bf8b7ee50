"""What a worker process may do: the kinds of sandbox, and how a process locks itself into one.

Four kinds. ``trusted``: our own code; nothing is taken away. ``compile``: may run compilers. ``run``: may
compute, and nothing else: no new process, no program, no file outside a private ``/tmp``. ``device``: as ``run``, on
NVIDIA's GPUs too. All but the first get a minimal read-only root, no network, no capability, limits and a
system-call filter.

Where the kernel refuses namespaces (many containers do), limits, filter and the change of user remain; the
level says so and every evaluation carries it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import secrets
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ke_gym.evaluation import _seccomp
from ke_gym.evaluation._libc import LIBC, PR_CAPBSET_DROP, check, prctl

Kind = Literal["trusted", "compile", "run", "device"]

NOBODY = 65534
GIB = 1 << 30

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR = 442
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2


@dataclass(frozen=True)
class Sandbox:
    """The limits of one worker. Memory is on top of what the process has mapped when it starts; of kind ``device``, whose
    driver reserves address space by the terabyte, only what can be written to counts."""

    kind: Kind = "run"
    memory_bytes: int = 8 * GIB
    cpu_seconds: int = 600
    file_bytes: int = GIB
    tmp_bytes: int = GIB // 2
    processes: int = 512
    open_files: int = 256
    read_only: tuple[str, ...] = ()


def unshare() -> None:
    """Give the children of this process namespaces of their own.

    Raises ``OSError`` where the kernel refuses. Without privileges, a user namespace comes with them.
    """
    spaces = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and LIBC.unshare(spaces) == 0:
        return
    check(LIBC.unshare(spaces | _CLONE_NEWUSER), "namespaces")
    # Not mapped to root: what is executed later must not gain the capabilities needed now.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {gid} 1")


def enter(sandbox: Sandbox, isolated: bool) -> None:
    """Lock this process in. ``isolated``: it was born into the namespaces of ``unshare``.

    Raises ``OSError`` if any step is refused: a worker that is not locked in must not go on.
    """
    if sandbox.kind == "trusted":
        return
    pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
    mapped, written = (pages[which] * resource.getpagesize() for which in (0, 5))
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this is what has to go
    if isolated:
        _minimal_root(sandbox)
    if sandbox.kind == "device":
        _limits(sandbox, resource.RLIMIT_DATA, written)
    else:
        _limits(sandbox, resource.RLIMIT_AS, mapped)
    _drop_privileges()


def seal(sandbox: Sandbox) -> None:
    """The last step: from here on the system-call filter holds. Of kind ``device`` the worker takes it itself, once it has a
    context: to make one, the driver uses what the filter refuses."""
    if sandbox.kind != "trusted":
        _seccomp.install(may_spawn=sandbox.kind == "compile")


def readable_paths(extra: Iterable[str] = ()) -> list[str]:
    """What a sandboxed process sees of the file system, read-only.

    The system's programs and libraries, this Python with its packages and the headers that kernels include.
    Not the checkout, the home directory, or anything a search writes.
    """
    package = Path(__file__).resolve().parent.parent
    system = ["/usr", "/bin", "/sbin", *sorted(str(p) for p in Path("/").glob("lib*"))]
    etc = ["alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime"]
    python = [sys.prefix, sys.base_prefix, _torch_folder()]
    include = [str(package / "languages" / "include")]
    found: list[str] = []
    for path in [*system, *(f"/etc/{name}" for name in etc), *python, *include, *extra]:
        inside = any(path == f or path.startswith(f + "/") for f in found)
        if not inside and os.path.lexists(path):
            found.append(path)
    return found


def _torch_folder() -> str:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return str(Path(found.origin).parent)


def _minimal_root(sandbox: Sandbox) -> None:
    """Make a fresh tmpfs the root and bind into it only what is readable.

    The old way (a tmpfs over ``/tmp``, ``pivot_root`` into it) needs no directory of its own: after the
    pivot the old ``/tmp`` is uncovered again, so that a Python installed below it can still be bound.
    """
    paths = readable_paths(sandbox.read_only)
    os.umask(0o022)
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.chdir("/tmp")
    os.mkdir("old")
    check(LIBC.pivot_root(b".", b"old"), "pivot_root")
    os.chdir("/")
    os.mkdir("/tmp")
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={sandbox.tmp_bytes},mode=1777")
    os.mkdir("/dev")
    for path in paths:
        _bind(path)
    for name in ("null", "zero", "random", "urandom"):
        _bind(f"/dev/{name}")
    if sandbox.kind == "device":
        # The driver does not start without; a candidate there is given nothing by descriptor but its connections.
        for device in sorted(Path("/old/dev").glob("nvidia*")):
            _bind(f"/dev/{device.name}")
        os.mkdir("/proc")
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if sandbox.kind == "compile":
        # Only compilers need it (clang finds its headers through /proc/self/exe); containers that mask
        # parts of /proc refuse it, and g++ does without. The run kind must not have it: through
        # /proc/self/fd a read-only input could be opened again for writing.
        os.mkdir("/proc")
        LIBC.mount(b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
    check(LIBC.umount2(b"/old", _MNT_DETACH), "umount")
    os.rmdir("/old")
    _mount("none", "/", "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir("/tmp")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = LIBC.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None)
    check(result, f"mount {target}")


def _bind(path: str) -> None:
    source, target = f"/old{path}", path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, "", _MS_BIND | _MS_REC)
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    result = LIBC.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(-1),
        ctypes.c_char_p(target.encode()),
        ctypes.c_uint(_AT_RECURSIVE),
        ctypes.byref(attributes),
        ctypes.c_size_t(32),
    )
    check(result, f"read-only mount of {path}")


def _limits(sandbox: Sandbox, memory: int, taken: int) -> None:
    """``memory``: the limit that bounds it; ``taken``: bytes that count for it already."""
    limits = {
        memory: taken + sandbox.memory_bytes,
        resource.RLIMIT_NPROC: sandbox.processes,
        resource.RLIMIT_FSIZE: sandbox.file_bytes,
        resource.RLIMIT_NOFILE: sandbox.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    # The softer limit comes first: it kills with a signal that says why.
    resource.setrlimit(resource.RLIMIT_CPU, (sandbox.cpu_seconds, sandbox.cpu_seconds + 1))


def _drop_privileges() -> None:
    capability = 0
    while prctl(PR_CAPBSET_DROP, capability) == 0:
        capability += 1
    if os.geteuid() == 0:
        # A user of its own: limits on processes are counted per user, so that what one candidate leaves
        # behind (a fork bomb takes seconds to clear away) is not charged to the next.
        user = NOBODY + 1 + secrets.randbelow(1 << 24)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    check(LIBC.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())), "capset")


def compiler_paths() -> tuple[str, ...]:
    """Folders of compilers that are installed outside the usual places (to be made readable)."""
    found = (shutil.which(name) for name in ("g++", "clang++"))
    real = (Path(p).resolve().parent.parent for p in found if p)
    return tuple(sorted({str(p) for p in real if not p.is_relative_to("/usr") and str(p) != "/"}))
