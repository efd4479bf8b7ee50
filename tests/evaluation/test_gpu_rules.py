"""How a GPU's evaluator decides, everywhere: its judge runs in this process, on a GPU that is none."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import evaluator as evaluator_module
from ke_gym.evaluation import gpu_check, gpu_evaluator, gpu_judge, gpu_setting, gpu_stage
from ke_gym.evaluation.arms import ArmDied
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.gpu_client import GpuClient, OutOfDeviceMemory
from ke_gym.evaluation.gpu_evaluator import GpuEvaluator
from ke_gym.evaluation.gpu_profile import described
from ke_gym.evaluation.gpu_timing import Hung
from ke_gym.evaluation.work import Work
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Launch, TensorSpec
from ke_gym.search.observation import PROFILE, profile_features
from ke_gym.targets import cuda
from ke_gym.targets.cuda_driver import CudaError
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import (
    FACTS,
    PEAKS,
    FakeDriver,
    InProcess,
    floats,
    idle,
    integer,
    kernel,
    one_launch,
    stand_in,
)  # fmt: skip

SPEC = TensorSpec((8, 16), (16, 1), "float32")
TASK = """
import torch
import torch.nn as nn
ROWS = 8
shapes = {"gpu": {"ROWS": 4096}, "cpu": {"ROWS": 8}}
class Model(nn.Module):
    def forward(self, x):
        return torch.sin(3 * x) + x * x
def get_inputs():
    return [torch.randn(ROWS, 16)]
"""
OPENED: list[Small] = []


class Small(InProcess):
    """On a device that holds the task at its CPU sizes only."""

    def _start(self, zygote: Any, baseline: str) -> str:
        OPENED.append(self)
        return super()._start(zygote, baseline)

    def _exchange(self, do: str, arguments: dict[str, Any], *rest: Any) -> tuple[dict[str, Any], bytes]:
        if do == "describe" and set(arguments["shape_sets"]) & {"gpu", "default"}:
            return {"out_of_memory": "4096 rows are too many"}, b""
        return super()._exchange(do, arguments, *rest)


def compute(x: int, out: int, n: int) -> torch.Tensor:
    given = floats(x, integer(n)).double()
    return floats(out, integer(n)).copy_(torch.sin(3 * given) + given * given)


@kernel
def fine(x: int, out: int, n: int) -> None:
    compute(x, out, n)


@kernel
def tardy(x: int, out: int, n: int) -> None:
    idle(0.004)
    compute(x, out, n)


@kernel
def off(x: int, out: int, n: int) -> None:
    compute(x, out, n)[3] += 0.01


@kernel
def faulty(x: int, out: int, n: int) -> None:
    raise RuntimeError("CUDA error: misaligned address")


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuEvaluator]:
    folder = tmp_path_factory.mktemp("home")
    path = folder / "wave.py"
    path.write_text(TASK)
    patch = pytest.MonkeyPatch()
    stand_in(patch, Small)
    OPENED.clear()
    with GpuEvaluator(Task.from_file(path), folder=folder) as opened:
        yield opened
    patch.undo()


def candidate(evaluator: Evaluator, name: str, **options: Any) -> Candidate:
    made = one_launch(name, SPEC, **options)
    found = Candidate(f"# {name} {sorted(options)}\nx = {name!r}", "cuda")
    plans = {"cpu": made.plans["default"]}
    evaluator.adopt(found, replace(made, plans=plans, source=found.source))
    return found


def test_a_task_that_is_too_large_is_judged_at_its_smaller_sizes(evaluator: GpuEvaluator) -> None:
    assert evaluator.contract == "cpu"
    log = evaluator.evaluate(candidate(evaluator, "fine")).log
    assert log.startswith("the shape set 'gpu' does not fit into this GPU's memory")


def test_what_does_not_fit_at_any_size_says_so(evaluator: GpuEvaluator) -> None:
    whole = replace(evaluator.task, shapes={"gpu": {"ROWS": 4096}})
    with pytest.raises(OutOfDeviceMemory, match="4096 rows"):
        GpuEvaluator(whole, shape_sets=["gpu"], folder=evaluator.folder)


def test_a_right_kernel_is_correct_and_described(evaluator: GpuEvaluator) -> None:
    evaluation = evaluator.evaluate(candidate(evaluator, "fine"))
    assert evaluation.correct and evaluation.trust == "plan" and evaluation.kernel_coverage == 1.0
    assert evaluation.machine == FACTS.fingerprint and evaluation.target == "cuda"
    assert evaluation.profile.resources[0].startswith("fine: 32 registers")
    assert evaluation.profile.registers == 32 and 0 < evaluation.profile.occupancy <= 1
    features = dict(zip(PROFILE, profile_features(evaluation)))
    assert features["registers"] == pytest.approx(32 / 255)
    assert features["occupancy"] == pytest.approx(evaluation.profile.occupancy)


def test_a_gain_is_confirmed_by_fresh_judges(evaluator: GpuEvaluator) -> None:
    before = len(OPENED)
    evaluation = evaluator.evaluate(candidate(evaluator, "fine"), candidate(evaluator, "tardy"))
    assert evaluation.improved and evaluation.confirmed and evaluation.gain is not None
    assert evaluation.gain > 1.5
    fresh = OPENED[before:]
    assert len(fresh) >= 5 and not any(judge.alive for judge in fresh)


def test_a_wrong_kernel_hears_where(evaluator: GpuEvaluator) -> None:
    evaluation = evaluator.evaluate(candidate(evaluator, "off"))
    assert evaluation.outcome == "correctness"
    assert "the task's shapes" in evaluation.log and "index 0 of dimension 0" in evaluation.log


def test_after_a_fault_there_is_another_process(evaluator: GpuEvaluator) -> None:
    before = evaluator.judge
    evaluation = evaluator.evaluate(candidate(evaluator, "faulty"))
    assert (evaluation.outcome, "misaligned" in evaluation.log) == ("runtime", True)
    assert not before.alive
    assert evaluator.evaluate(candidate(evaluator, "fine")).correct
    assert evaluator.judge is not before


def test_the_fastest_alternative_is_what_gets_deployed(evaluator: GpuEvaluator) -> None:
    launch = one_launch("tardy", SPEC).plans["default"].steps[1]
    assert isinstance(launch, Launch)
    chosen = candidate(evaluator, "tardy", alternatives=(replace(launch, kernel="fine"),))
    evaluation = evaluator.evaluate(chosen)
    assert evaluation.correct
    settled = evaluator.settled(chosen)
    step = settled.plans["cpu"].steps[1]
    assert isinstance(step, Launch) and (step.kernel, step.alternatives) == ("fine", ())
    # What it compiles to is what it did: another source that does is known by that, and keeps its own text.
    assert evaluator.build(chosen).binary_id == evaluation.binary != settled.binary_id
    twin = Candidate(chosen.source + "\ntwin = 1\n", chosen.language)
    evaluator.adopt(twin, replace(evaluator.build(chosen), source=twin.source))
    assert evaluator.settled(twin).plans == settled.plans and evaluator.settled(twin).source == twin.source


def test_a_judge_that_was_ended_while_it_was_idle_is_not_the_next_candidate_s_fault(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluator.judge
    monkeypatch.setattr(before, "running", lambda: False)
    assert evaluator.evaluate(candidate(evaluator, "fine")).correct
    assert evaluator.judge is not before


def test_a_clock_that_cannot_be_read_is_told_of(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stage.cuda, "facts", lambda *_: replace(FACTS, clock_mhz=0))
    with pytest.warns(UserWarning, match="clock cannot be read"):
        GpuEvaluator(evaluator.task, folder=evaluator.folder).close()


def test_what_is_faster_than_physics_is_refused(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(PEAKS, bandwidth=((1 << 20, 1.0),))
    monkeypatch.setattr(evaluator, "peaks", slow)
    monkeypatch.setattr(gpu_evaluator, "kept_peaks", lambda *_, **__: slow)
    evaluation = evaluator.evaluate(candidate(evaluator, "fine"))
    # Everything written could still lie in L2: all this task moves is what it reads.
    assert evaluation.outcome == "constraints" and "faster than this GPU" in evaluation.log


def test_where_kernels_reach_their_launcher_s_memory_it_is_not_the_judge(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "facts", lambda _: replace(FACTS, reads_host=True))
    with GpuEvaluator(evaluator.task, folder=evaluator.folder) as opened:
        assert opened.judge.apart
        evaluation = opened.evaluate(candidate(opened, "fine"), candidate(opened, "tardy"))
        assert evaluation.improved and evaluation.trust == "plan" and evaluation.profile.resources
        assert opened.evaluate(candidate(opened, "off")).outcome == "correctness"
        assert opened.evaluate(candidate(opened, "faulty")).outcome == "runtime"
        assert opened.evaluate(candidate(opened, "fine")).correct


def test_where_memory_cannot_be_lent_trust_is_low(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: FakeDriver, address: int) -> tuple[bytes, int]:
        raise CudaError("cuIpcGetMemHandle", 801, "CUDA_ERROR_NOT_SUPPORTED")

    monkeypatch.setattr(cuda, "facts", lambda _: replace(FACTS, reads_host=True))
    monkeypatch.setattr(FakeDriver, "share", refused)
    with GpuEvaluator(evaluator.task, folder=evaluator.folder) as opened:
        evaluation = opened.evaluate(candidate(opened, "fine"))
    assert evaluation.correct and evaluation.trust == "host"
    assert "could reach the judge's memory on this machine: cuIpcGetMemHandle" in evaluation.log


def test_a_lead_that_does_not_hold_ends_the_process_that_told_of_it(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirm = evaluator_module.confirm
    monkeypatch.setattr(evaluator, "_maybe_aa", lambda: None)  # it would open another
    fine, tardy = candidate(evaluator, "fine"), candidate(evaluator, "tardy")
    judge = evaluator.judge
    assert not evaluator.evaluate(tardy, fine).confirmed and judge.alive
    assert evaluator.evaluate(fine, tardy).improved and judge.alive
    monkeypatch.setattr(
        evaluator_module, "confirm", lambda *given, **options: (*confirm(*given, **options)[:2], False)
    )
    lost = evaluator.evaluate(fine, tardy)
    assert lost.correct and lost.confirmed and not lost.improved and lost.kernel_coverage == 1.0
    assert not judge.alive and evaluator.judge.alive
    judge, opened = evaluator.judge, evaluator._open_judge

    def no_room(*hidden: Any) -> Any:
        if hidden:  # not a confirmation's
            raise OutOfDeviceMemory("others have it", elsewhere=1 << 34)
        return opened()

    monkeypatch.setattr(evaluator, "_open_judge", no_room)
    assert evaluator.evaluate(fine, tardy).confirmed and evaluator.judge is judge and judge.alive


def test_who_is_loaded_first_is_drawn(evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, tardy = candidate(evaluator, "fine"), candidate(evaluator, "tardy")
    plain, first = evaluator._race_set, []

    def seen(judge: Any, name: str, own: Any, other: Any, *rest: Any, **options: Any) -> Any:
        first.append((judge is evaluator.judge, own.number < other.number))
        return plain(judge, name, own, other, *rest, **options)

    monkeypatch.setattr(evaluator, "_race_set", seen)
    monkeypatch.setattr(evaluator, "_rng", random.Random(0))
    for _ in range(12):
        assert evaluator.ahead(fine, tardy)  # a race of the two alone
    assert {own for _, own in first} == {True, False}
    first.clear()
    for _ in range(4):
        assert evaluator.decide(fine, tardy).improved  # and five confirmations
    assert {own for here, own in first if not here} == {True, False}
    assert all(own for here, own in first if here)  # the candidate was there for its check


def test_a_task_proves_itself_on_its_device(evaluator: GpuEvaluator) -> None:
    proof = evaluator.prove()
    assert proof is not None and proof.ok and proof.mutants > 2


def test_a_task_whose_wrong_versions_do_not_fit_is_not_proven(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OutOfDeviceMemory("4 GiB")

    monkeypatch.setattr(Small, "mutants", full)
    with pytest.warns(UserWarning, match="could not be proven before its search: 4 GiB"):
        assert evaluator.prove() is None


def test_a_verdict_outlives_the_race_of_equals_that_finds_no_room(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any) -> Any:
        raise OutOfDeviceMemory("others have it", elsewhere=1 << 34)

    tried: list[None] = []
    monkeypatch.setattr(Evaluator, "_maybe_aa", lambda self: (tried.append(None), full(self)))
    assert evaluator.evaluate(candidate(evaluator, "fine")).correct and tried == [None]


def test_an_incumbent_that_cannot_be_loaded_is_left_out_whoever_is_loaded_first(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine, tardy = candidate(evaluator, "fine"), candidate(evaluator, "tardy")
    bad, load = evaluator.build(tardy).binary_id, Small.load

    def broken(self: Small, artifact: Any, shape_set: str) -> int:
        if artifact.binary_id == bad:
            raise ArmDied("runtime", "no such kernel")
        return load(self, artifact, shape_set)

    monkeypatch.setattr(Small, "load", broken)
    for _ in range(6):
        assert not evaluator.ahead(fine, tardy)
        judged = evaluator.evaluate(fine, tardy)
        assert judged.correct and not judged.rival and "the incumbent failed (no such kernel)" in judged.log


def test_a_judge_gives_memory_back_after_every_check_and_race(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[int] = []
    monkeypatch.setattr(gpu_judge, "give_back", lambda device, size: returned.append(size))
    evaluator.evaluate(candidate(evaluator, "tardy"), candidate(evaluator, "fine"))
    sets = 1 + len(evaluator.hidden)
    assert returned == [FACTS.memory_bytes] * (sets + 1)  # checks, and one race that is lost


@pytest.mark.parametrize("arch, percent", [("sm_90", 50), ("sm_89", 67), ("sm_120", 67)])
def test_occupancy_is_of_what_a_device_s_multiprocessor_holds(arch: str, percent: int) -> None:
    taken = {"registers": 40, "shared": 0, "dynamic": 0, "local": 0, "threads": 1024, "blocks": 1}
    answer = {"resources": {"rows": taken}, "steps": [("rows", 1e-5), ("aten.mm", 2e-5)]}
    shown = described(Work(1e6, 0, 0, 1), PEAKS, replace(FACTS, arch=arch), 1e-4, 1e-5, answer)
    assert shown.resources[0].endswith(f"occupancy {percent} %")
    assert round(100 * shown.occupancy) == percent and shown.registers == 40


def test_workers_have_few_queues_unless_the_user_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(gpu_setting.CONNECTIONS, raising=False)
    assert gpu_setting.gpu_environment(tmp_path)[gpu_setting.CONNECTIONS] == "2"
    monkeypatch.setenv(gpu_setting.CONNECTIONS, "8")
    assert gpu_setting.gpu_environment(tmp_path)[gpu_setting.CONNECTIONS] == "8"


def test_peaks_are_measured_once_and_only_ever_raised(tmp_path: Path) -> None:
    low = replace(PEAKS, fp32=1.0, bandwidth=((1 << 20, 5.0),))
    assert gpu_evaluator.kept_peaks(tmp_path, low.to_dict) == low
    assert gpu_evaluator.kept_peaks(tmp_path, PEAKS.to_dict) == low
    assert gpu_evaluator.kept_peaks(tmp_path, PEAKS.to_dict, again=True) == PEAKS
    assert gpu_evaluator.kept_peaks(tmp_path, low.to_dict, again=True) == PEAKS


def test_a_judge_makes_room_for_one_that_confirms(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = GpuEvaluator._open_judge

    def one_at_a_time(self: GpuEvaluator, *arguments: Any) -> Any:
        if any(judge.alive for judge in OPENED):
            raise OutOfDeviceMemory("another judge has it")
        return opened(self, *arguments)

    monkeypatch.setattr(GpuEvaluator, "_open_judge", one_at_a_time)
    monkeypatch.setattr(evaluator, "_maybe_aa", lambda: None)  # it would open one again, now and then
    evaluation = evaluator.evaluate(candidate(evaluator, "fine"), candidate(evaluator, "tardy"))
    assert evaluation.confirmed and evaluation.kernel_coverage == 1.0
    assert not any(judge.alive for judge in OPENED)  # the next candidate's opens again


def test_memory_that_somebody_else_took_is_an_outcome(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, left = Small.check, [2]

    def full(self: Small, *arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OutOfDeviceMemory("task wave does not fit into this GPU's memory (4 GiB)")
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Small, "check", full)
    evaluation = evaluator.evaluate(candidate(evaluator, "fine"))
    assert evaluation.outcome == "constraints" and "does not fit" in evaluation.log
    left[0] = 1  # the second try has an empty process
    alone: list[bool] = []
    close = type(evaluator.judge).close
    monkeypatch.setattr(
        type(evaluator.judge), "close", lambda s: [alone.append(evaluator._lanes._judging.locked()), close(s)]
    )
    assert evaluator.evaluate(candidate(evaluator, "fine")).correct
    assert alone and all(alone)  # no other thread is at the judge when it is closed


def test_memory_that_others_have_is_waited_for(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, left, waits = Small.check, [4], []

    def full(self: Small, *arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OutOfDeviceMemory("not now", elsewhere=1 << 34)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Small, "check", full)
    monkeypatch.setattr(gpu_evaluator, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
    assert evaluator.evaluate(candidate(evaluator, "fine")).correct
    assert len(waits) == 4 and all(1 <= wait <= 4 for wait in waits)
    assert evaluator.account.spent()["waiting for memory"][1] >= 4


def test_a_race_against_the_baseline_goes_on_in_another_process(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, left = Small.warm, [1]

    def full(self: Small, *arguments: Any) -> dict[str, float]:
        left[0] -= 1
        if left[0] >= 0:
            raise OutOfDeviceMemory("not now")
        return plain(self, *arguments)

    monkeypatch.setattr(Small, "warm", full)
    over, (low, high) = evaluator.race_baseline(candidate(evaluator, "fine"))
    assert 0 < low <= over <= high


def test_a_task_s_own_code_that_runs_out_of_memory_does_not_fit() -> None:
    def reference() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB\nmore")
        except torch.OutOfMemoryError as error:
            raise UserError("task.py:23: the forward pass failed") from error

    patch = pytest.MonkeyPatch()
    stand_in(patch, Small)
    found = gpu_judge.answer_to(reference, {}, b"")
    patch.undo()
    assert found == {"out_of_memory": "CUDA out of memory. Tried to allocate 16.00 GiB", "elsewhere": 0}


@pytest.mark.parametrize(("free", "asked"), [(1, "4.00 GiB"), (1, "14.00 GiB"), (14, "15.00 GiB")])
def test_memory_that_others_have_is_not_the_candidate_s_to_lack(
    monkeypatch: pytest.MonkeyPatch, free: int, asked: str
) -> None:
    stand_in(monkeypatch, Small)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 1 << 30)

    def plan() -> None:
        with gpu_stage.foreign():
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {asked}.")

    found = gpu_judge.answer_to(plan, {}, b"")
    if asked == "4.00 GiB":
        assert "4.00 GiB" in found["out_of_memory"] and found["elsewhere"] > 0
    else:  # nobody has it, or it is more than the whole device could give
        assert found["died"] == "constraints" and not found["fatal"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        CudaError("cuModuleLoadData", 2, "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
    ids=["cublas", "cufft", "cudnn", "driver"],
)
def test_libraries_and_the_driver_lack_memory_as_torch_does(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stand_in(monkeypatch, Small)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 1 << 30)

    def fail() -> None:
        raise error

    def as_a_candidate() -> None:
        with gpu_stage.foreign():
            fail()

    for request in (fail, as_a_candidate):
        found = gpu_judge.answer_to(request, {}, b"")
        assert str(error) in found["out_of_memory"] and found["elsewhere"] > 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (14 << 30, 16 << 30))
    found = gpu_judge.answer_to(as_a_candidate, {}, b"")
    assert found["died"] == "constraints"

    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)  # it lacked more than memory
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert gpu_judge.answer_to(as_a_candidate, {}, b"")["died"] == "runtime"
    assert gpu_judge.answer_to(lambda blob: fail(), {}, b"kernels")["died"] == "runtime"  # as they are loaded
    said = gpu_judge.answer_to(fail, {}, b"")
    assert str(error) in said["task_error"] and said["fatal"]


@pytest.mark.parametrize("noticed", ["in the answer", "by the judge's own work", "by the task's own code"])
def test_a_fault_that_is_told_late_is_the_candidate_s(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch, noticed: str
) -> None:
    """As on a busy device, where a kernel's end may be told before its fault is."""
    fault, judge = "CUDA error: misaligned address", evaluator.judge
    told = [0]  # how often the lost process still says so: the next one is whole

    def synchronize(*_: Any) -> None:
        if told[0]:
            told[0] -= 1
            raise RuntimeError(fault)

    def check(*_: Any, **__: Any) -> dict[str, Any]:
        told[0] = 2 if noticed == "in the answer" else 1
        if noticed == "by the judge's own work":
            raise RuntimeError(fault)
        if noticed == "by the task's own code":
            raise UserError(f"task.py:9: get_inputs failed: {fault}") from RuntimeError(fault)
        return {"max_abs": 0.0, "rel_l2": 0.0, "ratio": 0.0}

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(gpu_check, "check", check)
        found = evaluator.evaluate(candidate(evaluator, "fine"))
    assert found.outcome == "runtime" and fault in found.log
    assert not judge.alive and evaluator.evaluate(candidate(evaluator, "fine")).correct


@pytest.mark.parametrize(
    "error",
    [
        UserError("task out_of_memory_guard: an input is None"),
        RuntimeError("searchsorted(): side can only be 'left' or 'right' but got out of memory"),
        FileNotFoundError(2, "No such file or directory", "data/out of memory.pt"),
    ],
    ids=["user", "argument", "file"],
)
def test_what_only_speaks_of_memory_does_not_lack_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stand_in(monkeypatch, Small)

    def plain() -> None:
        raise error

    def of_the_task() -> None:
        try:
            plain()
        except Exception as cause:
            raise UserError("task.py:9: get_inputs failed") from cause

    for request in (plain, of_the_task):
        assert "out_of_memory" not in gpu_judge.answer_to(request, {}, b"")


@pytest.mark.parametrize("call", ["load", "launch"])
def test_memory_that_the_driver_lacks_for_a_kernel_is_waited_for(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 1 << 30)
    plain, left, waits = getattr(FakeDriver, call), [2], []

    def full(self: FakeDriver, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise CudaError(call, 2, "CUDA_ERROR_OUT_OF_MEMORY")
        return plain(self, *arguments)

    monkeypatch.setattr(FakeDriver, call, full)
    monkeypatch.setattr(gpu_evaluator, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
    assert evaluator.evaluate(candidate(evaluator, "fine")).correct
    assert len(waits) == 2


@pytest.mark.parametrize(("seconds", "outcome"), [(150.0, "correct"), (400.0, "constraints")])
def test_memory_that_others_have_is_waited_for_as_long_as_their_checks_take(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch, seconds: float, outcome: str
) -> None:
    plain, now = FakeDriver.load, [0.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 1 << 30)

    def slept(wait: float) -> None:
        now[0] += 10 * wait

    def full(self: FakeDriver, binary: bytes) -> int:
        if now[0] < seconds:
            raise CudaError("cuModuleLoadData", 2, "CUDA_ERROR_OUT_OF_MEMORY")
        return plain(self, binary)

    with monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "load", full)
        patch.setattr(gpu_evaluator, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=slept))
        found = evaluator.evaluate(candidate(evaluator, "fine"))
    assert found.outcome == outcome
    assert outcome == "correct" or "what others have of this GPU's memory" in found.log
    assert evaluator.evaluate(candidate(evaluator, "fine")).correct


def test_a_search_opens_at_its_sizes_once_others_have_left_room(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, left, waits = InProcess._exchange, [3], []

    def full(self: Small, do: str, arguments: dict[str, Any], *rest: Any) -> tuple[dict[str, Any], bytes]:
        left[0] -= do == "describe"
        if do == "describe" and left[0] >= 0:
            return {"out_of_memory": "16 GiB", "elsewhere": 1 << 34}, b""
        return plain(self, do, arguments, *rest)

    monkeypatch.setattr(Small, "_exchange", full)
    monkeypatch.setattr(gpu_evaluator, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
    with GpuEvaluator(evaluator.task, folder=evaluator.folder) as opened:
        assert opened.contract == "gpu" and len(waits) == 3
    left[0] = 1 << 30  # somebody stays
    monkeypatch.setattr(gpu_evaluator, "OPENING_MEMORY_S", -1.0)
    with pytest.raises(OutOfDeviceMemory, match="16 GiB"):
        GpuEvaluator(evaluator.task, folder=evaluator.folder)


def test_a_launcher_that_hangs_beside_its_calls_is_the_candidate_s_fault() -> None:
    """As when kernels are loaded and unloaded."""

    def unload() -> None:
        raise Hung(10.0)

    said = {"died": "timeout", "log": "no answer within 10 s", "fatal": True, "rival": False}
    assert gpu_judge.answer_to(unload, {}, b"") == said


def test_confirmations_take_a_part_of_the_memory(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, module = Artifact("cuda", "plan", ""), Artifact("cuda", "host", "")
    assert evaluator._spare_count(plan, None) == 5
    assert evaluator._spare_count(module, plan) == 3  # a module has processes, and so contexts, of its own
    assert evaluator._spare_count(module, module) == 2
    monkeypatch.setattr(evaluator, "_working_bytes", FACTS.memory_bytes)
    assert evaluator._spare_count(plan, plan) == 0


def test_kernels_are_built_for_the_device_that_is_there() -> None:
    assert gpu_evaluator.arch_of(FACTS) == "sm_90a"
    assert gpu_evaluator.arch_of(replace(FACTS, arch="sm_80")) == "sm_80"
    with pytest.raises(UserError, match=r"compute capability 7\.5, which kernels are not built for"):
        gpu_evaluator.arch_of(replace(FACTS, arch="sm_75"))


@pytest.mark.parametrize(("doubted", "outcome"), [(0, "constraints"), (8, "correct")])
def test_events_that_claim_too_little_are_the_candidate_s_if_the_baseline_s_do_not(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch, doubted: int, outcome: str
) -> None:
    race = GpuClient.race

    def on_a_busy_host(self: GpuClient, *arguments: Any) -> Any:
        result, counts = race(self, *arguments)
        return result, {**counts, "disputed": result.rounds, "doubted": doubted * result.rounds // 8}

    monkeypatch.setattr(GpuClient, "race", on_a_busy_host)
    assert evaluator.evaluate(candidate(evaluator, "fine")).outcome == outcome
