"""The host lane on a GPU: modules' own Python, in processes that may say what they like, on a GPU that is none."""

from __future__ import annotations

import fcntl
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ke_gym.candidate import Candidate
from ke_gym.evaluation import _gpu_host, gpu_evaluator, gpu_host
from ke_gym.evaluation._gpu_host import WAIT_FROM_S
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.gpu_client import NULL, GpuClient
from ke_gym.evaluation.gpu_evaluator import GpuEvaluator
from ke_gym.evaluation.gpu_host import HostRunner, NullHost
from ke_gym.evaluation.gpu_stage import Crowded, Died, Stage
from ke_gym.evaluation.leash import Leash
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError
from ke_gym.languages.module import runtime
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import (
    FakeDriver,
    FakeEvent,
    FakeHost,
    InProcess,
    Sleeper,
    idle,
    one_launch,
    stand_in,
)

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
        return torch.sin(3 * x) * self.scale
def get_inputs():
    return [torch.randn(ROWS, COLS)]
"""
FORWARD = "def forward(x, scale):\n    return torch.sin(3 * x) * scale\n"
MODEL = """
class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(40))
    def forward(self, x):
        return torch.sin(3 * x) * self.scale
"""
STRAY = "    __import__('ctypes').memset(x.data_ptr() + 4 * x.numel(), 1, 4)\n    return"
SECONDS = 0.02
MEMORY = torch.zeros(ROWS * COLS)
SLEEPERS: list[Sleeper] = []
HANDLE = MEMORY.data_ptr().to_bytes(64, "little").hex()


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuEvaluator]:
    folder = tmp_path_factory.mktemp("home")
    path = folder / "wave.py"
    path.write_text(TASK)
    patch = pytest.MonkeyPatch()
    stand_in(patch)
    with GpuEvaluator(Task.from_file(path), folder=folder) as opened:
        yield opened
    patch.undo()


def candidate(evaluator: GpuEvaluator, source: str, **options: Any) -> Candidate:
    """A module that could not be traced, as if it had been built."""
    found = Candidate(f"import torch\n{source}", "cuda")
    report = {"host_reason": "it asks what a tensor holds", "built_for": runtime()}
    evaluator.adopt(found, Artifact("cuda", "host", found.source, report=report, **options))
    return found


@pytest.mark.parametrize("source", [FORWARD, MODEL])
def test_a_right_module_is_correct_and_marked(evaluator: GpuEvaluator, source: str) -> None:
    evaluation = evaluator.evaluate(candidate(evaluator, source))
    assert evaluation.correct, evaluation.log
    assert (evaluation.trust, evaluation.kernel_coverage) == ("host", 0.0)
    assert evaluation.log.endswith(
        "its Python runs with its kernels (host lane): it asks what a tensor holds"
    )
    assert not evaluation.profile.resources and evaluation.preparation_ms is None


@pytest.mark.parametrize(
    ("old", "new", "outcome", "words"),
    [
        ("3 * x", "2.99 * x", "correctness", "relative L2 error"),
        ("    return", "    x[0, 0] = 1\n    return", "correctness", "wrote to input 0"),
        ("    return", "    scale.zero_()\n    return", "correctness", "wrote to parameter scale"),
        ("    return", STRAY, "correctness", "outside of"),
        (
            "torch.sin(3 * x) * scale",
            "x[1:]",
            "runtime",
            "output 0 is float32 (5, 40), expected float32 (6, 40)",
        ),
        ("    return", "    1 / 0\n    return", "runtime", "ZeroDivisionError"),
        ("    return", "    raise EOFError\n    return", "runtime", "EOFError"),
        ("    return", "    torch.empty(1 << 60)\n    return", "runtime", "RuntimeError"),
    ],
)
def test_what_is_wrong_is_said(evaluator: GpuEvaluator, old: str, new: str, outcome: str, words: str) -> None:
    evaluation = evaluator.evaluate(candidate(evaluator, FORWARD.replace(old, new, 1)))
    assert (evaluation.outcome, evaluation.trust) == (outcome, "host"), evaluation.log
    assert words in evaluation.log and evaluation.speedup is None


def test_what_the_last_call_left_is_gone(evaluator: GpuEvaluator) -> None:
    """Memory is used again: a module that leaves out what is there already must not get away with it."""
    kept = "kept = torch.empty(6, 40)\ndef forward(x, scale):\n    right = torch.sin(3 * x) * scale\n    "
    kept += "kept[:] = torch.where(kept.isnan(), 0.0, right)\n    return kept\n"
    assert evaluator.evaluate(candidate(evaluator, kept)).outcome == "correctness"


def test_it_races_a_plan_and_is_raced_by_one(evaluator: GpuEvaluator) -> None:
    slow = "import ke_gym.testing.fake_gpu as gpu\n" + FORWARD.replace(
        "    return", "    gpu.idle(0.02)\n    return"
    )
    fast, slow_one = candidate(evaluator, FORWARD), candidate(evaluator, slow)
    assert evaluator.evaluate(fast, slow_one).improved
    lost = evaluator.evaluate(slow_one, fast)
    assert lost.correct and not lost.improved and (lost.gain or 1.0) < 0.5
    assert evaluator._steady is None or evaluator._steady.lane == "plan"  # what Python costs is not steady


def test_extensions_of_another_torch_and_kernels_that_need_a_trace_are_refused(
    evaluator: GpuEvaluator,
) -> None:
    cubin = b"\x7fELF" + bytes(14) + (190).to_bytes(2, "little")
    found = candidate(evaluator, f"# with kernels\n{FORWARD}", binaries={"k": cubin})
    refused = evaluator.evaluate(found)
    assert refused.outcome == "constraints" and "need a forward that can be traced" in refused.log
    elsewhere = Artifact(
        "cuda", "host", found.source, {"ext": b"library"}, report={"built_for": "Python 3.8 with torch 1.0"}
    )
    with pytest.raises(BuildError, match=r"built for Python 3\.8 with torch 1\.0, here is Python"):
        evaluator.adopt(found, elsewhere)


def test_what_cannot_be_locked_in_is_refused(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise gpu_client.SpawnError("mount /proc: not permitted")

    from ke_gym.evaluation import gpu_client

    monkeypatch.setattr(InProcess, "_start_host", GpuClient._start_host)
    monkeypatch.setattr(evaluator.zygote, "spawn", refuse)
    refused = evaluator.evaluate(candidate(evaluator, f"# locked in\n{FORWARD}"))
    assert refused.outcome == "constraints" and "locked in beside a GPU" in refused.log


# -- processes that lie ------------------------------------------------------------------------------------------


class Frames(FakeHost):
    """Calls what it was told to in the place of its module; ``answer`` is what it says of it."""

    answer: Any = None

    def call(self) -> dict[str, Any]:
        said = super().call()
        return said if self.answer is None or not hasattr(self, "loaded") else self.answer

    def load(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        self.loaded = True
        return {}


class Hasty(Frames):
    """Says that it is done before it is."""

    def timed(self) -> dict[str, Any]:
        if hasattr(self, "loaded"):
            self._link.sock.send(b"r")
            self._link.send({"outputs": []})
        return super().timed()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stand_in(monkeypatch)
    path = tmp_path / "wave.py"
    path.write_text(TASK)
    yield Stage(Task.from_file(path), torch.device("cpu"), FakeDriver())  # type: ignore[arg-type]
    while SLEEPERS:
        SLEEPERS.pop().close()


def reached(host: Callable[[socket.socket], FakeHost]) -> tuple[Channel, Leash]:
    ours, theirs = socket.socketpair()
    host(theirs)
    SLEEPERS.append(Sleeper())
    return Channel(ours), SLEEPERS[-1].leash


def opened(stage: Stage, host: Callable[[socket.socket], FakeHost]) -> tuple[HostRunner, list[torch.Tensor]]:
    chosen = stage.shape_set("default")
    null = NullHost(*reached(FakeHost), stage)
    runner = HostRunner(*reached(host), stage, chosen, null)
    runner.load(b"", 0, "default")
    out = torch.zeros(ROWS, COLS)
    runner.place([torch.randn(ROWS, COLS)], chosen.parameters, [out])
    return runner, [out]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"outputs": []},
        {"outputs": "all of them"},
        {"outputs": [["00", 0, [COLS, 1]]]},
        {"outputs": [["zz" * 64, 0, [COLS, 1]]]},
        {"outputs": [["00" * 64, 0, [COLS, 1]]]},
        {"outputs": [[HANDLE, -4, [COLS, 1]]]},
        {"outputs": [[HANDLE, 2, [COLS, 1]]]},
        {"outputs": [[HANDLE, 1 << 60, [COLS, 1]]]},
        {"outputs": [[HANDLE, 0, [1 << 60, 1]]]},
        {"outputs": [[HANDLE, 0, [1 << 70, 1]]]},
        {"outputs": [[HANDLE, 0, [-COLS, 1]]]},
        {"outputs": [[HANDLE, 0, [1]]]},
        {"outputs": [[HANDLE, "here", [COLS, 1]]]},
        {"outputs": [None]},
    ],
)
def test_nonsense_ends_the_candidate_and_not_the_judge(stage: Stage, answer: dict[str, Any]) -> None:
    runner, _ = opened(stage, type("Liar", (Frames,), {"answer": answer}))
    with pytest.raises(Died, match="nonsense") as died:
        runner.run()
    assert not died.value.fatal
    with pytest.raises(Died, match="nonsense"):  # nothing is asked of it any more
        runner.run()
    runner.close()


def test_an_answer_to_a_call_that_was_not_made_is_the_last(stage: Stage) -> None:
    runner, _ = opened(stage, Hasty)
    with pytest.raises(Died, match="out of turn"):
        runner.timed("run", 5.0, 1000)


class Slow(Frames):
    """Takes ``SECONDS``."""

    def call(self) -> dict[str, Any]:
        idle(SECONDS)
        if hasattr(self, "loaded"):
            self._wanted = [torch.zeros(ROWS, COLS)]
            self._forward = lambda: torch.ones(ROWS, COLS)
        return super().call()


def test_the_time_is_the_judge_s_less_what_a_call_that_does_nothing_takes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, (out,) = opened(stage, Slow)
    sample = runner.timed("run", 5.0, 1000)
    assert sample.seconds == pytest.approx(SECONDS) and not sample.disputed
    assert torch.equal(out, torch.ones(ROWS, COLS))
    # What is shorter than the least is not worth more than that.
    monkeypatch.setattr(NullHost, "seconds", lambda self: 2 * SECONDS)
    assert runner.timed("run", 5.0, 1000).seconds == gpu_host.RESOLUTION_S


@pytest.mark.parametrize(("seconds", "waits"), [(0.5 * WAIT_FROM_S, False), (1.5 * WAIT_FROM_S, True)])
def test_only_long_calls_are_waited_for_in_the_module_s_process(
    monkeypatch: pytest.MonkeyPatch, seconds: float, waits: bool
) -> None:
    stand_in(monkeypatch)
    waited: list[object] = []
    monkeypatch.setattr(_gpu_host, "time", SimpleNamespace(perf_counter=lambda: FakeEvent.now))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    ours, theirs = socket.socketpair()
    host = _gpu_host.Host(Channel(theirs), FakeDriver(), torch.device("cpu"))  # type: ignore[arg-type]
    host._forward, host._wanted, host._waits = (
        (lambda: idle(seconds) or torch.zeros(3)),
        [torch.zeros(3)],
        True,
    )
    waited.clear()
    for _ in range(3):
        host.call()
    assert len(waited) == (3 if waits else 1)
    ours.close()
    theirs.close()


def test_the_least_call_waits_for_nothing_and_is_answered_as_others_are(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []
    monkeypatch.setattr(FakeDriver, "least_work", lambda self, address: lambda: began.append(address))
    null = NullHost(*reached(FakeHost), stage)
    address = began.pop()
    assert null.seconds() == 0.0 and null.seconds() == 0.0  # by a clock that only kernels move
    assert began == [address] * (gpu_host.NULL_CALLS + 2)


def test_whoever_keeps_the_device_busy_between_calls_is_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = opened(stage, Frames)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: idle(2 * gpu_host.IDLE_S))
    with pytest.raises(
        Crowded, match="timed beside was lost: it keeps the device busy"
    ):  # not the candidate's fault
        runner.timed("run", 5.0, 1000)
    monkeypatch.setattr(NullHost, "seconds", lambda self: 0.0)
    before = FakeEvent.now
    with pytest.raises(Died, match="keeps the device busy"):
        runner.timed("run", 5.0, 1000)
    assert gpu_host.BUSY_S <= FakeEvent.now - before < 2 * gpu_host.BUSY_S
    with pytest.raises(Died, match="keeps the device busy"):  # nor may what was loaded leave anything there
        opened(stage, Frames)


@pytest.mark.parametrize("pauses", [0, 1, gpu_host.QUIET - 1])
def test_what_begins_when_contents_come_is_part_of_the_call(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, pauses: int
) -> None:
    """As a stream's work does that waits for memory, which is no kernel's work: the judge's own has to wait for it."""
    runner, _ = opened(stage, Slow)
    monkeypatch.setattr(NullHost, "seconds", lambda self: 0.0)
    work: list[float] = []
    fill, touch = runner._fill, runner._touch_device

    def filled() -> None:
        fill()
        work.extend([0.0] * pauses + [SECONDS])

    def touched() -> None:
        touch()
        idle(work.pop(0) if work else 0.0)

    monkeypatch.setattr(runner, "_fill", filled)
    monkeypatch.setattr(runner, "_touch_device", touched)
    for _ in range(2):
        sample = runner.timed("run", 5.0, 1000)
        assert sample.seconds == pytest.approx(2 * SECONDS) and not sample.hidden
    monkeypatch.setattr(runner, "_fill", fill)
    sample = runner.timed("run", 5.0, 1000)
    assert sample.seconds == pytest.approx(SECONDS) and sample.hidden
    monkeypatch.setattr(runner, "_fill", lambda: work.extend([SECONDS] * 99))
    with pytest.raises(Died, match="keeps the device busy"):
        runner.timed("run", 5.0, 1000)


def test_one_that_is_gone_or_hangs_is_told_apart(stage: Stage) -> None:
    class Gone(Frames):
        def timed(self) -> dict[str, Any]:
            if hasattr(self, "loaded"):
                self._link.sock.shutdown(socket.SHUT_RDWR)
            return super().timed()

    runner, _ = opened(stage, Gone)
    with pytest.raises(Died, match=gpu_host.GONE) as died:
        runner.run()
    assert died.value.outcome == "runtime"

    class Hangs(Frames):
        def call(self) -> dict[str, Any]:
            return super().call() if not hasattr(self, "loaded") else threading.Event().wait()  # type: ignore[return-value]

    import threading

    runner, _ = opened(stage, Hangs)
    with pytest.raises(Died, match="no answer within") as died:
        runner.timed("run", 0.2, 1000)
    assert died.value.outcome == "timeout" and not died.value.fatal


def test_a_process_that_does_not_start_says_why(stage: Stage) -> None:
    class Broken(FakeHost):
        def serve(self) -> None:
            self._link.send({"error": "CUDA error: no kernel image", "lacks_memory": False})

    with pytest.raises(
        Died, match="its Python cannot be run on this GPU: CUDA error: no kernel image"
    ) as died:
        opened(stage, Broken)
    assert died.value.outcome == "constraints" and not died.value.fatal


@pytest.mark.parametrize(("free", "kind"), [(1 << 34, Died), (1 << 30, Crowded)])
def test_who_has_the_memory_that_a_module_says_it_lacks_is_seen_when_it_has_ended(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, free: int, kind: type[Died]
) -> None:
    runner, _ = opened(
        stage, type("Large", (Frames,), {"answer": {"error": "no room", "lacks_memory": True}})
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 1 << 34))
    with pytest.raises(Died, match="not enough device memory: no room") as died:
        runner.run()
    assert died.type is kind and died.value.outcome == "constraints"
    assert not SLEEPERS[-1].leash.alive()


def test_what_a_module_left_on_the_device_ends_before_others_have_it(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a module's process is there, its judge has the device alone, and a module that fails is ended so."""
    modes: dict[str, Any] = {}
    exchange, end = InProcess._exchange, Sleeper.close

    def watched(self: InProcess, do: str, *rest: Any) -> Any:
        modes[do] = self.lock._mine.mode  # type: ignore[union-attr]
        return exchange(self, do, *rest)

    def ended(self: Sleeper) -> None:
        modes["end"] = evaluator.judge.lock._mine.mode  # type: ignore[union-attr]
        end(self)

    monkeypatch.setattr(InProcess, "_exchange", watched)
    monkeypatch.setattr(Sleeper, "close", ended)
    lying = FORWARD.replace("    return", "    1 / 0\n    return")
    assert evaluator.evaluate(candidate(evaluator, f"# left\n{lying}")).outcome == "runtime"
    assert modes["load_host"] == modes["check"] == modes["end"] == fcntl.LOCK_EX
    assert list(evaluator.judge._hosts) == [NULL]


def test_a_process_that_does_nothing_and_is_lost_is_nobody_s_fault(
    evaluator: GpuEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge makes room for another, with everything around it."""
    module = candidate(evaluator, f"# beside one that is lost\n{FORWARD}")
    assert evaluator.evaluate(module).correct
    monkeypatch.setattr(
        gpu_evaluator, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None)
    )
    lost = evaluator.judge.server._null._link  # type: ignore[attr-defined]
    lost.sock.shutdown(socket.SHUT_RDWR)
    assert evaluator.evaluate(module).correct


def test_an_incumbent_that_cannot_be_loaded_is_left_out(evaluator: GpuEvaluator) -> None:
    cubin = b"\x7fELF" + bytes(14) + (190).to_bytes(2, "little")
    module = candidate(evaluator, FORWARD)
    beside = evaluator.evaluate(
        module, candidate(evaluator, f"kernels = 1\n{FORWARD}", binaries={"k": cubin})
    )
    assert beside.correct and "the incumbent failed (kernels of lang.cuda" in beside.log


def test_plans_are_judged_as_before(evaluator: GpuEvaluator) -> None:
    made = one_launch("absent", SPEC)
    found = Candidate("x = 'absent'", "cuda")
    evaluator.adopt(found, replace(made, source=found.source))
    assert evaluator.evaluate(found).outcome == "constraints"
