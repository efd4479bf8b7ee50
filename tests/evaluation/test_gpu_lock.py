"""Who has a device alone, who shares it, and who is next."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from ke_gym.errors import UserError
from ke_gym.evaluation import account as account_module
from ke_gym.evaluation import gpu_lock
from ke_gym.evaluation.account import ALONE, SHARING, WAITING, Account, together
from ke_gym.evaluation.gpu_lock import DeviceLock


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path / "locks")
    return tmp_path / "locks"


def two() -> tuple[DeviceLock, DeviceLock]:
    """As two processes have them: of the same device, nothing else in common."""
    return DeviceLock("GPU-0"), DeviceLock("GPU-0")


def test_who_shares_a_device_does_so_side_by_side() -> None:
    both = threading.Barrier(2)

    def share(lock: DeviceLock) -> None:
        with lock.shared():
            both.wait(300)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(share, two()))


def test_nobody_is_beside_who_has_it_alone() -> None:
    locks, inside, most = two(), [0, 0], []
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


def test_who_waits_for_a_device_is_next(folder: Path) -> None:
    mine, other = two()
    order = []

    def wait() -> None:
        with other.alone():
            order.append("other")

    def in_line() -> bool:
        """Whether somebody wishes to have the device alone."""
        with (folder / "gpu-GPU-0.wish").open("a") as file:
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
    lock = DeviceLock("GPU-0", account)
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_users_share_the_locks_of_a_device(folder: Path) -> None:
    umask = os.umask(0o077)
    try:
        with DeviceLock("GPU-0").alone():
            assert folder.stat().st_mode & 0o7777 == 0o1777
    finally:
        os.umask(umask)
    for path in (folder.parent, *folder.parents):
        if path.stat().st_uid == 0 and path != Path("/tmp") and Path("/tmp") in path.parents:
            path.chmod(path.stat().st_mode | 0o011)  # pytest's own are root's alone
    code = (
        "import os, pathlib\nfrom ke_gym.evaluation import gpu_lock\n"
        "os.setresgid(65534, 65534, 65534); os.setresuid(65533, 65533, 65533)\n"
        f"gpu_lock.FOLDER = pathlib.Path({str(folder)!r})\n"
        "for lock in (gpu_lock.DeviceLock('GPU-0'), gpu_lock.DeviceLock('GPU-1')):\n"
        "    with lock.alone(): print('alone')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["alone", "alone"], done.stderr
    with DeviceLock("GPU-1").alone():  # which is the other's
        assert (folder / "gpu-GPU-1.lock").stat().st_uid == 65533


def test_where_no_lock_can_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path / "none" / "locks")
    with pytest.raises(UserError, match="cannot be shared with others on this machine"):
        DeviceLock("GPU-0")
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path)
    (tmp_path / "gpu-GPU-0.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="let everybody read and write"), DeviceLock("GPU-0").alone():
        pass
    assert not (tmp_path / "elsewhere").exists()
