from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ke_gym
from ke_gym.evaluation import sandbox as module
from ke_gym.evaluation.sandbox import Sandbox, readable_paths
from ke_gym.evaluation.shared import SharedBuffer
from ke_gym.evaluation.zygote import Exit, Zygote

PATIENCE = 300.0
LOCKED = ("compile", "run", "device")
CHECKOUT = Path(ke_gym.__file__).parents[1]


def attempt(zygote: Zygote, what: str, kind: str = "run", fds: tuple[int, ...] = (), **args: Any) -> Any:
    """What the worker answered: an errno name, or ("ok", what it found)."""
    box = Sandbox(kind, tmp_bytes=8 << 20, file_bytes=64 << 20)  # type: ignore[arg-type]
    with zygote.spawn(
        "hostile_workers:attempt", {"what": what, "kind": kind, **args}, fds=fds, sandbox=box
    ) as worker:
        answer, _ = worker.channel.recv(PATIENCE)
    return ("ok", answer["found"]) if answer["result"] == "ok" else answer["result"]


@pytest.fixture
def namespaces(zygote: Zygote) -> None:
    if zygote.sandbox_level != "full":
        pytest.skip(f"this machine offers {zygote.sandbox_level}")


needs_namespaces = pytest.mark.usefixtures("namespaces")


@pytest.mark.parametrize("what", ["fork", "vfork", "exec", "clone3", "memfd", "chmod"])
def test_a_run_worker_starts_nothing(zygote: Zygote, what: str) -> None:
    with SharedBuffer(64) as buffer:
        expected = "ENOSYS" if what == "clone3" else "EPERM"
        assert attempt(zygote, what, fds=(buffer.fd,)) == expected


def test_a_run_worker_may_use_threads(zygote: Zygote) -> None:
    assert attempt(zygote, "thread") == ("ok", 1)


def test_every_thread_of_a_team_has_a_core_of_its_own(zygote: Zygote) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < zygote.threads:
        pytest.skip("needs two cores")
    with zygote.spawn("hostile_workers:idle", {}) as worker:
        threads = os.listdir(f"/proc/{worker.pid}/task")
        places = [os.sched_getaffinity(int(thread)) for thread in threads]
    assert all(len(place) == 1 for place in places)
    assert set().union(*places) == set(cores)


def test_no_thread_moves_to_another_core() -> None:
    first = min(os.sched_getaffinity(0))
    with Zygote(1) as own:
        assert attempt(own, "move") == ("ok", [first])


@pytest.mark.parametrize("kind", LOCKED)
@pytest.mark.parametrize(
    "what",
    [
        "socket",
        "unix socket",
        "ptrace",
        "unshare",
        "mount",
        "io_uring",
        "death signal",
        "timer",
        "signal of a descriptor",
    ],
)
def test_no_locked_worker_gets_near_the_kernel(zygote: Zygote, kind: str, what: str) -> None:
    assert attempt(zygote, what, kind) == "EPERM"


@pytest.mark.parametrize("kind", LOCKED)
def test_other_processes_are_out_of_reach(zygote: Zygote, kind: str) -> None:
    assert attempt(zygote, "kill", kind, pid=os.getpid()) in ("EPERM", "ESRCH")
    assert attempt(zygote, "kill", kind, pid=zygote.pid) in ("EPERM", "ESRCH")


@needs_namespaces
@pytest.mark.parametrize("kind", LOCKED)
def test_only_the_system_and_python_can_be_read(zygote: Zygote, kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the parent")
    for path in (secret, Path.home() / ".profile", CHECKOUT / "pyproject.toml", Path("/etc/passwd")):
        assert attempt(zygote, "read", kind, path=str(path)) == "ENOENT"
    result = attempt(zygote, "list", kind, path="/")
    assert result[0] == "ok" and not set(result[1]) & {
        "home",
        "mnt",
        "srv",
        "sys",
        "boot",
        "run",
        "var",
        "old",
    }
    assert attempt(zygote, "read", kind, path=os.__file__)[0] == "ok"
    below = [Path(sys.prefix).parts[2]] if sys.prefix.startswith("/tmp/") else []  # a Python that lives there
    assert attempt(zygote, "list", kind, path="/tmp") == ("ok", below)


@needs_namespaces
@pytest.mark.parametrize("kind", LOCKED)
def test_only_a_small_private_tmp_can_be_written(zygote: Zygote, kind: str) -> None:
    for path in ("/x", "/usr/x", os.path.join(sys.prefix, "x"), "/dev/x"):
        assert attempt(zygote, "write", kind, path=path) == "EROFS"
    assert attempt(zygote, "write", kind, path="/tmp/x") == ("ok", None)
    assert not Path("/tmp/x").exists()
    assert attempt(zygote, "fill", kind) == "ENOSPC"


@pytest.mark.parametrize("kind", LOCKED)
def test_a_locked_worker_is_nobody_and_holds_nothing(zygote: Zygote, kind: str) -> None:
    _, (uid, gid, groups, _) = attempt(zygote, "identity", kind)
    assert (uid > 65534 and gid == 65534) if os.getuid() == 0 else uid != 0
    assert groups in ([], [gid])
    _, descriptors = attempt(zygote, "descriptors", kind)
    assert len(descriptors) == 4 and descriptors[:3] == [0, 1, 2]


def test_the_environment_holds_no_secret(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with Zygote() as own:
        environment = Path(f"/proc/{own.pid}/environ").read_bytes()
        assert b"hunter2" not in environment and b"HOME=/nonexistent" in environment
        for kind in LOCKED:
            box = Sandbox(kind)  # type: ignore[arg-type]
            with own.spawn("ke_gym.evaluation.builder:serve", {}, sandbox=box) as worker:
                assert b"hunter2" not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    _, environment = attempt(zygote, "environment")
    allowed = {"PATH", "LANG", "HOME", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    allowed |= {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT"}
    assert {name for name in environment if not name.startswith("TORCH")} <= allowed | {"LC_CTYPE"}


def test_a_read_only_input_stays_read_only(zygote: Zygote) -> None:
    with SharedBuffer(4096) as buffer:
        readable = buffer.read_only_fd()
        try:
            for what in ("map writable", "write input", "truncate", "reopen"):
                result = attempt(zygote, what, fds=(readable,))
                assert result in ("EACCES", "EBADF", "EINVAL", "ENOENT", "EPERM"), what
        finally:
            os.close(readable)
        assert attempt(zygote, "truncate", fds=(buffer.fd,)) == "EPERM"


@pytest.mark.parametrize("kind", ["run", "device"])
def test_memory_and_time_run_out(zygote: Zygote, kind: Any) -> None:
    with zygote.spawn("hostile_workers:bomb", sandbox=Sandbox(kind, memory_bytes=256 << 20)) as worker:
        assert worker.wait(PATIENCE) == Exit(code=1)
        assert "MemoryError" in worker.log()
    with zygote.spawn("hostile_workers:burn", sandbox=Sandbox(kind, cpu_seconds=1)) as worker:
        assert worker.wait(PATIENCE) == Exit(signal=signal.SIGXCPU)


def test_a_compile_worker_has_compilers(zygote: Zygote) -> None:
    assert attempt(zygote, "compiler", "compile") == ("ok", "/tmp/a.so")


def test_what_a_compile_worker_leaves_behind_dies_with_it(zygote: Zygote) -> None:
    marker = f"98765.{os.getpid()}"

    def running() -> bool:
        return _runs(marker)

    box = Sandbox("compile")
    with zygote.spawn("hostile_workers:daemonize", {"seconds": marker}, sandbox=box) as worker:
        assert worker.channel.recv(PATIENCE)[0] == {"started": True}
        assert eventually(running)  # its name shows a moment after it has started
    assert not running()


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def _runs(marker: str) -> bool:
    return any(marker.encode() in _command_line(p) for p in Path("/proc").glob("[0-9]*"))


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_headers_are_readable_and_no_path_is_listed_twice() -> None:
    paths = readable_paths()
    assert any(
        Path(module.__file__).parents[1].joinpath("languages/include").is_relative_to(p) for p in paths
    )
    assert len(paths) == len(set(paths)) and str(CHECKOUT) not in paths
    assert not any(a != b and a.startswith(b + "/") for a in paths for b in paths)


# A container's filter: unshare is refused, everything else goes.
REFUSE_UNSHARE = """
import ctypes, platform, struct
libc = ctypes.CDLL(None)
number = 272 if platform.machine() == "x86_64" else 97
op = lambda code, k, jt=0, jf=0: struct.pack("<HBBI", code, jt, jf, k)
code = op(0x20, 0) + op(0x15, number, 0, 1) + op(0x06, 0x50001) + op(0x06, 0x7FFF0000)
class Filter(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("code", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(len(code) // 8, code)), 0, 0) == 0
"""

PARTIAL = """
import sys
sys.path.insert(0, {here!r})
from ke_gym.evaluation import zygote as module
plain = module.worker_environment
module.worker_environment = lambda n: {{**plain(n), "PYTHONPATH": plain(n)["PYTHONPATH"] + ":" + {here!r}}}
from ke_gym.evaluation.sandbox import Sandbox
with module.Zygote() as zygote:
    print(zygote.sandbox_level)
    for what in ("fork", "socket", "kill", "thread"):
        args = {{"what": what, "pid": zygote.pid}}
        with zygote.spawn("hostile_workers:attempt", args, sandbox=Sandbox("run")) as w:
            print(what, w.channel.recv(300)[0]["result"])
    args = {{"seconds": {marker!r}}}
    with zygote.spawn("hostile_workers:daemonize", args, sandbox=Sandbox("compile")) as w:
        print(w.channel.recv(300)[0]["started"])
"""


def test_without_namespaces_the_level_says_so_and_the_rest_still_holds() -> None:
    marker = f"87654.{os.getpid()}"
    program = REFUSE_UNSHARE + PARTIAL.format(here=str(Path(__file__).parent), marker=marker)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    level, *results = done.stdout.splitlines()
    assert level.startswith("partial: ") and "Operation not permitted" in level
    assert results == ["fork EPERM", "socket EPERM", "kill EPERM", "thread ok", "True"]
    assert eventually(lambda: not _runs(marker))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_is_locked_in_as_well() -> None:
    """The zygote's own code, run by a user without privileges (who could not execute root's Python)."""
    program = """
import os, socket, sys
sys.path.insert(0, {here!r})
import torch, hostile_workers
from ke_gym.evaluation import _zygote_main as main
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.sandbox import Sandbox
main._warm()
os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
assert main.prctl(4, 1) == 0  # as after an exec: /proc/self belongs to this user
level = main.probe_level()
print(level)
for what in ("fork", "socket", "identity", "list"):
    channel, end = Channel.pair()
    status, status_end = Channel.pair()
    if os.fork() == 0:
        fds = [end.fileno(), status_end.fileno(), os.memfd_create("log")]
        args, isolate = {{"what": what, "path": "/"}}, level == "full"
        main._wait_for_worker(hostile_workers.attempt, args, Sandbox("run"), isolate, fds, Channel(status_end))
    end.close(); status_end.close()
    reply = status.recv(300, accept_fds=True)[0]
    assert "error" not in reply, reply
    answer = channel.recv(300)[0]
    print(what, answer["result"], answer.get("found"))
    print(status.recv(300)[0]["status"])
"""
    code = program.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    level, *results = done.stdout.splitlines()
    assert results[:4] == ["fork EPERM None", "0", "socket EPERM None", "0"]
    if level == "full":
        assert results[4].startswith("identity ok [65534, 65534,")
        assert "'home'" not in results[6] and "'usr'" in results[6]
    else:
        assert level.startswith("partial: ")


def test_the_filter_knows_this_machine() -> None:
    from ke_gym.evaluation import _seccomp

    assert _seccomp.supported()
    assert ctypes.sizeof(_seccomp._Filter) == 2 * ctypes.sizeof(ctypes.c_void_p)
