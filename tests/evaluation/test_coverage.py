"""What is timed of a plan without its kernels, whose memory then holds anything."""

from __future__ import annotations

import pytest

from ke_gym.evaluation.coverage import without_kernels
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Alloc, Arg, Call, Launch, Plan, PlanInput, Ref, Step, TensorSpec

SPEC = TensorSpec((4, 4), (4, 1), "float32")
KERNEL = Launch("b", "made", (Ref(0), Ref(1)), ("const float*", "float*"))


def call(target: str, *args: Arg, out: int = 2) -> Call:
    return Call(f"aten.{target}", args, {}, (out,))


def artifact(*steps: Step) -> Artifact:
    plan = Plan((PlanInput("input", "0", SPEC),), (Alloc(1, SPEC), *steps), (1,), (SPEC,))
    return Artifact("cpp", "plan", "", {"b": b""}, {"default": plan})


def test_a_plan_of_one_kind_needs_no_race() -> None:
    assert without_kernels(artifact(KERNEL), "default") == 1.0
    assert without_kernels(artifact(call("sin.default", Ref(0))), "default") == 0.0


@pytest.mark.parametrize(
    "calls",
    [
        [call("mm.default", Ref(0), Ref(1))],
        [call("div.Tensor", Ref(0), Ref(1))],
        [call("view.default", Ref(1), (16,)), call("sin.default", Ref(2), out=3)],
        [call("gather.default", Ref(0), 1, Ref(0))],  # of what no kernel made
    ],
)
def test_library_calls_are_left(calls: list[Call]) -> None:
    library = without_kernels(artifact(KERNEL, *calls), "default")
    assert isinstance(library, Artifact)
    assert library.plans["default"].steps == (Alloc(1, SPEC), *calls)


@pytest.mark.parametrize(
    "calls",
    [
        [call("gather.default", Ref(0), 1, Ref(1))],
        [call("_to_copy.default", Ref(1)), call("index_select.default", Ref(0), 0, Ref(2), out=3)],
        [call("bernoulli.default", Ref(1))],
        [call("floor_divide.default", Ref(0), Ref(1))],
        [call("index_put_.default", Ref(0), (Ref(1),), Ref(0))],
    ],
)
def test_calls_that_may_fail_on_whatever_lies_there_are_not_run(calls: list[Call]) -> None:
    assert without_kernels(artifact(KERNEL, *calls), "default") is None
    assert isinstance(without_kernels(artifact(*calls, KERNEL), "default"), Artifact)  # nothing of it yet
