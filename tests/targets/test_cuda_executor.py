from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import (
    Alloc,
    Call,
    Geometry,
    Launch,
    Plan,
    PlanInput,
    Ref,
    Scratch,
    TensorMap,
    TensorSpec,
)  # fmt: skip
from ke_gym.targets._memory import PlanError
from ke_gym.targets.cuda_executor import ALIGNMENT, CudaRunner
from ke_gym.testing.fake_gpu import FakeDriver, floats, integer, kernel, one_launch, pointer

CPU = torch.device("cpu")
SPEC = TensorSpec((4, 8), (8, 1), "float32")
SEEN: list[int] = []


@kernel
def double(x: int, out: int, n: int) -> None:
    floats(out, integer(n)).copy_(2 * floats(x, integer(n)))


@kernel
def triple(x: int, out: int, n: int) -> None:
    floats(out, integer(n)).copy_(3 * floats(x, integer(n)))


@kernel
def through_scratch(x: int, first: int, second: int, out: int) -> None:
    SEEN[:] = [pointer(first), pointer(second)]
    floats(second, 32).copy_(floats(x, 32))
    floats(out, 32).copy_(floats(second, 32) + 1)


@kernel
def reads_map(described: int, out: int) -> None:
    floats(out, 32).fill_(ctypes.c_uint8.from_address(described).value)


def runner(
    artifact: Artifact, x: torch.Tensor, driver: FakeDriver | None = None, **options: object
) -> CudaRunner:
    return CudaRunner(
        artifact,
        "default",
        [x],
        {},
        driver=driver or FakeDriver(),
        device=CPU,
        **{"stream": 7, **options},  # type: ignore[arg-type]
    )


def test_a_plan_is_launched_with_its_geometry_on_its_stream() -> None:
    driver = FakeDriver()
    x = torch.randn(4, 8)
    (out,) = runner(one_launch("double", SPEC), x, driver).run()
    assert torch.equal(out, 2 * x)
    assert driver.launches == [("double", Geometry((1, 1, 1), (32, 1, 1)), 7)]


def test_every_run_returns_fresh_memory_and_new_inputs_are_read() -> None:
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    one = runner(one_launch("double", SPEC), x)
    (first,) = one.run()
    one.bind([y])
    (second,) = one.run()
    assert torch.equal(first, 2 * x) and torch.equal(second, 2 * y)


def test_placed_outputs_get_the_results() -> None:
    one = runner(one_launch("double", SPEC), torch.zeros(4, 8), outputs=[torch.zeros(4, 8)])
    for _ in range(2):
        x, out = torch.randn(4, 8), torch.zeros(4, 8)
        one.place([x], {}, [out])
        assert one.run()[0].data_ptr() == out.data_ptr()
        assert torch.equal(out, 2 * x)


def test_library_calls_and_kernels_mix_and_follow_their_tensors() -> None:
    plan = one_launch("double", SPEC).plans["default"]
    add = Call("aten.add.Tensor", (Ref(1), Ref(0)), {}, (2,))
    made = replace(plan, steps=(*plan.steps, add), returns=(2,))
    mixed = replace(one_launch("double", SPEC), plans={"default": made})
    one = runner(mixed, torch.zeros(4, 8), outputs=[torch.zeros(4, 8)])
    x, out = torch.randn(4, 8), torch.zeros(4, 8)
    one.place([x], {}, [out])
    one.run()
    assert torch.equal(out, 3 * x)
    assert one.step_names == ["double", "aten.add.Tensor"]


def test_devices_in_a_plan_mean_this_one() -> None:
    full = Call("aten.full.default", ((4, 8), 3.0), {"device": torch.device("cuda", 3)}, (1,))
    plan = Plan((PlanInput("input", "0", SPEC),), (full,), (1,), (SPEC,), "cuda")
    (out,) = runner(Artifact("cuda", "plan", "", {}, {"default": plan}), torch.zeros(4, 8)).run()
    assert torch.equal(out, torch.full((4, 8), 3.0))


def test_scratch_is_apart_and_aligned() -> None:
    args = (Ref(0), Scratch(100), Scratch(128), Ref(1))
    launch = Launch(
        "k", "through_scratch", args, ("float*", "void*", "void*", "float*"), Geometry((1, 1, 1), (32, 1, 1))
    )
    plan = Plan((PlanInput("input", "0", SPEC),), (Alloc(1, SPEC), launch), (1,), (SPEC,), "cuda")
    x = torch.randn(4, 8)
    (out,) = runner(Artifact("cuda", "plan", "", {"k": b"k"}, {"default": plan}), x).run()
    assert torch.equal(out, x + 1)
    assert SEEN[1] - SEEN[0] == ALIGNMENT


def test_a_tensor_map_follows_its_tensor() -> None:
    driver = FakeDriver()
    described = TensorMap(0, (4, 8), (8, 1), "float32", (2, 8))
    launch = Launch(
        "k", "reads_map", (described, Ref(1)), ("CUtensorMap", "float*"), Geometry((1, 1, 1), (32, 1, 1))
    )
    plan = Plan((PlanInput("input", "0", SPEC),), (Alloc(1, SPEC), launch), (1,), (SPEC,), "cuda")
    x, y = torch.zeros(4, 8), torch.zeros(4, 8)
    one = runner(Artifact("cuda", "plan", "", {"k": b"k"}, {"default": plan}), x, driver)
    assert one.run()[0][0, 0] == 1
    assert one.run()[0][0, 0] == 1  # made once
    one.bind([y])
    assert one.run()[0][0, 0] == 2
    assert driver.maps == [(x.data_ptr(), (4, 8)), (y.data_ptr(), (4, 8))]


def test_intermediates_are_aligned_for_a_gpu() -> None:
    plan = one_launch("double", SPEC).plans["default"]
    again = Launch(
        "k", "double", (Ref(1), Ref(2), 32), ("float*", "float*", "int64_t"), Geometry((1, 1, 1), (32, 1, 1))
    )
    third = replace(again, args=(Ref(2), Ref(3), 32))
    steps = (*plan.steps, Alloc(2, SPEC), again, Alloc(3, SPEC), third)
    chain = replace(one_launch("double", SPEC), plans={"default": replace(plan, steps=steps, returns=(3,))})
    x = torch.randn(4, 8)
    one = runner(chain, x)
    assert all(offset % ALIGNMENT == 0 for offset in one._memory.offsets.values())
    assert torch.equal(one.run()[0], 8 * x)


def test_the_chosen_alternative_is_the_one_launched() -> None:
    base = one_launch("double", SPEC)
    launch = base.plans["default"].steps[1]
    assert isinstance(launch, Launch)
    made = one_launch("double", SPEC, alternatives=(replace(launch, kernel="triple"),))
    x = torch.randn(4, 8)
    chosen = replace(made, plans={"default": made.plans["default"].choose({1: 1})})
    assert torch.equal(runner(chosen, x).run()[0], 3 * x)


def two_launches(**options: object) -> Artifact:
    """``out = 2 * 3 * x`` in two launches."""
    base = one_launch("double", SPEC)
    plan = base.plans["default"]
    again = Launch(
        "k", "triple", (Ref(1), Ref(2), 32), ("float*", "float*", "int64_t"), Geometry((1, 1, 1), (32, 1, 1))
    )
    steps = (*plan.steps, Alloc(2, SPEC), again)
    made = replace(plan, steps=steps, returns=(2,), **options)  # type: ignore[arg-type]
    return replace(base, plans={"default": made})


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class Stream:
    """One of torch's, as far as a runner needs it."""

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waited_for = number, []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other.cuda_stream)


@pytest.mark.parametrize("graph", [False, True])
def test_without_a_stream_of_its_own_a_plan_goes_on_torch_s_current_one(
    monkeypatch: pytest.MonkeyPatch, no_capture: None, graph: bool
) -> None:
    """Whichever that is in the call: what ATen enqueues goes there too."""
    streams = [Stream(number) for number in (11, 22)]
    now = [streams[0]]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: now[0])
    driver, x = FakeDriver(), torch.randn(4, 8)
    one = runner(two_launches(graph=graph), x, driver, stream=None, outputs=[torch.zeros(4, 8)])
    seen = []
    for now[0] in (streams[0], streams[1], streams[1], streams[0]):
        driver.launches.clear()
        one.run()
        seen.append({stream for *_, stream in driver.launches})
    assert seen == [{11}, {22}, {22}, {11}]
    assert [stream.waited_for for stream in streams] == [[22], [11]]  # intermediates lie in the same memory
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    now[0] = streams[1]
    one.run()  # into somebody's graph: the launches themselves, and nothing from outside of it
    assert {stream for *_, stream in driver.launches[-2:]} == {22} and streams[1].waited_for == [11]


def test_what_cannot_be_run_leaves_nothing_loaded() -> None:
    driver = FakeDriver()
    whole = one_launch("double", SPEC)
    launch = replace(
        whole.plans["default"].steps[1], geometry=Geometry((1, 1, 1), (32, 1, 1), shared=1 << 30)
    )
    plan = replace(whole.plans["default"], steps=(whole.plans["default"].steps[0], launch))
    with pytest.raises(PlanError, match="cannot be launched here"):
        runner(replace(whole, plans={"default": plan}), torch.randn(4, 8), driver)
    assert driver.modules and not any(driver.modules.values())


def test_a_plan_goes_as_one_graph_that_follows_its_tensors(no_capture: None) -> None:
    driver = FakeDriver()
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    out, other = torch.zeros(4, 8), torch.zeros(4, 8)
    one = runner(two_launches(graph=True), x, driver, outputs=[out])
    for _ in range(2):
        one.run()
        assert torch.equal(out, 3 * (2 * x))
    assert driver.graphs == ["instantiated", "launched on 7", "launched on 7"]
    one.place([y], {}, [other])
    one.run()
    assert torch.equal(other, 3 * (2 * y)) and torch.equal(out, 3 * (2 * x))
    assert driver.graphs[3:] == ["updated", "launched on 7"]
    assert {stream for *_, stream in driver.launches} == {7}
    one.close()
    assert driver.graphs[5:] == ["dropped", "stream dropped"]


def test_a_graph_returns_fresh_memory_too(no_capture: None) -> None:
    x = torch.randn(4, 8)
    one = runner(two_launches(graph=True), x)
    (first,), (second,) = one.run(), one.run()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, 3 * (2 * x)) and torch.equal(second, first)


def test_only_several_launches_and_nothing_else_go_as_a_graph() -> None:
    assert runner(two_launches(), torch.zeros(4, 8)).capturable
    assert not runner(one_launch("double", SPEC), torch.zeros(4, 8)).capturable
    made = two_launches(graph=True)
    plan = made.plans["default"]
    add = Call("aten.add.Tensor", (Ref(2), Ref(0)), {}, (3,))
    mixed = replace(made, plans={"default": replace(plan, steps=(*plan.steps, add), returns=(3,))})
    with pytest.raises(PlanError, match="not all of its steps are launches"):
        runner(mixed, torch.zeros(4, 8))


def test_a_plan_says_that_it_goes_as_a_graph() -> None:
    plan = two_launches(graph=True).plans["default"]
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="graph"):
        Plan.from_json(plan.to_json().replace('"cuda"', '"cpu"').replace('"geometry"', '"g"'))


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda a: replace(a, binaries={"k": b"broken"}), r"refuses the binary.*another architecture.*--arch"),
        (lambda a: replace(a, binaries={"k": b"newer"}), "refuses the binary.*update the driver"),
        (lambda a: replace(a, binaries={}), "missing"),
        (lambda a: _launching(a, kernel="nothing"), "NOT_FOUND"),
        (lambda a: _launching(a, geometry=Geometry((1, 1, 1), (32, 1, 1), shared=1 << 17)), "INVALID_VALUE"),
        (lambda a: replace(a, plans={"default": replace(a.plans["default"], device="cpu")}), "made for a CPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_says_why(broken: object, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        runner(broken(one_launch("double", SPEC)), torch.zeros(4, 8)).run()  # type: ignore[operator]


def test_closing_unloads_the_kernels() -> None:
    driver = FakeDriver()
    one = runner(one_launch("double", SPEC), torch.zeros(4, 8), driver)
    one.close()
    assert list(driver.modules.values()) == [b""]


def test_resources_are_told_per_kernel() -> None:
    found = runner(one_launch("double", SPEC), torch.zeros(4, 8)).resources()
    assert found["double"]["threads"] == 32 and found["double"]["blocks"] == 2


def _launching(artifact: Artifact, **changes: object) -> Artifact:
    plan = artifact.plans["default"]
    launch = replace(plan.steps[1], **changes)  # type: ignore[arg-type]
    return replace(artifact, plans={"default": replace(plan, steps=(plan.steps[0], launch))})
