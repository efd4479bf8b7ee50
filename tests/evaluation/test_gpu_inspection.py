"""What is made of counters and of the sanitizer's findings, with tools that are none."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest

from ke_gym.evaluation import gpu_inspection
from ke_gym.evaluation.evaluation import Evaluation, Profile
from ke_gym.evaluation.gpu_inspection import Inspector
from ke_gym.evaluation.gpu_profile import counted, limiter_by_counters
from ke_gym.evaluation.gpu_replay import clipped, in_part
from ke_gym.evaluation.gpu_tools import ToolFailed, TooSlow
from ke_gym.evaluation.profile import feedback
from ke_gym.languages.plan import Geometry, Launch, TensorSpec
from ke_gym.testing.fake_gpu import one_launch

ARTIFACT = one_launch("k", TensorSpec((4,), (1,), "float32"))
JUDGED = Evaluation(
    "t", "cuda", "triton", "c", "correct", time_ms=1.0, reference_ms=2.0, speedup=2.0, speedup_ci=(1.9, 2.1),
    limiter="instructions",
)  # fmt: skip
COUNTERS = {"k": {"time_ns": 900.0, "dram": 80.0}, "l": {"time_ns": 100.0, "dram": 10.0, "dram_bytes": 5.0}}


@pytest.fixture
def inspector(monkeypatch: pytest.MonkeyPatch) -> Inspector:
    monkeypatch.setattr(gpu_inspection, "counters", lambda _: COUNTERS)
    monkeypatch.setattr(gpu_inspection, "sanitized", lambda _, check: "")
    return Inspector(lambda artifact: artifact, nullcontext, lambda: 99.0)  # type: ignore[arg-type, return-value]


def failing(words: str, kind: type[ToolFailed] = ToolFailed) -> Any:
    def fail(*_: Any) -> Any:
        raise kind(words)

    return fail


def test_a_winner_has_counters_and_what_they_say_limits_it(inspector: Inspector) -> None:
    final = inspector.final(JUDGED, ARTIFACT)
    assert dict(final.profile.counters) == {"time_ns": 1000.0, "dram": 73.0, "dram_bytes": 5.0}
    assert final.limiter == "dram" and final.correct and not final.log
    assert Evaluation.from_json(final.to_json()) == final
    assert "counters: DRAM 73 % of peak" in feedback(final)


def test_a_finding_refuses_the_winner_in_the_tool_s_words(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"memcheck": "", "racecheck": "compute-sanitizer (racecheck): Error: Race reported"}
    monkeypatch.setattr(gpu_inspection, "sanitized", lambda _, check: said[check])
    final = inspector.final(JUDGED, ARTIFACT)
    assert (final.outcome, final.log, final.speedup) == ("runtime", said["racecheck"], None)


def test_tools_that_are_not_there_are_named_and_refuse_nothing(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_inspection, "sanitized", failing("compute-sanitizer is not installed"))
    monkeypatch.setattr(gpu_inspection, "counters", failing("ERR_NVGPUCTRPERM"))
    final = inspector.final(JUDGED, ARTIFACT)
    assert final.correct and final.speedup == 2.0
    assert final.log.splitlines() == [
        "not looked at by memcheck: compute-sanitizer is not installed",
        "not looked at by racecheck: compute-sanitizer is not installed",
        "no counters: ERR_NVGPUCTRPERM",
    ]


def test_counting_takes_a_tenth_of_the_device_s_time_at_the_most(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inspector.glance(JUDGED, ARTIFACT) is JUDGED  # the search has had the device for less than 100 s
    monkeypatch.setattr(gpu_inspection, "COUNTING_S", 0.0)
    assert inspector.glance(JUDGED, ARTIFACT).limiter == "dram"


def test_who_was_refused_once_does_not_ask_again(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_inspection, "COUNTING_S", 0.0)
    monkeypatch.setattr(gpu_inspection, "COUNTING_SHARE", 1e9)
    monkeypatch.setattr(gpu_inspection, "counters", failing("more than 60 s", TooSlow))
    assert inspector.glance(JUDGED, ARTIFACT) is JUDGED  # that plan is too large, others may not be
    monkeypatch.setattr(gpu_inspection, "counters", lambda _: COUNTERS)
    assert inspector.glance(JUDGED, ARTIFACT).limiter == "dram"
    monkeypatch.setattr(gpu_inspection, "counters", failing("ERR_NVGPUCTRPERM"))
    assert inspector.glance(JUDGED, ARTIFACT) is JUDGED
    monkeypatch.setattr(gpu_inspection, "counters", lambda _: COUNTERS)
    assert inspector.glance(JUDGED, ARTIFACT) is JUDGED
    assert inspector.final(JUDGED, ARTIFACT).limiter == "dram"  # a winner is always tried


@pytest.mark.parametrize(
    ("seen", "guessed", "found"),
    [
        ({}, "dram", "dram"),
        ({"dram": 90.0, "issue": 40.0}, "instructions", "dram"),
        ({"dram": 85.0, "l2": 91.0}, "instructions", "dram"),
        ({"dram": 54.0, "l2": 83.0}, "instructions", "l2"),
        ({"dram": 40.0, "tensor": 75.0}, "instructions", "compute"),
        ({"l2": 70.0, "l1": 65.0}, "dram", "l2"),
        ({"issue": 80.0, "l1": 61.0}, "dram", "instructions"),
        ({"dram": 30.0, "warps": 12.0, "stall_memory": 9.0}, "instructions", "occupancy"),
        ({"dram": 30.0, "warps": 80.0, "stall_memory": 9.0}, "instructions", "instructions"),
        ({"dram": 90.0}, "launches", "launches"),
    ],
)
def test_the_unit_nearest_to_its_peak_is_the_limiter(
    seen: dict[str, float], guessed: str, found: str
) -> None:
    assert limiter_by_counters(Profile(counters=tuple(seen.items())), guessed) == found


def test_counters_of_no_kernel_are_none() -> None:
    assert counted({}) == ()


def test_what_takes_too_long_as_a_whole_is_looked_at_in_part_and_says_so(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Watched:
        blocks: int = 0

    def sanitized(watched: Watched, check: str) -> str:
        if check == "racecheck" and not watched.blocks:
            raise TooSlow("compute-sanitizer took more than 30 s")
        return findings if watched.blocks else ""

    findings = ""
    monkeypatch.setattr(inspector, "_replayed", lambda _: Watched())
    monkeypatch.setattr(gpu_inspection, "sanitized", sanitized)
    final = inspector.final(JUDGED, ARTIFACT)
    assert final.correct and "racecheck looked at 8 blocks of every launch, no more" in final.log
    findings = "compute-sanitizer (racecheck): Error: Race reported"
    assert inspector.final(JUDGED, ARTIFACT).outcome == "runtime"


@pytest.mark.parametrize(
    ("grid", "cluster", "part"),
    [
        ((8192, 1, 1), (1, 1, 1), (64, 1, 1)),
        ((16, 100, 3), (1, 1, 1), (16, 4, 1)),
        ((7, 1, 1), (1, 1, 1), (7, 1, 1)),
        ((30, 12, 2), (3, 4, 1), (30, 4, 1)),
    ],
)
def test_a_part_of_a_launch_is_whole_clusters(grid: Any, cluster: Any, part: Any) -> None:
    whole = Geometry(grid, (32, 1, 1), cluster=cluster)
    assert clipped(whole, 64).grid == part
    assert clipped(replace(whole, cooperative=True), 64).grid == grid


def test_a_part_of_a_plan_is_a_part_of_its_preparation_too() -> None:
    plan = ARTIFACT.plans["default"]
    launch = plan.steps[1]
    assert isinstance(launch, Launch)
    large = replace(plan, steps=(plan.steps[0], replace(launch, geometry=Geometry((99, 1, 1), (32, 1, 1)))))
    part = in_part(replace(large, preparation=large), 8)
    assert part.preparation is not None
    for one in (part, part.preparation):
        assert [step.geometry.grid for step in one.steps if isinstance(step, Launch) and step.geometry] == [
            (8, 1, 1)
        ]
