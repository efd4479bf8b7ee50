"""The system-call filter of sandboxed workers: classic BPF, written by hand, loaded through prctl.

Everything is allowed but what is named here, with ``EPERM``; ``clone3`` answers ``ENOSYS``, so that the C
library falls back to ``clone``, whose flags a filter can read.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

from ke_gym.evaluation._libc import LIBC, check

# name: (x86_64, aarch64); None where the architecture has no such call. Calls newer than 5.0 share a number.
_COMMON = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442,
    "quotactl_fd": 443, "landlock_create_ruleset": 444, "memfd_secret": 447, "fchmodat2": 452,
}  # fmt: skip
_SPLIT: dict[str, tuple[int | None, int | None]] = {
    "accept": (43, 202), "accept4": (288, 242), "acct": (163, 89), "add_key": (248, 217),
    "adjtimex": (159, 171), "bind": (49, 200), "bpf": (321, 280), "chmod": (90, None), "chroot": (161, 51),
    "clock_adjtime": (305, 266), "clock_settime": (227, 112), "clone": (56, 220), "connect": (42, 203),
    "delete_module": (176, 106), "execve": (59, 221), "execveat": (322, 281), "fanotify_init": (300, 262),
    "fchmod": (91, 52), "fchmodat": (268, 53), "fcntl": (72, 25),
    "finit_module": (313, 273), "fork": (57, None), "init_module": (175, 105), "ioperm": (173, None),
    "iopl": (172, None), "kcmp": (312, 272), "kexec_file_load": (320, 294), "kexec_load": (246, 104),
    "keyctl": (250, 219), "kill": (62, 129), "listen": (50, 201), "memfd_create": (319, 279),
    "mount": (165, 40), "mq_open": (240, 180), "msgget": (68, 186), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "perf_event_open": (298, 241), "personality": (135, 92),
    "pivot_root": (155, 41), "prctl": (157, 167), "prlimit64": (302, 261), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60), "reboot": (169, 142),
    "request_key": (249, 218), "sched_setaffinity": (203, 122), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "seccomp": (317, 277), "semget": (64, 190), "setdomainname": (171, 162), "sethostname": (170, 161),
    "setns": (308, 268), "settimeofday": (164, 170), "shmat": (30, 196), "shmget": (29, 194),
    "socket": (41, 198), "socketpair": (53, 199), "swapoff": (168, 225), "swapon": (167, 224),
    "syslog": (103, 116), "tgkill": (234, 131), "timer_create": (222, 107), "tkill": (200, 130), "umount2": (166, 39),
    "unshare": (272, 97), "uselib": (134, None), "userfaultfd": (323, 282), "vfork": (58, None),
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_SIGNALS = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_SPECIAL = ("clone", "clone3", "fcntl", "prctl", "prlimit64", "sched_setaffinity", *_SIGNALS)
_SPAWN = ("fork", "vfork", "execve", "execveat")
# Compilers need these. Where users do not differ, only its mode protects a shared input from being opened again.
_CHMOD = ("chmod", "fchmod", "fchmodat", "fchmodat2")

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020080  # NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | NEWTIME
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1

_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# Offsets in struct seccomp_data; the low halves of the first arguments.
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24
_F_SETSIG = 10


def supported() -> bool:
    """Whether the system-call numbers of this machine's architecture are known."""
    return platform.machine() in _AUDIT_ARCH


def _number(name: str) -> int | None:
    if name in _COMMON:
        return _COMMON[name]
    return _SPLIT[name][0 if platform.machine() == "x86_64" else 1]


def _op(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jt, jf, k & 0xFFFFFFFF)


def _program(may_spawn: bool) -> bytes:
    """The filter: a few checks of arguments first, then the plain list of what is denied."""
    deny, allow = _op(_RET, _ERRNO | errno.EPERM), _op(_RET, _ALLOW)
    out = [_op(_LOAD, _ARCH), _op(_JEQ, _AUDIT_ARCH[platform.machine()], 1, 0), _op(_RET, _KILL)]
    out += [_op(_LOAD, _NR)]
    if platform.machine() == "x86_64":
        out += [_op(_JGE, 0x40000000, 0, 1), deny]  # the x32 numbers of the same calls

    def when(name: str, *body: bytes) -> None:
        number = _number(name)
        if number is not None:
            out.extend([_op(_JEQ, number, 0, len(body)), *body])

    if may_spawn:
        when("clone", _op(_LOAD, _ARG0), _op(_JSET, _CLONE_NAMESPACES, 0, 1), deny, allow)
    else:
        when("clone", _op(_LOAD, _ARG0), _op(_JSET, _CLONE_THREAD, 1, 0), deny, allow)
        # Signals to itself only (abort, raise): without a process namespace other workers are in reach.
        for name in _SIGNALS:
            when(name, _op(_LOAD, _ARG0), _op(_JEQ, os.getpid(), 1, 0), deny, allow)
    when("clone3", _op(_RET, _ERRNO | errno.ENOSYS))
    # Nothing moves to another core, but OpenMP, which gives up if it can't place a thread, shall not notice.
    when("sched_setaffinity", _op(_RET, _ERRNO))
    # The death of the waiter must reach this process, and no filter may be stacked on this one.
    when(
        "prctl",
        _op(_LOAD, _ARG0),
        _op(_JEQ, _PR_SET_PDEATHSIG, 1, 0),
        _op(_JEQ, _PR_SET_SECCOMP, 0, 1),
        deny,
        allow,
    )
    # What is stopped must not be sent SIGCONT: by a timer (refused below) or when something comes on a descriptor.
    when("fcntl", _op(_LOAD, _ARG1), _op(_JEQ, _F_SETSIG, 0, 1), deny, allow)
    when("prlimit64", _op(_LOAD, _ARG0), _op(_JEQ, 0, 1, 0), deny, allow)
    for name in (*_COMMON, *_SPLIT):
        if name not in _SPECIAL and not (may_spawn and name in (*_SPAWN, *_CHMOD)):
            when(name, deny)
    if not may_spawn:
        when("tkill", deny)
    return b"".join([*out, allow])


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def install(may_spawn: bool) -> None:
    """Filter all threads and what they start, for ever. ``may_spawn``: compilers may be forked and executed."""
    code = _program(may_spawn)
    check(LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    filter_ = _Filter(len(code) // 8, code)
    number, arguments = _number("seccomp"), (_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC)
    result = LIBC.syscall(number, *arguments, ctypes.byref(filter_))
    if result > 0:
        raise OSError(errno.ESRCH, f"seccomp: thread {result} could not be filtered")
    check(result, "seccomp")
