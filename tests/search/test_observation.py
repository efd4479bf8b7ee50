from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.evaluation.evaluation import OUTCOMES, Profile
from ke_gym.evaluation.work import Work
from ke_gym.languages.plan import TensorSpec
from ke_gym.search import observation as o
from ke_gym.strategies import STRATEGIES
from ke_gym.targets.cpu import Facts, Peaks
from ke_gym.tasks import Task
from tests.search.fakes import evaluation, kernel

FACTS = Facts("m", "x86_64", 8, 32 << 10, 1 << 20, 32 << 20, 512, False)
PEAKS = Peaks(8, ((1 << 18, 1e12), (1 << 29, 1e11)), 1e12, 5e11)
SPEC = TensorSpec((64, 64), (64, 1), "float32")
numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)
counts = st.integers(0, 10_000)


def bounded(values: np.ndarray, size: int) -> None:
    assert values.shape[-1] == size and values.dtype == np.float32
    assert np.isfinite(values).all() and (np.abs(values) <= 1).all()


@st.composite
def counters(draw: st.DrawFn) -> o.SearchCounters:
    names = [field.name for field in dataclasses.fields(o.SearchCounters)]
    arrays = {"tries", "gain_sums", "gain_counts", "failures"}
    values: dict[str, object] = {name: draw(counts) for name in names if name not in arrays}
    for name in ("budget_left", "log_best", "parent_gap"):
        values[name] = draw(numbers)
    for name in sorted(arrays):
        values[name] = np.array(draw(st.lists(counts, min_size=22, max_size=22)))
    return o.SearchCounters(**values)  # type: ignore[arg-type]


def test_the_layout_is_what_policies_were_trained_on() -> None:
    assert o.LAYOUT == {
        "task": 16, "hardware": 12, "code": 14, "profile": 12, "history": 12, "strategies": 66
    }  # fmt: skip
    assert o.SPACES_VERSION == 1


@settings(max_examples=60, deadline=None)
@given(counters(), st.text(max_size=400), st.sampled_from(["cpp", "triton"]), st.floats(1e-9, 1e9), numbers)
def test_every_part_has_its_shape_and_stays_within_bounds(
    counters: o.SearchCounters, source: str, language: str, time_ms: float, share: float
) -> None:
    judged = evaluation(kernel((1,), None, STRATEGIES[0]), 2.0).replace(
        time_ms=time_ms,
        times_ms=(time_ms, 2 * time_ms),
        profile=Profile(bandwidth_share=share, floor_ms=share),
    )
    surroundings = o.Surroundings(
        o.task_features(Task.load("softmax"), Work(1e9, 1e12, 1e12, 10.0), [SPEC], 3),
        o.hardware_features(FACTS, PEAKS, "cpu"),
    )
    seen = o.observe(
        surroundings, o.code_features(source, language, source[::-1]), o.profile_features(judged), counters
    )
    assert {name: len(values) for name, values in seen.items()} == o.LAYOUT and list(seen) == list(o.LAYOUT)
    for name, size in o.LAYOUT.items():
        bounded(seen[name], size)
    bounded(o.flatten(seen), 132)


@settings(max_examples=20, deadline=None)
@given(st.lists(counters(), min_size=2, max_size=4))
def test_many_searches_side_by_side_are_described_as_each_alone(searches: list[o.SearchCounters]) -> None:
    fields = dataclasses.fields(o.SearchCounters)
    batch = o.SearchCounters(*(np.stack([getattr(s, f.name) for s in searches]) for f in fields))
    np.testing.assert_array_equal(o.history_features(batch), [o.history_features(s) for s in searches])
    np.testing.assert_array_equal(o.strategy_features(batch), [o.strategy_features(s) for s in searches])


def test_hardware_and_task_are_told_apart_by_their_names() -> None:
    hardware = dict(zip(o.HARDWARE, o.hardware_features(FACTS, PEAKS, "cpu"), strict=True))
    assert hardware["cpu"] == 1 and hardware["cuda"] == 0
    assert hardware["log_peak_flops"] == np.float32(np.log10(1 + 1e12) / 15)
    work = Work(1e6, 1e9, 1e9, 1.0)
    task = dict(zip(o.TASK, o.task_features(Task.load("softmax"), work, [SPEC]), strict=True))
    assert task["norm"] == 1 and task["float32"] == 1 and task["half"] == 0
    own = dataclasses.replace(Task.load("softmax"), family="user")
    assert not o.task_features(own, work, [SPEC])[:8].any()


def test_code_features_see_loops_pragmas_and_distance() -> None:
    source = (
        "for (int i = 0; i < n; ++i) {\n  #pragma omp simd\n  for (int j = 0; j < n; ++j) {\n"
        "    y[i] += x[j]; // y[i] = 3 in a comment\n  }\n}\n"
    )
    code = dict(zip(o.CODE, o.code_features(source, "cpp", source), strict=True))
    assert code["loop_depth"] == np.float32(2 / 6) and code["vector"] == 1 and code["unroll"] == 0
    assert code["stores"] == np.float32(np.log1p(1) / 5) and code["distance_to_root"] == 0
    assert dict(zip(o.CODE, o.code_features(source, "cpp", "other")))["distance_to_root"] == 1
    floor_division = o.code_features("n = a // b * tl.load(x)", "triton")
    assert dict(zip(o.CODE, floor_division))["loads"] > 0


def test_a_failure_has_no_profile_and_names_its_outcome_in_the_history() -> None:
    failed = evaluation(kernel((1,), None, STRATEGIES[0]), None, "timeout")
    assert not o.profile_features(failed).any() and not o.profile_features(None).any()
    assert OUTCOMES[-1] == "timeout"
