from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ke_gym.evaluation.sandbox import Sandbox
from ke_gym.evaluation.shared import SharedBuffer
from ke_gym.evaluation.zygote import Exit, SpawnError, Worker, Zygote

PATIENCE = 300.0
KINDS = ("trusted", "compile", "run")


def entry(name: str) -> str:
    return f"hostile_workers:{name}"


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_runs_its_entry_with_arguments(zygote: Zygote, kind: str) -> None:
    with zygote.spawn(entry("echo"), {"a": [1, "two"]}, sandbox=Sandbox(kind)) as worker:
        worker.channel.send({"b": 2}, b"blob")
        header, blob = worker.channel.recv(PATIENCE)
        assert header["args"] == {"a": [1, "two"]} and header["b"] == 2 and blob == b"blob"
        assert worker.wait(PATIENCE) == Exit(code=0)


@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_reported_as_they_were(zygote: Zygote, kind: str) -> None:
    with zygote.spawn(entry("leave"), {"code": 7}, sandbox=Sandbox(kind)) as worker:
        assert worker.wait(PATIENCE) == Exit(code=7)
    with zygote.spawn(entry("crash"), sandbox=Sandbox(kind)) as worker:
        assert worker.wait(PATIENCE) == Exit(signal=signal.SIGSEGV)
        assert "SIGSEGV" in str(worker.wait())
    with zygote.spawn(entry("abort"), sandbox=Sandbox(kind)) as worker:
        assert worker.wait(PATIENCE) == Exit(signal=signal.SIGABRT)
    with zygote.spawn(entry("fail"), sandbox=Sandbox(kind)) as worker:
        assert worker.wait(PATIENCE) == Exit(code=1)
        assert "RuntimeError: this worker fails on purpose" in worker.log()


def test_waiting_times_out_and_killing_ends_it(zygote: Zygote) -> None:
    with zygote.spawn(entry("idle"), sandbox=Sandbox("run")) as worker:
        worker.channel.recv(PATIENCE)
        with pytest.raises(TimeoutError):
            worker.wait(0.01)
        worker.kill()
        assert worker.wait(PATIENCE) == Exit(signal=signal.SIGKILL)
        with pytest.raises(EOFError):
            worker.channel.recv(PATIENCE)


def test_the_log_is_capped_and_harmless(zygote: Zygote) -> None:
    with zygote.spawn(entry("chatter"), sandbox=Sandbox("run")) as worker:
        assert worker.channel.recv(PATIENCE)[0] == {"done": True}
        worker.wait(PATIENCE)
        assert 0 < len(worker.log()) <= 4001
        assert "\x1b" not in worker.log(1 << 20) and len(worker.log(1 << 20)) <= 64 << 10


def test_a_frozen_worker_does_nothing_until_it_is_thawed(zygote: Zygote) -> None:
    with SharedBuffer(8) as buffer:
        import torch

        counter = buffer.bytes.view(torch.int64)
        with zygote.spawn(entry("spin"), fds=[buffer.fd], sandbox=Sandbox("run")) as worker:
            worker.channel.recv(PATIENCE)
            assert eventually(lambda: int(counter) > 0)
            worker.freeze()
            seen = int(counter)
            time.sleep(0.05)
            assert int(counter) == seen
            worker.thaw()
            assert eventually(lambda: int(counter) > seen)
            worker.freeze()
            worker.kill()
            assert worker.wait(PATIENCE) == Exit(signal=signal.SIGKILL)


def test_a_missing_entry_is_said_and_the_zygote_lives_on(zygote: Zygote) -> None:
    with pytest.raises(SpawnError, match="no_such_module"):
        zygote.spawn("no_such_module:function")
    with pytest.raises(SpawnError, match="no_such_function"):
        zygote.spawn(entry("no_such_function"))
    with zygote.spawn(entry("leave"), {"code": 0}) as worker:
        assert worker.wait(PATIENCE) == Exit(code=0)


def test_spawning_leaks_nothing(zygote: Zygote) -> None:
    def held() -> tuple[int, int, int]:
        pages = int(Path(f"/proc/{zygote.pid}/statm").read_text().split()[1])
        ours, theirs = (len(os.listdir(f"/proc/{pid}/fd")) for pid in ("self", zygote.pid))
        return ours, theirs, pages

    def spawn(times: int) -> None:
        for i in range(times):
            with zygote.spawn(entry("leave"), {"code": 0}, sandbox=Sandbox(KINDS[i % 3])):
                pass

    spawn(6)
    gc.collect()  # what others left may be closed meanwhile
    before = held()
    spawn(90)
    assert held()[0] <= before[0]
    assert eventually(lambda: held()[1] <= before[1])  # it closes its own when it has time for it
    assert held()[2] - before[2] < 128  # pages: half a megabyte
    children = Path(f"/proc/{zygote.pid}/task/{zygote.pid}/children")
    assert eventually(lambda: not children.read_text())


def test_several_threads_may_spawn_at_once(zygote: Zygote) -> None:
    pids: list[tuple[int, int]] = []

    def spawn() -> None:
        for _ in range(5):
            with zygote.spawn(entry("echo"), {}) as worker:
                worker.channel.send({})
                pids.append((worker.pid, worker.channel.recv(PATIENCE)[0]["pid"]))

    threads = [threading.Thread(target=spawn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(known == told for known, told in pids)
    assert len(pids) == 20 and len(set(pids)) == 20


def test_a_dead_zygote_is_replaced_and_takes_its_workers_along() -> None:
    with Zygote() as zygote:
        worker = zygote.spawn("ke_gym.evaluation._zygote_main:_no_work")
        worker.close()
        arm = zygote.spawn("ke_gym.evaluation.builder:serve", {}, sandbox=Sandbox("run"))
        first = zygote.pid
        os.kill(first, signal.SIGKILL)
        assert arm.wait(PATIENCE) == Exit(signal=signal.SIGKILL)
        assert eventually(lambda: gone(arm.pid))
        with zygote.spawn("ke_gym.evaluation._zygote_main:_no_work") as worker:
            assert worker.wait(PATIENCE) == Exit(code=0)
        assert zygote.pid != first
        arm.close()
    assert gone(zygote.pid)
    with pytest.raises(SpawnError, match="closed"):
        zygote.spawn("ke_gym.evaluation._zygote_main:_no_work")


class Stuck(Zygote):
    """Does not answer the first request of either of two threads, and tells the second when the first is served."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.served = threading.Barrier(2), threading.Event()
        self.asked: list[str] = []

    def _spawn(self, *arguments: Any) -> Worker:
        name = threading.current_thread().name
        if name in self.asked:
            return super()._spawn(*arguments)
        self.asked.append(name)
        self.both.wait(PATIENCE)
        if name == "second":
            assert self.served.wait(PATIENCE)
        raise TimeoutError


def test_a_zygote_that_hangs_is_replaced_once_for_all_who_wait() -> None:
    with Stuck() as zygote, ThreadPoolExecutor(2) as pool:

        def spawn(name: str) -> tuple[Worker, int]:
            threading.current_thread().name = name
            worker = zygote.spawn("ke_gym.evaluation.builder:serve", {}, sandbox=Sandbox("run"))
            found = worker, zygote.pid
            if name == "first":
                zygote.served.set()
            return found

        before = zygote.pid
        (first, after), (second, last) = pool.map(spawn, ("first", "second"))
        with first, second:
            assert before != after == last == zygote.pid
            assert first.leash.alive() and second.leash.alive()


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    program = """
import time
from ke_gym.evaluation.sandbox import Sandbox
from ke_gym.evaluation.zygote import Zygote
zygote = Zygote()
workers = [zygote.spawn("ke_gym.evaluation.builder:serve", {}, sandbox=Sandbox(k))
           for k in ("trusted", "compile", "run")]
workers[2].freeze()
print(zygote.pid, *(w.pid for w in workers), flush=True)
time.sleep(1000)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 4 and not any(gone(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: all(gone(pid) for pid in pids))
