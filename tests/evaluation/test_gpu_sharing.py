"""Two searches on one GPU that is none: they check side by side, and nobody is beside a race."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import gpu_judge, gpu_rivals
from ke_gym.evaluation.account import ALONE, SHARING
from ke_gym.evaluation.gpu_client import APART, TIMED, GpuClient
from ke_gym.evaluation.gpu_evaluator import GpuEvaluator
from ke_gym.evaluation.gpu_lock import DeviceLock
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import InProcess, floats, idle, integer, kernel, one_launch, stand_in

SPEC = TensorSpec((8, 16), (16, 1), "float32")
TASK = """
import torch
import torch.nn as nn
class Model(nn.Module):
    def forward(self, x):
        return torch.sin(x) + x
def get_inputs():
    return [torch.randn(8, 16)]
"""


@kernel
def sine(x: int, out: int, n: int) -> None:
    given = floats(x, integer(n)).double()
    idle(0.001)
    floats(out, integer(n)).copy_(torch.sin(given) + given)


@kernel
def late_sine(x: int, out: int, n: int) -> None:
    idle(0.1)
    sine(x, out, n)


class Watched(InProcess):
    """Records who is at work for whom."""

    lock_ = threading.Lock()
    at_work: list[str] = []
    beside_a_race: list[tuple[str, ...]] = []
    side_by_side = 0
    meeting: threading.Barrier | None = None

    def _exchange(self, do: str, arguments: dict[str, Any], *rest: Any) -> tuple[dict[str, Any], bytes]:
        with self.lock_:
            Watched.at_work.append(do)
            if len(self.at_work) > 1 and TIMED & set(self.at_work):
                Watched.beside_a_race.append(tuple(self.at_work))
        if do == "check" and self.meeting is not None:
            self.meeting.wait(300)  # nobody goes on before both check
        try:
            return super()._exchange(do, arguments, *rest)
        finally:
            with self.lock_:
                Watched.at_work.remove(do)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("home")
    (made / "wave.py").write_text(TASK)
    return made


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[list[GpuEvaluator]]:
    patch = pytest.MonkeyPatch()
    stand_in(patch, Watched)
    task = Task.from_file(folder / "wave.py")
    with GpuEvaluator(task, folder=folder) as first, GpuEvaluator(task, folder=folder) as second:
        yield [first, second]
    patch.undo()


def candidate(evaluator: GpuEvaluator) -> Candidate:
    found = Candidate("x = 1", "cuda")
    evaluator.adopt(found, replace(one_launch("sine", SPEC), source=found.source))
    return found


def test_they_check_side_by_side_and_nobody_is_beside_a_race(two: list[GpuEvaluator]) -> None:
    Watched.meeting = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        judged = list(pool.map(lambda one: one.evaluate(candidate(one)), two))
    Watched.meeting = None
    assert all(evaluation.correct for evaluation in judged), judged[0].log
    assert not Watched.beside_a_race
    for one in two:
        spent = one.account.spent()
        assert {"checking", "racing", "profiling", ALONE, SHARING} <= spent.keys()
        assert all(times > 0 for _, times in spent.values())


def test_all_that_is_timed_of_a_loser_is_timed_in_one_go(two: list[GpuEvaluator]) -> None:
    one, _ = two
    best, slow = candidate(one), Candidate("x = 2", "cuda")
    one.adopt(slow, replace(one_launch("late_sine", SPEC), source=slow.source))
    before = one.account.spent()[ALONE][1]
    judged = one.evaluate(slow, best)
    assert judged.correct and not judged.improved and judged.kernel_coverage == 1.0
    assert one.account.spent()[ALONE][1] == before + 1


def test_a_reference_is_compiled_beside_others_races(
    two: list[GpuEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    raced: list[float] = []

    def compiled(reference: Any, mode: str, arguments: Any, lock: DeviceLock) -> Any:
        with ThreadPoolExecutor(1) as pool:  # it would wait for ever if the device were held
            raced.append(pool.submit(second.race_baseline, candidate(second)).result(300)[0])
        with lock.alone():
            assert mode == "max-autotune-no-cudagraphs"
        return reference

    monkeypatch.setattr(gpu_rivals, "compiled", compiled)
    monkeypatch.setattr(InProcess, "_turn", nullcontext())  # as if both were processes
    first.compile_baseline("max-autotune")
    assert raced and first.baseline == "max-autotune"
    over, (low, high) = first.race_baseline(candidate(first))
    assert 0 < low <= over <= high


def test_a_process_that_is_lost_has_ended_before_others_get_the_device(
    two: list[GpuEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two
    held: list[bool] = []

    def hang(self: Any, **_: Any) -> dict[str, Any]:
        return {"died": "timeout", "log": "it hangs", "fatal": True, "rival": False}

    def ended(self: GpuClient) -> None:
        mine = self.lock._mine.__dict__.get("mode") if self.lock else None
        held.append(mine == fcntl.LOCK_EX)
        close(self)

    close = GpuClient.close
    monkeypatch.setattr(GpuClient, "close", ended)
    monkeypatch.setattr(gpu_judge.GpuJudge, "race", hang)
    assert one.evaluate(candidate(one)).outcome == "timeout"
    assert held[0] and not one.judge.alive
    monkeypatch.undo()
    assert one.evaluate(candidate(one)).correct  # by another process
    one.judge.close()
    monkeypatch.setattr(gpu_rivals, "compiled", lambda reference, *_: reference)
    one.compile_baseline("compile")
    assert one.judge.alive


def test_launching_apart_where_it_cannot_be_is_refused_if_it_was_asked_for(
    two: list[GpuEvaluator], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(self: Any) -> dict[str, Any]:
        return {"apart": False, "why": "memory cannot be lent"}

    begun: list[int] = []

    def begin(self: Watched, _: Any) -> None:
        assert self.lock is not None
        begun.append(self.lock._mine.mode)

    monkeypatch.setenv(APART, "1")
    monkeypatch.setattr(Watched, "_start_launcher", begin)
    monkeypatch.setattr(gpu_judge.GpuJudge, "move_apart", unfit)
    with pytest.raises(UserError, match=r"KE_GYM_APART is set, but .* \(memory cannot be lent\)"):
        two[0]._open_judge()
    assert begun == [fcntl.LOCK_SH]  # it opens the device: beside nobody's race
