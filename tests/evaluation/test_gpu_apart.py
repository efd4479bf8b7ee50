"""Kernels launched by another process than the judge's, which may say what it likes: on a GPU that is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ke_gym.evaluation import gpu_apart
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.gpu_apart import Apart, Unfit
from ke_gym.evaluation.gpu_stage import Died
from ke_gym.evaluation.gpu_timing import Hung
from ke_gym.languages.plan import TensorSpec
from ke_gym.targets import cuda
from ke_gym.targets.cuda_driver import CudaError
from ke_gym.testing.fake_gpu import (
    FakeDriver,
    FakeLauncher,
    floats,
    idle,
    integer,
    kernel,
    one_launch,
    stand_in,
)

SPEC = TensorSpec((64,), (1,), "float32")
CPU = torch.device("cpu")
SECONDS = 0.02
GIVEN = torch.arange(64.0)
"""Whoever lends memory keeps it."""
SEEN, OVER = threading.Event(), threading.Event()


@kernel
def doubled_late(x: int, out: int, n: int) -> None:
    idle(SECONDS)
    floats(out, integer(n)).copy_(2 * floats(x, integer(n)))


@kernel
def doubled_when_seen(x: int, out: int, n: int) -> None:
    assert SEEN.wait(300)
    floats(out, integer(n)).copy_(2 * floats(x, integer(n)))


class Liar(FakeLauncher):
    """Claims that nothing took any time."""

    def time(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        return {**super().time(*arguments, **named), "device_s": 1e-7, "late": 0.0, "hidden": False}


class Sluggish(FakeLauncher):
    """Claims that enqueuing takes longer than the calls do, so that all of them lies behind the spin."""

    def time(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        return {**super().time(*arguments, **named), "device_s": 1e-7, "late": 0.0, "queue_s": 1.0}


class Hasty(FakeLauncher):
    """Says that it is done before it has begun."""

    def time(self, number: int, *arguments: Any, **named: Any) -> dict[str, Any]:
        if number:
            self._begin()
            self._over()
            self._begin = self._over = lambda: None  # type: ignore[method-assign]
        return {**super().time(number, *arguments, **named), "device_s": 1e-7, "late": 0.0}


class Babbler(FakeLauncher):
    """Answers what nobody asked as soon as something foreign is loaded."""

    def run(self, *_: Any, **__: Any) -> None:
        self._channel.sock.send(b"no frame at all, but long enough to be one")


class Dead(FakeLauncher):
    """Is gone as soon as something foreign runs."""

    def run(self, *_: Any, **__: Any) -> None:
        raise EOFError("as if killed")


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Channel, socket.socket]]:
    stand_in(monkeypatch)
    mine, theirs = Channel.pair()
    with mine:
        yield mine, theirs


def opened(
    link: tuple[Channel, socket.socket], launcher: type[FakeLauncher], name: str = "doubled_late"
) -> Any:
    mine, theirs = link
    launcher(theirs)
    apart = Apart(mine, FakeDriver(), CPU)  # type: ignore[arg-type]
    out = torch.zeros(64)
    return apart, apart.runner(one_launch(name, SPEC), "default", [GIVEN], {}, [out]), out


def test_what_is_launched_elsewhere_works_on_the_judge_s_memory(link: tuple[Channel, socket.socket]) -> None:
    _, runner, out = opened(link, FakeLauncher)
    runner.run()
    assert torch.equal(out, 2 * GIVEN)
    ones, other = torch.ones(64), torch.zeros(64)
    runner.place([ones], {}, [other])
    runner.run()
    assert torch.equal(other, 2 * ones)
    runner.close()


def test_the_judge_s_clock_overrules_the_launcher(link: tuple[Channel, socket.socket]) -> None:
    apart, runner, _ = opened(link, Liar)
    sample = apart.time(runner, "run", 5.0, 1000)
    assert sample.device_s == 1e-7 and sample.disputed and sample.seconds > SECONDS / 2


def test_no_more_is_taken_off_for_enqueuing_than_it_may_take(link: tuple[Channel, socket.socket]) -> None:
    apart, runner, out = opened(link, Sluggish)
    apart.time(runner, "run", 5.0, 1000)  # what it claims here would be taken off the next
    sample = apart.time(runner, "run", 5.0, 1000)
    assert torch.equal(out, 2 * GIVEN)
    assert sample.disputed and sample.seconds > SECONDS / 2


def test_what_comes_after_a_call_is_said_to_be_over_is_too_late(link: tuple[Channel, socket.socket]) -> None:
    apart, runner, out = opened(link, Hasty, "doubled_when_seen")
    kept: list[torch.Tensor] = []

    def over() -> None:
        kept.append(out.clone())
        SEEN.set()

    SEEN.clear()
    apart.time(runner, "run", 5.0, 1000, over)
    assert torch.equal(out, 2 * GIVEN) and not kept[0].any()


@pytest.mark.parametrize(
    "answer",
    [
        {"died": "correct", "log": "", "fatal": False},
        {"device_s": "no number", "late": 0.0, "hidden": True, "queue_s": 0.0},
        {"device_s": [], "late": 0.0, "hidden": True, "queue_s": 0.0},
        {},
    ],
)
def test_an_answer_that_is_none_is_the_candidate_s_fault(
    link: tuple[Channel, socket.socket], answer: dict[str, Any]
) -> None:
    class Confused(FakeLauncher):
        def time(self, number: int, *arguments: Any, **named: Any) -> dict[str, Any]:
            right = super().time(number, *arguments, **named)
            return answer if number else right

    apart, runner, _ = opened(link, Confused)
    with pytest.raises(Died, match="answered nonsense") as died:
        apart.time(runner, "run", 5.0, 1000)
    assert died.value.fatal and died.value.outcome == "runtime"


@pytest.mark.parametrize("resources", [5, {"k": 5}, {"k": {"registers": 8}}])
def test_resources_that_are_none_are_the_candidate_s_fault(
    link: tuple[Channel, socket.socket], resources: Any
) -> None:
    class Confused(FakeLauncher):
        def resources(self, number: int) -> dict[str, Any]:
            return {"resources": resources}

    _, runner, _ = opened(link, Confused)
    with pytest.raises(Died, match="answered nonsense"):
        runner.resources()


@pytest.mark.parametrize("launcher", [Babbler, Dead])
def test_a_launcher_that_breaks_the_rules_is_the_candidate_s_fault(
    link: tuple[Channel, socket.socket], launcher: type[FakeLauncher]
) -> None:
    _, runner, _ = opened(link, launcher)
    with pytest.raises(Died, match="the process that launches kernels died") as died:
        runner.run()
    assert died.value.fatal and died.value.outcome == "runtime"


def test_one_that_dies_when_it_shall_go_is_the_candidate_s_fault(
    link: tuple[Channel, socket.socket],
) -> None:
    class Shy(FakeLauncher):
        def time(self, number: int, *arguments: Any, **named: Any) -> dict[str, Any]:
            if number:
                self._channel.sock.send(gpu_apart.READY)
                raise EOFError("as if killed")
            return super().time(number, *arguments, **named)

    _, runner, _ = opened(link, Shy)
    with pytest.raises(Died, match="the process that launches kernels") as died:
        for _ in range(2):
            runner.timed("run", 5.0, 1000)
    assert died.value.fatal and died.value.outcome == "runtime"


def test_a_launcher_that_says_nothing_hangs(link: tuple[Channel, socket.socket]) -> None:
    class Silent(FakeLauncher):
        def run(self, *_: Any, **__: Any) -> None:
            OVER.wait(300)

    OVER.clear()
    apart, runner, _ = opened(link, Silent)
    apart.patience = -9.9  # and ten seconds of grace
    with pytest.raises(Hung):
        runner.run()
    OVER.set()


def test_memory_that_is_not_the_same_elsewhere_is_not_lent(
    link: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = torch.zeros(4096)
    monkeypatch.setattr(FakeDriver, "open_shared", lambda self, handle: elsewhere.data_ptr())
    mine, theirs = link
    FakeLauncher(theirs)
    with pytest.raises(Unfit, match="is not the same there"):
        Apart(mine, FakeDriver(), CPU)  # type: ignore[arg-type]


def test_memory_that_cannot_be_opened_is_not_lent(
    link: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> int:
        raise CudaError("cuIpcOpenMemHandle", 801, "CUDA_ERROR_NOT_SUPPORTED")

    monkeypatch.setattr(FakeDriver, "open_shared", refused)
    mine, theirs = link
    FakeLauncher(theirs)
    with pytest.raises(Unfit, match="CUDA_ERROR_NOT_SUPPORTED"):
        Apart(mine, FakeDriver(), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shown", "seen"), [("", "1"), ("4,GPU-8a", "GPU-8a"), ("3", "1")])
def test_a_process_sees_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch, shown: str, seen: str) -> None:
    monkeypatch.setenv(cuda.VISIBLE, shown)
    cuda.show_only(1)
    assert cuda.os.environ[cuda.VISIBLE] == seen
