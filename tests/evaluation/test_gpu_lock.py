"""Who has a device alone, who shares it, and who is next."""

from __future__ import annotations

import fcntl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from ke_gym.evaluation import account as account_module
from ke_gym.evaluation import gpu_lock
from ke_gym.evaluation.account import ALONE, SHARING, WAITING, Account, together
from ke_gym.evaluation.gpu_lock import DeviceLock


def two(folder: Path) -> tuple[DeviceLock, DeviceLock]:
    """As two processes have them: of the same device, nothing else in common."""
    return DeviceLock(folder, "GPU-0"), DeviceLock(folder, "GPU-0")


def test_who_shares_a_device_does_so_side_by_side(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def share(lock: DeviceLock) -> None:
        with lock.shared():
            both.wait(300)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(share, two(tmp_path)))


def test_nobody_is_beside_who_has_it_alone(tmp_path: Path) -> None:
    locks, inside, most = two(tmp_path), [0, 0], []
    watched = threading.Lock()

    def enter(kind: int, by: int) -> None:
        with watched:
            inside[kind] += by
            most.append(tuple(inside))

    def work(number: int) -> None:
        lock = locks[number % 2]
        for _ in range(20):
            with lock.shared():
                enter(0, 1)
                enter(0, -1)
                with lock.alone():  # two that do this at once must not wait for each other
                    enter(1, 1)
                    with lock.shared(), lock.alone():  # has what it needs
                        pass
                    enter(1, -1)
                enter(0, 1)
                enter(0, -1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert all(alone + (shared > 0) <= 1 for shared, alone in most)


def test_who_waits_for_a_device_is_next(tmp_path: Path) -> None:
    mine, other = two(tmp_path)
    order = []

    def wait() -> None:
        with other.alone():
            order.append("other")

    def in_line() -> bool:
        """Whether somebody wishes to have the device alone."""
        with (tmp_path / "gpu-GPU-0.wish").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    thread = threading.Thread(target=wait)
    with mine.shared():
        thread.start()
        while not in_line():
            time.sleep(0.01)
    with mine.shared():
        order.append("mine")
    thread.join()
    assert order == ["other", "mine"]


def test_an_account_tells_phases_from_what_is_within_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account, now = Account(), [0.0]
    lock = DeviceLock(tmp_path, "GPU-0", account)
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(account_module, "time", clock)
    monkeypatch.setattr(gpu_lock, "time", clock)
    with lock.alone():  # in no phase: waiting for it is not told
        now[0] += 1
    with account.phase("checking"):
        with lock.shared():
            now[0] += 2
        with account.phase("racing"):
            now[0] += 3
        now[0] += 4
    spent = account.spent()
    assert spent == {ALONE: (1, 1), SHARING: (2, 1), WAITING: (0, 1), "checking": (6, 1), "racing": (3, 1)}
    assert (account.here("racing"), account.here("tuning")) == (3, 0)
    assert together([spent, {"racing": (1.0, 2)}])["racing"] == (4, 3)
