"""Work spread over processes: each has its share, and one that dies or is late costs only its own job."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ke_gym.errors import UserError


@pytest.fixture
def lanes(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("lanes")


def job(what: str) -> Any:
    """Runs in a lane."""
    match what:
        case "die":
            os._exit(1)
        case "refuse":
            raise UserError("not this one")
        case "sleep":
            time.sleep(600)
    return what, os.environ["CUDA_VISIBLE_DEVICES"], sorted(os.sched_getaffinity(0)), os.getpid()


def test_every_lane_has_its_gpu_and_cores(lanes: Any) -> None:
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    shares = lanes.shares(["4", "7"], 2)
    assert [share.gpu for share in shares] == ["4", "7", "4", "7"]
    if half:
        assert list(shares[0].cores + shares[1].cores) == cores
    answers = [answer for _, answer, _ in lanes.spread(job, iter("abcd"), shares[:2])]
    assert sorted(answer[0] for answer in answers) == list("abcd")
    by_gpu = {share.gpu: sorted(share.cores) for share in shares}
    assert all(by_gpu[gpu] == own for _, gpu, own, _ in answers)
    assert len({pid for *_, pid in answers}) <= 2  # a lane goes on with the next job


def test_one_job_that_fails_costs_the_others_nothing(lanes: Any) -> None:
    ended = {
        name: (answer, error)
        for name, answer, error in lanes.spread(job, iter(["die", "refuse", "last"]), lanes.shares(["0"]))
    }
    assert isinstance(ended["die"][1], lanes.Lost)
    assert isinstance(ended["refuse"][1], UserError) and str(ended["refuse"][1]) == "not this one"
    assert ended["last"][0][0] == "last"


def test_what_is_late_is_ended_and_nothing_begins_any_more(
    lanes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    (only,) = lanes.spread(job, iter(["sleep", "never"]), lanes.shares(["0"]), until=4)
    assert only[0] == "sleep" and isinstance(only[2], lanes.Late)


def test_visible_gpus_keep_their_names(lanes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a")
    assert lanes.gpus() == ["3", "GPU-8a"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert lanes.gpus() == ["0", "1"]
    monkeypatch.setattr(lanes.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        lanes.gpus()


def test_the_host_lane_is_held_against_eager_itself(lanes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu

    judged: list[tuple[Any, float, bool]] = []

    @contextmanager
    def opened(task: Any, target: str, folder: Path) -> Iterator[Any]:
        evaluation, here_ms, ahead = judged.pop(0)
        yield SimpleNamespace(
            evaluate=lambda module: evaluation,
            build=lambda module: module,
            aa_race=lambda artifact: SimpleNamespace(median=lambda _: here_ms / 1e3),
            decide=lambda copy, module: SimpleNamespace(improved=ahead and copy != module),
        )

    def took(
        here_ms: float, by_events_ms: float, ahead: bool = False, **more: Any
    ) -> tuple[Any, float, bool]:
        known = {"correct": True, "improved": False, "trust": "host", "reference_ms": by_events_ms}
        return SimpleNamespace(**known | more), here_ms, ahead

    judged += [
        took(0.02, 0.004), took(0.13, 0.13), took(0.03, 0.036), took(0.2, 0.13), took(0.25, 0.25, improved=True),
        took(0.7, 0.7, trust="plan"), took(0.7, 0.7, ahead=True),
        (SimpleNamespace(correct=False, outcome="runtime", log="gone"), 0.0, False),
    ]  # fmt: skip
    calls = {str(number): ("x", 1, 1) for number in range(len(judged))}
    monkeypatch.setattr(gpu, "open_evaluator", opened)
    monkeypatch.setattr(gpu, "HOST_CALLS", calls)
    figures = list(gpu.host_lane("cuda"))
    assert [figure.reached for figure in figures] == [True, True] + [False] * 6
    assert figures[0].value == "20.0 us, 4.0 by events" and figures[7].value == "runtime: gone"
    assert "a gain over a copy" in figures[6].value


def test_throughput_of_several_gpus_is_held_against_one_s(
    lanes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu

    asked = []

    def run(self: Any, function: Any, numbers: range) -> tuple[float, bool, dict[str, float]]:
        asked.append((self.share.gpu, self.share.cores, numbers))
        gpus = len(self.share.gpu.split(","))
        return 100.0 * gpus, True, {"racing": 0.1, "starting processes": 0.3 * gpus, "tuning": 0.001}

    monkeypatch.setattr(lanes, "gpus", lambda: ["0", "1", "2"])
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: range(7))
    monkeypatch.setattr(lanes.Lane, "run", run)
    monkeypatch.setattr(gpu.contexts, "rate", lambda gpus, each: len(gpus) * each / 10)
    with gpu.console.capture() as told:
        one, fresh, two, _, three, _, verdicts = gpu.throughput("cuda", 8)
    assert (fresh.measure, fresh.value) == (
        "contexts made and ended a second, 1 GPU",
        "0.5, enough for 96 candidates a minute",
    )
    assert "2 GPUs, 4 cores: seconds a candidate: racing 0.10, starting processes 0.60\n" in told.get()
    assert one.value == "100" and verdicts.reached
    assert (three.measure, three.value) == ("candidates a minute, 3 GPUs, 6 cores", "300, 3.00 times one's")
    assert three.reached and two.value == "200, 2.00 times one's"
    # Nobody is judged twice: what is known is not built again.
    assert asked == [
        ("0", (0, 1), range(8)),
        ("0,1", (0, 1, 2, 3), range(8, 24)),
        ("0,1,2", (0, 1, 2, 3, 4, 5), range(24, 48)),
    ]
