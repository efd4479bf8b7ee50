from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ke_gym.languages import cpp
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Alloc, Call, Launch, Plan, PlanInput, Ref, Step, TensorSpec
from ke_gym.targets.executor import PlanError, PlanRunner, plan_memory

SOURCE = r"""
#include <cstdint>
extern "C" void affine(const float* x, float* out, float scale, double shift, int64_t n, bool negate) {
  for (int64_t i = 0; i < n; i++) out[i] = (negate ? -1.0f : 1.0f) * (x[i] * scale + float(shift));
}
extern "C" void is_null(const float* x, int64_t* out) { out[0] = x == nullptr; }
"""
TYPES = ("const float*", "float*", "float", "double", "int64_t", "bool")
SPEC = TensorSpec((4, 6), (6, 1), "float32")
TURNED = TensorSpec((6, 4), (1, 6), "float32")


@functools.cache
def binary() -> bytes:
    return cpp.compile_unit(cpp.Unit(SOURCE)).binary


def affine(source: int, out: int, scale: float = 2.0, shift: float = 0.0, negate: bool = False) -> Launch:
    return Launch("b", "affine", (Ref(source), Ref(out), scale, shift, 24, negate), TYPES)


def call(target: str, *args: Any, out: int) -> Call:
    return Call(f"aten.{target}", args, {}, (out,))


def artifact(steps: list[Step], returns: list[int], specs: list[TensorSpec] | None = None) -> Artifact:
    inputs = (PlanInput("input", "0", SPEC), PlanInput("state", "w", SPEC))
    plan = Plan(inputs, tuple(steps), tuple(returns), tuple(specs or [SPEC] * len(returns)))
    assert Plan.from_json(plan.to_json()) == plan
    return Artifact("cpp", "plan", SOURCE, {"b": binary()}, {"cpu": plan})


def tensors() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    return [torch.randn(4, 6)], {"w": torch.randn(4, 6)}


def test_scalars_arrive_as_their_c_types() -> None:
    runner = PlanRunner(artifact([Alloc(2, SPEC), affine(0, 2, 3.0, 1.5, True)], [2]), "cpu", *tensors())
    inputs, state = tensors()
    runner.bind(inputs, state)
    torch.testing.assert_close(runner.run()[0], -(3 * inputs[0] + 1.5))


def test_kernels_and_calls_feed_each_other() -> None:
    inputs, state = tensors()
    steps = [
        Alloc(2, SPEC),
        affine(0, 2),
        call("add.Tensor", Ref(2), Ref(1), out=3),
        call("mul.Tensor", Ref(3), Ref(3), out=4),
        Alloc(5, SPEC),
        affine(4, 5, 0.5),
        call("cat.default", (Ref(5), Ref(4)), out=6),
        call("sum.dim_IntList", Ref(6), (0,), out=7),
    ]
    runner = PlanRunner(artifact(steps, [7], [TensorSpec((6,), (1,), "float32")]), "cpu", inputs, state)
    for _ in range(3):
        square = (2 * inputs[0] + state["w"]) ** 2
        torch.testing.assert_close(runner.run()[0], torch.cat([square / 2, square]).sum(0))
        inputs[0].normal_()
    assert runner.step_names == ["affine", "aten.add.Tensor", "aten.mul.Tensor", "affine", "aten.cat.default",
                                 "aten.sum.dim_IntList"]  # fmt: skip
    times = runner.step_times()
    assert [name for name, _ in times] == runner.step_names and all(seconds >= 0 for _, seconds in times)


def test_outputs_are_fresh_unless_they_are_given() -> None:
    inputs, state = tensors()
    plan = artifact([Alloc(2, SPEC), affine(0, 2)], [2])
    runner = PlanRunner(plan, "cpu", inputs, state)
    first = runner.run()[0]
    kept = first.clone()
    inputs[0].normal_()
    second = runner.run()[0]
    assert torch.equal(first, kept) and not torch.equal(second, kept)
    given = [torch.empty(4, 6)]
    (out,) = PlanRunner(plan, "cpu", inputs, state, outputs=given).run()
    assert out.data_ptr() == given[0].data_ptr() and torch.equal(out, 2 * inputs[0])


@pytest.mark.parametrize("given", [False, True])
def test_outputs_share_memory_with_nothing(given: bool) -> None:
    inputs, state = tensors()
    steps: list[Step] = [
        Alloc(2, SPEC),
        affine(0, 2),
        call("t.default", Ref(2), out=3),
        call("neg.default", Ref(1), out=4),
        call("view.default", Ref(4), (4, 6), out=5),
        call("t.default", Ref(0), out=6),
    ]
    returns, specs = [2, 3, 2, 4, 5, 6, 0], [SPEC, TURNED, SPEC, SPEC, SPEC, TURNED, SPEC]
    outputs = [torch.empty_strided(s.shape, s.stride) for s in specs] if given else None
    runner = PlanRunner(artifact(steps, returns, specs), "cpu", inputs, state, outputs=outputs)
    x, w = inputs[0], state["w"]
    for _ in range(3):  # later runs write some of them in place
        results = runner.run()
        for got, want in zip(results, [2 * x, 2 * x.t(), 2 * x, -w, -w, x.t(), x], strict=True):
            assert torch.equal(got, want)
        pointers = {t.untyped_storage().data_ptr() for t in (*results, x, w)}
        assert len(pointers) == len(results) + 2
        x.normal_()
        w.normal_()


class Called(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


ROW = TensorSpec((6,), (1,), "float32")


@pytest.mark.parametrize(
    ("made", "spec", "written"),
    [
        (call("sin.default", Ref(0), out=2), SPEC, "aten.sin.out"),
        (call("mm.default", Ref(0), Ref(3), out=2), TensorSpec((4, 4), (4, 1), "float32"), "aten.mm.out"),
        (call("sum.dim_IntList", Ref(0), (0,), out=2), ROW, "aten.sum.IntList_out"),
        (call("mul.Tensor", Ref(0), Ref(1), out=2), SPEC, "aten.mul.out"),
        (call("rand_like.default", Ref(0), out=2), SPEC, None),  # draws as its reference does
        (call("t.default", Ref(0), out=2), TURNED, None),
    ],
)
def test_a_last_call_writes_its_output_in_place(made: Call, spec: TensorSpec, written: str | None) -> None:
    """A copy would count as the plan's time."""
    inputs, state = tensors()
    steps: list[Step] = [call("t.default", Ref(1), out=3), made]
    out = torch.empty_strided(spec.shape, spec.stride)
    runner = PlanRunner(artifact(steps, [2], [spec]), "cpu", inputs, state, outputs=[out])
    fresh = PlanRunner(artifact(steps, [2], [spec]), "cpu", inputs, state)
    runner.run()
    for _ in range(2):
        inputs[0].normal_()
        with Called() as seen:
            runner.run()
        assert (seen.names == [written]) if written else ("aten.copy_.default" in seen.names)
        if made.target != "aten.rand_like.default":
            torch.testing.assert_close(out, fresh.run()[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("reshape", "written"), [("view", True), ("_unsafe_view", True), ("t", True), ("slice", False)]
)
def test_so_does_one_behind_a_view(reshape: str, written: bool) -> None:
    """As a linear layer of three dimensions ends."""
    inputs, state = tensors()
    views: dict[str, tuple[Call, TensorSpec]] = {
        "view": (call("view.default", Ref(3), (2, 2, 4), out=4), TensorSpec((2, 2, 4), (8, 4, 1), "float32")),
        "_unsafe_view": (
            call("_unsafe_view.default", Ref(3), (16,), out=4),
            TensorSpec((16,), (1,), "float32"),
        ),
        "t": (call("t.default", Ref(3), out=4), TensorSpec((4, 4), (1, 4), "float32")),
        "slice": (call("slice.Tensor", Ref(3), 0, 0, 2, out=4), TensorSpec((2, 4), (4, 1), "float32")),
    }
    last, spec = views[reshape]
    steps: list[Step] = [
        call("t.default", Ref(1), out=2), call("mm.default", Ref(0), Ref(2), out=3), last,
    ]  # fmt: skip
    out = torch.empty_strided(spec.shape, spec.stride)
    runner = PlanRunner(artifact(steps, [4], [spec]), "cpu", inputs, state, outputs=[out])
    fresh = PlanRunner(artifact(steps, [4], [spec]), "cpu", inputs, state)
    runner.run()
    for _ in range(2):
        inputs[0].normal_()
        with Called() as seen:
            (got,) = runner.run()
        assert got is out and ("aten.copy_.default" not in seen.names) == written
        with Called() as seen:
            (got,) = fresh.run()
        assert "aten.copy_.default" not in seen.names  # whoever deploys it gets what the call made
        assert torch.equal(out, got)


def test_outputs_can_be_others_in_every_run() -> None:
    """As a GPU's are."""
    inputs, state = tensors()
    runner = PlanRunner(
        artifact([call("sin.default", Ref(0), out=2)], [2]), "cpu", inputs, state, outputs=[torch.empty(4, 6)]
    )
    for _ in range(3):
        runner._outputs = [torch.empty(4, 6)]
        (got,) = runner.run()
        assert got is runner._outputs[0] and torch.equal(got, torch.sin(inputs[0]))


def test_views_of_fixed_memory_cost_nothing_in_a_run() -> None:
    inputs, state = tensors()
    steps: list[Step] = [
        call("t.default", Ref(0), out=2),
        call("contiguous.default", Ref(2), out=3),
        Alloc(4, SPEC),
        affine(3, 4),
    ]
    runner = PlanRunner(artifact(steps, [4]), "cpu", inputs, state)
    assert runner.step_names == ["aten.contiguous.default", "affine"]
    assert torch.equal(runner.run()[0].view(6, 4), 2 * inputs[0].t())
    other, _ = tensors()
    runner.bind(other)
    assert torch.equal(runner.run()[0].view(6, 4), 2 * other[0].t())


def test_other_tensors_can_be_bound_to_kernels_only() -> None:
    runner = PlanRunner(artifact([Alloc(2, SPEC), affine(0, 2)], [2]), "cpu", *tensors())
    for _ in range(3):
        inputs, _ = tensors()
        runner.bind(inputs)
        assert torch.equal(runner.run()[0], 2 * inputs[0])


def test_parameters_need_no_gradient() -> None:
    inputs, _ = tensors()
    state = {"w": torch.nn.Parameter(torch.randn(4, 6))}
    (out,) = PlanRunner(
        artifact([call("add.Tensor", Ref(0), Ref(1), out=2)], [2]), "cpu", inputs, state
    ).run()
    assert not out.requires_grad


def test_a_missing_pointer_is_null() -> None:
    flag = TensorSpec((1,), (1,), "int64")
    launch = Launch("b", "is_null", (None, Ref(2)), ("const float*", "int64_t*"))
    (out,) = PlanRunner(artifact([Alloc(2, flag), launch], [2], [flag]), "cpu", *tensors()).run()
    assert out.tolist() == [1]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Launch("b", "nothing", (), ()), "has no kernel nothing"),
        (Launch("c", "affine", (), ()), "binary c, which is missing|is missing"),
        (Launch("b", "affine", (Ref(0),), ("float",)), "a tensor is passed where the kernel takes float"),
        (Launch("b", "affine", (1.5,), ("float*",)), "1.5 is passed where the kernel takes float"),
        (Launch("b", "affine", (1.5,), ("int64_t",)), "1.5 is passed where the kernel takes int64_t"),
        (Launch("b", "affine", (1,), ("struct s",)), "struct s are not supported"),
        (call("no_such_operator.default", Ref(0), out=3), "no operator"),
        (Call("os.system.default", (), {}, ()), "no ATen operator"),
    ],
)
def test_plans_that_cannot_run_are_refused(step: Step, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PlanRunner(artifact([Alloc(2, SPEC), step], [2]), "cpu", *tensors())


def test_inputs_must_be_what_the_plan_was_made_for() -> None:
    plan = artifact([Alloc(2, SPEC), affine(0, 2)], [2])
    for wrong in ([torch.randn(4, 7)], [torch.randn(6, 4).t()], [torch.randn(4, 6).double()], []):
        with pytest.raises(PlanError, match="input 0"):
            PlanRunner(plan, "cpu", wrong, {"w": torch.randn(4, 6)})
    with pytest.raises(PlanError, match="state w"):
        PlanRunner(plan, "cpu", [torch.randn(4, 6)], {})


def test_a_file_that_is_no_library_is_refused() -> None:
    broken = Artifact("cpp", "plan", "", {"b": b"nothing"}, artifact([Alloc(2, SPEC)], [2]).plans)
    with pytest.raises(PlanError, match="does not load"):
        PlanRunner(broken, "cpu", *tensors())


def chain(sources: list[int]) -> list[Step]:
    """Allocation ``i`` (value ``2 + i``) holds twice what one of the values before it holds."""
    steps: list[Step] = []
    for i, source in enumerate(sources):
        steps += [Alloc(2 + i, SPEC), affine(source % (2 + i), 2 + i)]
    return steps


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.booleans(), st.sampled_from([0, 64, 256]))
def test_living_intermediates_never_overlap(sources: list[int], reuse: bool, red_zone: int) -> None:
    inputs, state = tensors()
    made = artifact(chain(sources), [1 + len(sources)])
    memory = plan_memory(made.plans["cpu"], reuse=reuse, red_zone=red_zone)
    arena = torch.full((memory.size,), 0xA5, dtype=torch.uint8)
    (out,) = PlanRunner(made, "cpu", inputs, state, arena=arena, memory=memory).run()
    values = [inputs[0], state["w"]]
    for i, source in enumerate(sources):
        values.append(2 * values[source % (2 + i)])
    assert torch.equal(out, values[-1])
    if not reuse:
        ends = [(o, o + n) for o, n in sorted(memory.used)]
        assert all(b[0] - a[1] >= red_zone for a, b in zip(ends, ends[1:], strict=False))
        untouched = torch.ones(memory.size, dtype=torch.bool)
        for start, end in ends:
            untouched[start:end] = False
        assert bool((arena[untouched] == 0xA5).all())


def test_memory_is_reused() -> None:
    made = artifact(chain([0, 2, 3, 4, 5, 6]), [7])
    assert plan_memory(made.plans["cpu"]).size < 3 * 128
    assert plan_memory(made.plans["cpu"], reuse=False).size >= 5 * 96


@pytest.mark.parametrize("target", ["as_strided.default", "as_strided_copy.default"])
@pytest.mark.parametrize("made", [False, True])
def test_as_strided_counts_from_its_operand_wherever_that_lies(target: str, made: bool) -> None:
    """In a plan a tensor has its storage to itself; an executor puts many into one."""
    steps: list[Step] = [Alloc(2, SPEC), affine(0, 2, 1.0), Alloc(3, SPEC), affine(2, 3, 1.0)]
    operand = Ref(3 if made else 0)
    turned = call(target, operand, (4, 5), (1, 4), 3, out=4)
    steps += [turned, call("mul.Tensor", Ref(4), 2.0, out=5)]
    pool = torch.randn(100)
    x = pool[40:64].view(4, 6)
    spec = TensorSpec((4, 5), (1, 4) if target == "as_strided.default" else (5, 1), "float32")
    runner = PlanRunner(artifact(steps, [5], [spec]), "cpu", [x], tensors()[1])
    torch.testing.assert_close(runner.run()[0], 2 * x.clone().as_strided((4, 5), (1, 4), 3))


@pytest.mark.parametrize(
    "layout", [((24,), (2,), 0), ((24,), (1,), 1), ((30,), (1,), 0), ((5, 5), (6, 1), 0)]
)
def test_as_strided_stays_in_the_memory_of_its_operand(layout: tuple[Any, ...]) -> None:
    steps: list[Step] = [
        call("as_strided.default", Ref(0), *layout, out=2),
        call("sum.default", Ref(2), out=3),
    ]
    x = torch.randn(200)[40:64].view(4, 6)
    with pytest.raises(PlanError, match="beyond its operand's memory"):
        PlanRunner(artifact(steps, [3], [TensorSpec((), (), "float32")]), "cpu", [x], tensors()[1])
