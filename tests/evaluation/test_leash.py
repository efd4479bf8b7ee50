"""Stopping, ending and watching another process by its descriptors."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator

import pytest

from ke_gym.evaluation.leash import Leash

MANY = 1500
"""More descriptors than ``select`` knows."""


@pytest.fixture(params=[0, MANY])
def watched(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], Leash]]:
    process = subprocess.Popen(["sleep", "600"])
    first = os.pidfd_open(process.pid)
    pidfd = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, request.param)
    os.close(first)
    leash = Leash(pidfd, os.open(f"/proc/{process.pid}/stat", os.O_RDONLY))
    yield process, leash
    leash.close()
    process.kill()
    process.wait()


def test_a_process_is_there_until_it_is_killed(watched: tuple[subprocess.Popen[bytes], Leash]) -> None:
    process, leash = watched
    assert leash.alive()
    leash.freeze()
    assert leash.alive() and leash.frozen
    leash.kill()
    assert not leash.alive(60.0) and process.wait() == -9


def test_a_stopped_process_goes_on(watched: tuple[subprocess.Popen[bytes], Leash]) -> None:
    process, leash = watched
    leash.freeze()
    with open(f"/proc/{process.pid}/stat", "rb") as file:
        assert file.read().rpartition(b")")[2][1:2] == b"T"
    leash.thaw()
    process.terminate()  # which a stopped process would not notice
    assert process.wait(60) == -15
