"""The GPU judge's logic, on a GPU that is none."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ke_gym.evaluation import gpu_check, gpu_judge
from ke_gym.evaluation.acceptance import DRAWINGS
from ke_gym.evaluation.gpu_judge import GpuJudge, answer_to
from ke_gym.evaluation.gpu_memory import Block, Placement, give_back
from ke_gym.evaluation.gpu_stage import Died
from ke_gym.evaluation.gpu_timing import Sample
from ke_gym.evaluation.race import Rules
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Alloc, Call, Geometry, Launch, Plan, PlanInput, Ref, TensorSpec
from ke_gym.targets.cuda_executor import CudaRunner
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import (
    FakeClocks,
    FakeLauncher,
    floats,
    idle,
    integer,
    kernel,
    one_launch,
    pointer,
    stand_in,
)  # fmt: skip

ROWS, COLS = 6, 40
SPEC = TensorSpec((ROWS, COLS), (COLS, 1), "float32")
TASK = f"""
import torch
import torch.nn as nn
ROWS, COLS = {ROWS}, {COLS}
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(COLS))
    def forward(self, x):
        return torch.sin(3 * x) + x * x
def get_inputs():
    return [torch.randn(ROWS, COLS)]
"""
CASES = [(11, "task", 0), (12, "task", 5), (13, "ties", 0), (14, "special", 0)]
COUNT = {"calls": 0}


def _right(x: int, out: int, n: int) -> torch.Tensor:
    given = floats(x, integer(n)).double()
    return floats(out, integer(n)).copy_(torch.sin(3 * given) + given * given)


@kernel
def right(x: int, out: int, n: int) -> None:
    _right(x, out, n)


@kernel
def counted(x: int, out: int, n: int) -> None:
    COUNT["calls"] += 1
    _right(x, out, n)


@kernel
def of_two(x: int, y: int, out: int, n: int) -> None:
    one, other = (floats(given, integer(n)).double() for given in (x, y))
    floats(out, integer(n)).copy_(torch.sin(3 * one) + other * other)


@kernel
def wrong(x: int, out: int, n: int) -> None:
    _right(x, out, n)[7] += 1


@kernel
def rough(x: int, out: int, n: int) -> None:
    """A little too far off, in every call."""
    COUNT["calls"] += 1
    _right(x, out, n).mul_(1 + 1e-5)


@kernel
def seldom_rough(x: int, out: int, n: int) -> None:
    """A little too far off, in one call of sixteen."""
    COUNT["calls"] += 1
    _right(x, out, n).mul_(1 + 4e-6 * (COUNT["calls"] % 16 == 1))


@kernel
def unwritten(x: int, out: int, n: int) -> None:
    floats(out, 3).zero_()


@kernel
def past_the_end(x: int, out: int, n: int) -> None:
    _right(x, out, n)
    floats(out, integer(n) + 1)[integer(n)] = 1


@kernel
def before_the_input(x: int, out: int, n: int) -> None:
    _right(x, out, n)
    (torch.frombuffer((ctypes_byte * 4).from_address(pointer(x) - 4), dtype=torch.uint8)).zero_()


@kernel
def writes_input(x: int, out: int, n: int) -> None:
    _right(x, out, n)
    floats(x, integer(n))[5] = 0


@kernel
def remembers(x: int, out: int, n: int) -> None:
    """Answers from what it saw first for as long as the first element is the same."""
    given = floats(x, integer(n))
    kept = COUNT.setdefault("seen", {})  # type: ignore[arg-type]
    key = float(given[0])
    if key in kept:  # type: ignore[operator]
        floats(out, integer(n)).copy_(kept[key])  # type: ignore[index]
    else:
        kept[key] = _right(x, out, n).clone()  # type: ignore[index]


@kernel
def honest_for_a_while(x: int, out: int, n: int) -> None:
    COUNT["calls"] += 1
    _right(x, out, n)
    if COUNT["calls"] > 12:
        floats(out, integer(n)).zero_()


@kernel
def faults(x: int, out: int, n: int) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


import ctypes  # noqa: E402

ctypes_byte = ctypes.c_uint8


@pytest.fixture(params=["together", "apart"])
def judge(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[GpuJudge]:
    stand_in(monkeypatch)
    monkeypatch.setattr(FakeClocks, "now", 1000)
    COUNT.clear()
    COUNT["calls"] = 0
    path = tmp_path / "task.py"
    path.write_text(TASK)
    mine, launchers = socket.socketpair()
    made = GpuJudge(Task.from_file(path), "eager", torch.device("cpu"), mine)
    with mine:
        if request.param == "apart":
            FakeLauncher(launchers)
            assert made.move_apart() == {"apart": True, "why": ""}
        else:
            launchers.close()
        made.describe(["default"])
        yield made


def judging(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> GpuJudge:
    """A judge of the task in ``text``, which knows what the task is."""
    stand_in(monkeypatch)
    monkeypatch.setattr(FakeClocks, "now", 1000)
    path.write_text(text)
    made = GpuJudge(Task.from_file(path), "eager", torch.device("cpu"))
    made.describe(["default"])
    return made


def test_a_close_call_is_decided_by_more_contents(judge: GpuJudge) -> None:
    answer = check(judge, "rough")
    assert "over 16 drawings" in answer["reason"] and answer["case"] == 0
    assert COUNT["calls"] == DRAWINGS
    COUNT["calls"] = 0
    answer = check(judge, "seldom_rough")
    assert "reason" not in answer, answer
    assert COUNT["calls"] > DRAWINGS
    for name, right in (("rough", False), ("seldom_rough", True)):
        arm = judge.load("default", one_launch(name, SPEC).to_bytes())["arm"]
        stage, chosen, runner = judge.stage, judge.sets["default"], judge.arms[arm].runner
        COUNT["calls"] = 0
        done = stage.call(chosen, runner, 5.0)
        assert done.outputs is not None
        assert stage.plausible(chosen, runner, done.seed, done.outputs, 5.0, full=True) == right
        assert COUNT["calls"] == DRAWINGS


def test_outputs_may_be_laid_out_otherwise_than_the_reference_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, turned = "torch.sin(3 * x) + x * x", "(torch.sin(3 * x) + x * x).t().contiguous().t()"
    judge = judging(monkeypatch, tmp_path / "turned.py", TASK.replace(plain, turned))
    assert judge.sets["default"].outputs[0].stride == (1, ROWS)
    answer = check(judge, "right")
    assert "reason" not in answer, answer
    assert "reason" in check(judge, "wrong")
    arm = judge.load("default", one_launch("right", SPEC).to_bytes())["arm"]
    assert judge.soak(arm, 5.0)["ok"] and judge.profile(arm, 5.0)["steps"]
    spread = TensorSpec((ROWS, COLS), (2 * COLS, 1), "float32")
    with pytest.raises(Died, match="is spread over"):
        judge.load("default", one_launch("right", spread).to_bytes())


def test_a_tensor_given_twice_is_two_tensors_for_the_judge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = TASK.replace("self, x", "self, x, y").replace("x * x", "y * y")
    text = text.replace("return [torch.randn(ROWS, COLS)]", "return [torch.randn(ROWS, COLS)] * 2")
    judge = judging(monkeypatch, tmp_path / "twice.py", text)
    inputs = tuple(PlanInput("input", name, SPEC) for name in ("0", "1"))
    types, block = ("float*", "float*", "float*", "int64_t"), Geometry((1, 1, 1), (32, 1, 1))
    launch = Launch("k", "of_two", (Ref(0), Ref(1), Ref(2), ROWS * COLS), types, block)
    plan = Plan(inputs, (Alloc(2, SPEC), launch), (2,), (SPEC,), "cuda")
    artifact = replace(one_launch("of_two", SPEC), plans={"default": plan})
    answer = judge.check(judge.load("default", artifact.to_bytes())["arm"], CASES, 99, True, 5.0)
    assert "reason" not in answer, answer


def test_what_inputs_the_reference_refuses_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = TASK.replace(
        "return torch.sin", "torch._assert(not x.isnan().any(), 'no numbers')\n        return torch.sin"
    )
    judge = judging(monkeypatch, tmp_path / "choosy.py", text)
    told = judge.refuses("default", "special")
    assert "no numbers" in told["refused"] and not told["fatal"]
    assert judge.refuses("default", "ties") == {"refused": ""}

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    asked = {"shape_set": "default", "distribution": "ties"}
    assert answer_to(judge.refuses, asked, b"") == {
        "refused": "CUDA error: device-side assert triggered",
        "fatal": True,
    }


def check(judge: GpuJudge, name: str) -> dict[str, Any]:
    arm = judge.load("default", one_launch(name, SPEC).to_bytes())["arm"]
    return judge.check(arm, CASES, 99, True, 5.0)


def run_race(judge: GpuJudge, name: str, other: str | None = None, **rules: Any) -> dict[str, Any]:
    own = judge.load("default", one_launch(name, SPEC).to_bytes())["arm"]
    rival = None if other is None else judge.load("default", one_launch(other, SPEC).to_bytes())["arm"]
    limits = vars(Rules(min_rounds=6, max_rounds=8, hopeless=1e9, slow=1e9, **rules))
    judge.warm("default", own, rival, True)
    return judge.race("default", own, rival, True, limits, 0.01, 5.0)


def test_it_says_what_the_task_is(judge: GpuJudge) -> None:
    described, signature = judge.describe(["default"])
    shape = described["shapes"]["default"]
    assert shape["inputs"] == [[[ROWS, COLS], [COLS, 1], "float32"]]
    assert shape["work"]["bytes"] == 2 * 4 * ROWS * COLS
    assert described["facts"]["model"] == "Fake" and signature


def test_a_right_kernel_passes_every_case(judge: GpuJudge) -> None:
    answer = check(judge, "right")
    assert "reason" not in answer and answer["ratio"] <= 2


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("wrong", "error"),
        ("unwritten", "non-finite"),
        ("past_the_end", "outside of its outputs: 0 bytes past the end of output 0"),
        ("before_the_input", "outside of its inputs"),
        ("writes_input", "wrote to input 0"),
    ],
)
def test_what_a_kernel_does_wrong_is_seen(judge: GpuJudge, name: str, problem: str) -> None:
    assert problem in check(judge, name)["reason"]


def test_what_is_remembered_shows_when_one_element_changes(judge: GpuJudge) -> None:
    assert check(judge, "remembers").get("touched")


def test_a_fault_ends_the_process_with_its_first_line(judge: GpuJudge) -> None:
    with pytest.raises(Died, match="illegal memory access") as died:
        check(judge, "faults")
    assert died.value.fatal and died.value.outcome == "runtime" and "more" not in died.value.log


def test_a_kernel_that_does_not_exist_is_no_fault(judge: GpuJudge) -> None:
    with pytest.raises(Died) as died:
        check(judge, "nothing")
    assert not died.value.fatal and died.value.outcome == "constraints"


def test_a_race_calls_everybody_on_contents_of_their_own(judge: GpuJudge) -> None:
    answer = run_race(judge, "right", "right")
    rounds = len(answer["values"])
    assert {name: len(seconds) for name, seconds in answer["seconds"].items()} == dict.fromkeys(
        ("candidate", "incumbent", "baseline"), rounds
    )
    assert not answer["suspects"]


def test_what_is_right_only_when_checked_is_caught_while_timed(judge: GpuJudge) -> None:
    assert "reason" not in check(judge, "honest_for_a_while")
    assert run_race(judge, "honest_for_a_while")["suspects"] == ["candidate"]


def test_short_calls_take_several_in_a_round_and_each_is_looked_at(
    judge: GpuJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_judge, "SHORT_S", 1e9)
    looked_at = []
    plausible = judge.stage.plausible

    def counting(*arguments: Any) -> bool:
        looked_at.append(arguments)
        return plausible(*arguments)

    monkeypatch.setattr(judge.stage, "plausible", counting)
    answer = run_race(judge, "right")
    rounds = len(answer["values"])
    assert judge.sets["default"].calls == gpu_judge.MOST_CALLS == len(looked_at) / rounds
    assert len(answer["seconds"]["candidate"]) == len(answer["seconds"]["baseline"]) == rounds
    monkeypatch.setattr(gpu_judge, "SHORT_S", 1e-9)
    run_race(judge, "right")
    assert judge.sets["default"].calls == 1


def test_what_is_not_used_goes_back_to_the_device_if_it_is_much(
    judge: GpuJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, cuda = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 if device == cuda else 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(True))
    for used, free, returned in ((7, 0, 0), (5, 8, 0), (4, 8, 1), (5, 7, 1)):
        given.clear()
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _, used=used: used)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 64))
        give_back(cuda, 64)
        assert len(given) == returned


def test_throttled_rounds_do_not_count(judge: GpuJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeClocks, "mhz", lambda self: 300 if COUNT["calls"] in (6, 8) else 1000)
    answer = run_race(judge, "counted")
    throttled = answer["counts"]["throttled"]
    assert throttled >= 2 and answer["counts"]["rounds"] == throttled + len(answer["values"])


def test_alternatives_are_raced_and_the_faster_one_is_picked(judge: GpuJudge) -> None:
    slow = one_launch("slow", SPEC)
    launch = slow.plans["default"].steps[1]
    assert isinstance(launch, Launch)
    made = one_launch("slow", SPEC, alternatives=(replace(launch, kernel="right"),))
    arm = judge.load("default", made.to_bytes())["arm"]
    assert judge.tune(arm, 5.0) == {"picks": {1: 1}, "graph": False}
    assert "reason" not in judge.check(arm, CASES, 99, True, 5.0)


def test_an_alternative_that_is_beaten_is_called_twice_and_no_more(
    judge: GpuJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = one_launch("right", SPEC).plans["default"].steps[1]
    assert isinstance(launch, Launch)
    made = one_launch("right", SPEC, alternatives=(replace(launch, kernel="twice_as_slow"),))
    called: list[str] = []

    def call(chosen: Any, runner: Any, patience: float) -> Any:
        (step,) = (step for step in runner.plan.steps if isinstance(step, Launch))
        called.append(step.kernel)
        return SimpleNamespace(
            sample=SimpleNamespace(seconds={"right": 1.0, "twice_as_slow": 2.0}[step.kernel])
        )

    arm = judge.load("default", made.to_bytes())["arm"]
    monkeypatch.setattr(judge.stage, "call", call)
    assert judge.tune(arm, 5.0)["picks"] == {1: 0}
    assert called == ["right"] * 5 + ["twice_as_slow"] * 2


@kernel
def twice_as_slow(x: int, out: int, n: int) -> None:
    _right(x, out, n)


@kernel
def slow(x: int, out: int, n: int) -> None:
    idle(0.05)
    _right(x, out, n)


def two_launches() -> Artifact:
    """The right kernel, twice the same."""
    made = one_launch("right", SPEC)
    plan = made.plans["default"]
    return replace(made, plans={"default": replace(plan, steps=(*plan.steps, plan.steps[1]))})


@pytest.mark.parametrize(("graph_s", "taken"), [(0.5, True), (0.99, False)])
def test_a_plan_goes_as_a_graph_where_that_is_clearly_faster(
    judge: GpuJudge, monkeypatch: pytest.MonkeyPatch, graph_s: float, taken: bool
) -> None:
    arm = judge.load("default", two_launches().to_bytes())["arm"]
    monkeypatch.setattr(
        judge, "_typical", lambda chosen, runner, patience: graph_s if runner.plan.graph else 1.0
    )
    assert judge.tune(arm, 5.0) == {"picks": {}, "graph": taken}
    assert judge.arms[arm].runner.plan.graph == taken
    assert "reason" not in judge.check(arm, CASES, 99, True, 5.0)
    assert judge.soak(arm, 5.0) == {"ok": True}


def test_what_is_tried_is_unloaded_again(judge: GpuJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"__init__": 0, "close": 0}

    def watched(name: str) -> None:
        method = getattr(CudaRunner, name)

        def call(*arguments: Any, **named: Any) -> None:
            method(*arguments, **named)
            counts[name] += 1

        monkeypatch.setattr(CudaRunner, name, call)

    for name in counts:
        watched(name)
    launch = one_launch("right", SPEC).plans["default"].steps[1]
    assert isinstance(launch, Launch)
    made = one_launch("right", SPEC, alternatives=(replace(launch, kernel="slow"), launch))
    plan = made.plans["default"]
    copied = (*plan.steps, Call("aten.clone.default", (Ref(1),), {}, (2,)))
    made = replace(made, plans={"default": replace(plan, steps=copied, returns=(2,))})
    arm = judge.load("default", made.to_bytes())["arm"]
    typical, tried = judge._typical, iter(range(3))

    def refused_once(*arguments: Any) -> float:
        if next(tried, None) == 1:
            raise Died("constraints", "more than this device has", fatal=False)
        return typical(*arguments)

    monkeypatch.setattr(judge, "_typical", refused_once)
    assert judge.tune(arm, 5.0)["picks"][1] in (0, 2)
    judge.profile(arm, 5.0)
    assert counts["__init__"] - counts["close"] == 1 and counts["close"] >= 4, counts


def test_a_profile_tells_steps_resources_and_coverage(judge: GpuJudge) -> None:
    arm = judge.load("default", one_launch("right", SPEC).to_bytes())["arm"]
    answer = judge.profile(arm, 5.0)
    assert [name for name, _ in answer["steps"]] == ["right"]
    assert answer["coverage"] == 1.0 and answer["resources"]["right"]["registers"] == 32


def test_the_reference_passes_and_mutants_do_not(judge: GpuJudge) -> None:
    assert judge.self_verdict("default")["ok"]
    rejected = judge.mutants("default", CASES)["mutants"]
    assert len(rejected) > 2 and all(rejected.values())


def test_an_artifact_survives_its_way_to_the_judge(judge: GpuJudge) -> None:
    made = one_launch("right", SPEC)
    assert Artifact.from_bytes(made.to_bytes()).plans == made.plans


def test_what_stays_right_is_told_from_what_does_not(judge: GpuJudge) -> None:
    stays, ends = (
        judge.load("default", one_launch(name, SPEC).to_bytes())["arm"]
        for name in ("right", "honest_for_a_while")
    )
    assert judge.soak(stays, 5.0) == {"ok": True}
    assert judge.soak(ends, 5.0) == {"ok": False}


def test_a_call_that_the_host_s_clock_doubts_is_repeated(
    judge: GpuJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubted, fine = Sample(2e-3, 1e-3, 2e-3, True, 1000), Sample(1e-3, 1e-3, 1e-3, True, 1000)
    answers = [doubted, doubted, fine]
    monkeypatch.setattr(judge.stage.watch, "time", lambda run, patience: answers.pop(0))
    assert judge.stage.call(judge.sets["default"], None, 5.0).sample == fine
    monkeypatch.setattr(judge.stage.watch, "time", lambda run, patience: doubted)
    assert judge.stage.call(judge.sets["default"], None, 5.0).sample.disputed


@pytest.mark.parametrize(("who", "count"), [("baseline", 0), ("candidate", 1)])
def test_doubted_calls_are_counted_for_the_candidate_and_the_baseline(
    judge: GpuJudge, monkeypatch: pytest.MonkeyPatch, who: str, count: int
) -> None:
    plain = judge.stage.call

    def call(chosen: Any, runner: Any, patience: float) -> Any:
        done = plain(chosen, runner, patience)
        lying = (runner is None) == (who == "baseline")
        return replace(done, sample=replace(done.sample, seconds=done.sample.device_s * (2 if lying else 1)))

    monkeypatch.setattr(judge.stage, "call", call)
    answer = run_race(judge, "right")
    counts = answer["counts"]
    rounds = len(answer["values"])
    assert (counts["disputed"], counts["doubted"]) == (count * rounds, (1 - count) * rounds)


def test_what_strides_leave_out_of_an_input_holds_no_numbers() -> None:
    """A kernel that reads on and multiplies by zero must not get away with it."""
    rows = torch.randn(8, 128)[:, :100]
    block = Block(Placement.of((TensorSpec.of(rows),)), torch.device("cpu"))
    block.bytes.zero_()
    block.tensors[0].copy_(rows)
    gpu_check._ring(block)
    whole = block.tensors[0].as_strided((7, 128), (128, 1), block.tensors[0].storage_offset())
    assert torch.equal(block.tensors[0], rows) and whole[:, 100:].isnan().all()
