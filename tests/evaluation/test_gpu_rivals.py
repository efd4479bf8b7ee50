"""``torch.compile`` beside races: what it does on a device is fenced in, whatever compiles it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import output_code
from torch._inductor.runtime import benchmarking

from ke_gym.evaluation import gpu_lock, gpu_rivals
from ke_gym.evaluation.gpu_lock import DeviceLock
from ke_gym.tasks.task import Task
from tests.evaluation.test_gpu_sharing import TASK


class Told(DeviceLock):
    """Tells how the device is held."""

    def __init__(self) -> None:
        super().__init__("GPU-0")
        self.held: list[str] = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        with super().alone():
            self.held.append("alone")
            yield
            self.held.append("no longer alone")

    @contextmanager
    def shared(self) -> Iterator[None]:
        with super().shared():
            self.held.append("shared")
            yield
            self.held.append("no longer shared")


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path / "locks")
    return Told()


def test_a_reference_is_compiled_and_runs_while_others_only_share(lock: Told, tmp_path: Path) -> None:
    path = tmp_path / "wave.py"
    path.write_text(TASK)
    task = Task.from_file(path)
    reference, (x,) = task.reference("default"), task.inputs("default", 3)
    made = gpu_rivals.compiled(reference, "default", [x], lock)
    # Its first call, and those that warm it; nothing is held while it is compiled.
    assert lock.held == ["shared", "no longer shared"] * 2
    torch.testing.assert_close(made(x), reference(x))
    assert len(lock.held) == 4  # later calls are not fenced in


def test_what_is_timed_is_timed_alone(lock: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(benchmarking.benchmarker), "benchmark_gpu", lambda *_, **__: lock.held.append("timing")
    )
    with gpu_rivals.fenced(lock):
        benchmarking.benchmarker.benchmark_gpu(lambda: None)
    benchmarking.benchmarker.benchmark_gpu(lambda: None)
    assert lock.held == ["alone", "timing", "no longer alone", "timing"]


def test_nothing_that_was_enqueued_goes_on_when_others_have_the_device(
    lock: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: lock.held.append("ended"))
    monkeypatch.setattr(
        type(benchmarking.benchmarker), "benchmark_gpu", lambda *_, **__: lock.held.append("timing")
    )
    with gpu_rivals.fenced(lock):
        benchmarking.benchmarker.benchmark_gpu(lambda: None)
    assert lock.held == ["ended", "alone", "timing", "ended", "no longer alone"]


def test_in_a_version_with_other_places_all_of_it_is_alone(
    lock: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpu_rivals.fenced(lock):
        lock.held.clear()  # all that is imported then is there
    monkeypatch.delattr(output_code, "CompiledFxGraph")
    with gpu_rivals.fenced(lock):
        during: list[Any] = list(lock.held)
    assert during == ["alone"]
