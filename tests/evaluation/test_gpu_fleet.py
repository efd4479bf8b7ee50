"""Several GPUs in one search, everywhere: each judge runs in this process, on a GPU that is none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.gpu_client import OutOfDeviceMemory
from ke_gym.evaluation.gpu_evaluator import GpuEvaluator
from ke_gym.evaluation.gpu_fleet import GpuFleet, open_gpus
from ke_gym.evaluation.zygote import SpawnError
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import TensorSpec
from ke_gym.targets import cuda
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import FACTS, floats, integer, kernel, one_launch, stand_in

SPEC = TensorSpec((8, 16), (16, 1), "float32")
TASK = """
import torch
import torch.nn as nn
class Model(nn.Module):
    def forward(self, x):
        return x * x + 1
def get_inputs():
    return [torch.randn(8, 16)]
"""


@kernel
def squared(x: int, out: int, n: int) -> None:
    given = floats(x, integer(n))
    floats(out, integer(n)).copy_(given * given + 1)


class Recorder:
    """What ran on which device, and whether two ever did on one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: set[int] = set()
        self.overlaps: list[int] = []
        self.judged: list[tuple[int, str]] = []
        self.barrier: threading.Barrier | None = None

    def race(self, device: int, base: Evaluation) -> None:
        with self._lock:
            if device in self._busy:
                self.overlaps.append(device)
            self._busy.add(device)
            self.judged.append((device, base.candidate))
        if self.barrier is not None:
            self.barrier.wait(300)
        with self._lock:
            self._busy.remove(device)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    stand_in(monkeypatch)
    monkeypatch.setattr(cuda, "alike", lambda _: [0, 1])
    found = Recorder()

    def race(self: GpuEvaluator, base: Evaluation, *_: Any) -> Evaluation:
        found.race(self._device, base)
        return base.replace(time_ms=1.0, speedup=1.0)

    monkeypatch.setattr(GpuEvaluator, "_race", race)
    monkeypatch.setattr(GpuEvaluator, "_describe", lambda self, base, *_: base)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, whose evaluators then share a zygote."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def task(folder: Path) -> Task:
    path = folder / "square.py"
    path.write_text(TASK)
    return Task.from_file(path)


@pytest.fixture
def fleet(recorder: Recorder, task: Task, folder: Path) -> Iterator[GpuFleet]:
    # One fake GPU has one uuid: two devices have two.
    by_device = iter(["GPU-a", "GPU-b"])
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda, "facts", lambda _: replace(FACTS, uuid=next(by_device)))
    with open_gpus(task, "cuda", folder=folder) as opened:
        assert isinstance(opened, GpuFleet)
        yield opened
    patch.undo()


def candidate(evaluator: Evaluator, number: int) -> Candidate:
    found = Candidate(f"# {number}\nx = {number}", "cuda")
    evaluator.adopt(found, replace(one_launch("squared", SPEC), source=found.source))
    return found


def test_two_devices_judge_at_once_and_never_two_candidates_on_one(
    fleet: GpuFleet, recorder: Recorder
) -> None:
    assert fleet.devices == 2
    wanted = [candidate(fleet, n) for n in range(8)]
    recorder.barrier = threading.Barrier(2)  # nobody goes on before both devices race
    with ThreadPoolExecutor(8) as pool:
        evaluations = list(pool.map(fleet.evaluate, wanted))
    assert all(e.correct for e in evaluations) and not recorder.overlaps
    assert sorted(device for device, _ in recorder.judged) == [0] * 4 + [1] * 4
    assert {e.candidate for e in evaluations} == {c.id for c in wanted}
    assert {e.machine for e in evaluations} == {
        replace(FACTS, uuid=u).fingerprint for u in ("GPU-a", "GPU-b")
    }


def test_the_incumbent_races_on_the_candidate_s_device(
    fleet: GpuFleet, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []

    def race(
        self: GpuEvaluator, base: Evaluation, artifact: Artifact, rival: Artifact | None, _: Any
    ) -> Evaluation:
        seen.append((self._device, rival is not None))
        return base

    monkeypatch.setattr(GpuEvaluator, "_race", race)
    best = candidate(fleet, 100)
    for n in range(4):
        assert fleet.evaluate(candidate(fleet, n), best).rival == best.id
    assert len(seen) == 4 and all(with_rival for _, with_rival in seen)


def test_races_for_the_record_are_the_first_device_s(
    fleet: GpuFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(GpuEvaluator, "aa_race", lambda self, artifact: seen.append(self._device))
    first, _ = _members(fleet)
    for _ in range(3):
        fleet.aa_race(one_launch("squared", SPEC))
    assert seen == [0, 0, 0] and fleet.record is first.record


@pytest.mark.parametrize("lost", [False, True])
def test_versions_that_are_level_race_by_the_first_device_s_record_as_long_as_it_is_there(
    fleet: GpuFleet, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    seen: list[int] = []

    def raced(self: GpuEvaluator, *_: Any) -> bool:
        seen.append(self._device)
        if lost and self._device == 0:
            raise UserError("the device is gone")
        return True

    for name in ("ahead", "final"):
        monkeypatch.setattr(GpuEvaluator, name, raced)
    _members(fleet)
    first, second = (candidate(fleet, n) for n in (1, 2))
    with pytest.warns(UserWarning, match="the device is gone") if lost else nullcontext():
        assert fleet.ahead(first, second)
    assert fleet.final(first)  # type: ignore[truthy-bool]
    assert seen[:2] == [0, 1] if lost else seen[0] == 0
    assert fleet.devices == (1 if lost else 2)


def test_what_was_found_fastest_on_one_device_is_known_on_the_other(fleet: GpuFleet) -> None:
    first, second = _members(fleet)
    assert first._settled is second._settled and first._builds is second._builds
    assert first._cores is not second._cores and first.record is not second.record


def _members(fleet: GpuFleet) -> list[GpuEvaluator]:
    with fleet._turn:
        fleet._turn.wait_for(lambda: not fleet._opening, timeout=300)
    return fleet._members


def test_a_device_that_is_lost_hands_its_candidate_on(
    fleet: GpuFleet, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _members(fleet)
    lost = {0}

    def race(self: GpuEvaluator, base: Evaluation, *_: Any) -> Evaluation:
        if self._device in lost:
            raise UserError("no NVIDIA GPU can be used here")
        return base

    monkeypatch.setattr(GpuEvaluator, "_race", race)
    with pytest.warns(UserWarning, match="GPU-[ab] takes no further part"):
        for n in range(2):
            assert fleet.evaluate(candidate(fleet, n)).correct
    assert fleet.devices == 1
    lost.add(1)
    with pytest.raises(UserError, match="no NVIDIA GPU"), pytest.warns(UserWarning):
        fleet.evaluate(candidate(fleet, 3))


@pytest.mark.parametrize("error", [OutOfDeviceMemory("somebody else has it"), SpawnError("somebody else")])
def test_a_device_that_cannot_be_opened_is_left_out(
    recorder: Recorder, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    opened = GpuEvaluator._open_judge

    def open_judge(self: GpuEvaluator, *hidden: Any) -> Any:
        if self._device == 1:
            raise error
        return opened(self, *hidden)

    monkeypatch.setattr(GpuEvaluator, "_open_judge", open_judge)
    left_out = "GPU 1 takes no further part in this search: somebody else"
    with pytest.warns(UserWarning, match=left_out), open_gpus(task, folder=folder) as fleet:
        assert isinstance(fleet, GpuFleet) and len(_members(fleet)) == 1
        assert fleet.evaluate(candidate(fleet, 1)).correct


def test_one_device_needs_no_fleet(
    recorder: Recorder, task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "alike", lambda _: [0])
    with open_gpus(task, folder=folder) as opened:
        assert isinstance(opened, GpuEvaluator) and opened.devices == 1
