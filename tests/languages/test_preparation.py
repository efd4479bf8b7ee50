"""``prepare``: what depends on weights alone, done once, and never anything that depends on inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from ke_gym.deploy import Kernel
from ke_gym.evaluation.admission import admit
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError, BuildOptions, Signature, build
from ke_gym.languages.plan import Call, Plan, PlanInput, Ref, TensorSpec
from ke_gym.targets.executor import PlanError, PlanRunner
from ke_gym.tasks.task import Task

TASK = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x):
        return torch.relu(self.linear(x))

def get_inputs():
    return [torch.randn(5, 8)]
"""
FORWARD = """
import torch

def prepare(linear_weight, linear_bias):
    return {"packed": linear_weight.t().contiguous(), "shift": 2 * linear_bias}

def forward(x, packed, shift):
    return torch.relu(x @ packed + shift / 2)
"""
MODEL_NEW = """
import torch
import torch.nn as nn

class ModelNew(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def prepare(self):
        return {"packed": self.linear.weight.t().contiguous()}

    def forward(self, x, packed):
        return torch.relu(x @ packed + self.linear.bias)
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    file = tmp_path_factory.mktemp("task") / "linear.py"
    file.write_text(TASK)
    return Task.load(file)


def _built(task: Task, source: str) -> Artifact:
    return build(source, Signature.of(task, ["default"]), "cpp", BuildOptions())


@pytest.mark.parametrize("source", (FORWARD, MODEL_NEW), ids=("forward", "ModelNew"))
def test_weights_are_prepared_apart_and_anew(task: Task, source: str) -> None:
    artifact = Artifact.from_bytes(_built(task, source).to_bytes())
    plan = artifact.plans["default"]
    assert plan.preparation is not None
    assert {entry.source for entry in plan.preparation.inputs} == {"state"}
    assert not any(isinstance(step, Call) and step.target == "aten.clone.default" for step in plan.steps)
    reference, (x,) = task.reference("default"), task.inputs("default", 3)
    runner = PlanRunner(artifact, "default", [x], reference.state)
    with pytest.raises(PlanError, match="preparation"):
        runner.run()
    runner.prepare()
    torch.testing.assert_close(runner.run()[0], reference(x)[0])
    with torch.no_grad():
        reference.state["linear_weight"].mul_(3)
    stale = runner.run()[0].clone()
    runner.prepare()
    torch.testing.assert_close(runner.run()[0], reference(x)[0])
    assert not torch.allclose(stale, reference(x)[0])


def test_state_elsewhere_has_to_be_prepared_anew(task: Task) -> None:
    artifact, reference, (x,) = _built(task, FORWARD), task.reference("default"), task.inputs("default", 3)
    runner = PlanRunner(artifact, "default", [x], reference.state)
    runner.prepare()
    runner.bind([x], {name: tensor.detach() for name, tensor in reference.state.items()})
    runner.run()
    runner.bind([x], {name: tensor.clone() for name, tensor in reference.state.items()})
    with pytest.raises(PlanError, match="preparation"):
        runner.run()


def test_a_deployed_kernel_follows_its_weights(task: Task) -> None:
    reference = task.reference("default")
    kernel = Kernel(task, reference, _built(task, FORWARD))
    (x,) = task.inputs("default", 3)
    with torch.no_grad():
        for change in (lambda w: None, lambda w: w.mul_(2), lambda w: setattr(w, "data", w.data + 1)):
            change(reference.module.linear.weight)
            torch.testing.assert_close(kernel(x), reference.module(x))
        reference.module.linear.weight.data.mul_(2)
        kernel.forget()
        torch.testing.assert_close(kernel(x), reference.module(x))
    assert not kernel.fallbacks


@pytest.mark.parametrize(
    ("prepare", "message"),
    (
        ("def prepare(x):\n    return {'packed': x}", "depends on inputs"),
        ("def prepare(linear_weight, x=None):\n    return {'packed': linear_weight}", "depends on inputs"),
        ("def prepare(linear_weight):\n    return linear_weight", "a dict of tensors"),
        ("def prepare(linear_weight):\n    return {'packed': 3}", "no tensor"),
        ("def prepare(linear_weight):\n    return {'packed': linear_weight, 'other': linear_weight}", "does not take"),
        ("def prepare(linear_weight):\n    return {'packed': linear_weight[:, :1].expand(6, 8)}", "dense"),
        ("def prepare(linear_weight):\n    linear_weight.mul_(2)\n    return {'packed': linear_weight}", "read-only"),
        ("def prepare(linear_weight):\n    return {'packed': torch.rand_like(linear_weight)}", "random"),
        ("def prepare(linear_weight):\n    linear_weight.sum().item()\n    return {}", "cannot be traced"),
        ("def prepare(linear_weight):\n    return {'linear_bias': linear_weight}", "name in the state"),
        ("prepare = 3", "not a function"),
    ),
)  # fmt: skip
def test_what_prepare_must_not_do(task: Task, prepare: str, message: str) -> None:
    body = "def forward(x, packed, linear_bias):\n    return torch.relu(x @ packed.t() + linear_bias)"
    with pytest.raises((BuildError, ValueError), match=message):
        Artifact.from_bytes(_built(task, f"import torch\n\n{prepare}\n\n{body}\n").to_bytes())


def test_what_is_prepared_is_not_written_to(task: Task) -> None:
    source = FORWARD.replace("    return torch.relu", "    packed[0].mul_(x[0, 0])\n    return torch.relu")
    with pytest.raises(BuildError, match="read-only"):
        _built(task, source)


def test_a_plan_that_prepares_an_input_is_no_plan(task: Task) -> None:
    artifact = _built(task, FORWARD)
    plan = artifact.plans["default"]
    assert plan.preparation is not None
    x = plan.inputs[0]
    forged: list[tuple[Plan, str]] = [
        (_with(plan, inputs=(x, *plan.preparation.inputs[1:])), "state and constants"),
        (_with(plan, inputs=(replace(x, source="prepared"), *plan.preparation.inputs[1:])), "no preparation"),
        (_with(plan, preparation=plan.preparation), "plain plan"),
        (_with(plan, returns=(), return_specs=()), "no such tensor"),
        (replace(plan, preparation=None), "no preparation"),
    ]
    for wrong, message in forged:
        with pytest.raises(ValueError, match=message):
            Plan.from_json(wrong.to_json())
    assert Plan.from_json(plan.to_json()) == plan
    assert "preparation" not in json.loads(replace(plan, preparation=None).to_json())


def _with(plan: Plan, **changes: Any) -> Plan:
    assert plan.preparation is not None
    return replace(plan, preparation=replace(plan.preparation, **changes))


def test_nothing_is_prepared_where_weights_change_in_every_call(task: Task) -> None:
    artifact = _built(task, FORWARD)
    spec = artifact.plans["default"].return_specs[0]
    shapes = {"default": ([spec], [spec])}
    admit(artifact, FORWARD, "cpp", shapes)
    with pytest.raises(BuildError, match="gradients"):
        admit(artifact, FORWARD, "cpp", shapes, training=True)


def test_random_numbers_are_not_prepared() -> None:
    spec = TensorSpec((4,), (1,), "float32")
    made = Plan(
        (PlanInput("state", "w", spec),),
        (Call("aten.rand_like.default", (Ref(0),), {}, (1,)),),
        (1,),
        (spec,),
    )
    plan = Plan((PlanInput("prepared", "0", spec),), (), (0,), (spec,), preparation=made)
    with pytest.raises(ValueError, match="random"):
        Artifact.from_bytes(Artifact("cpp", "plan", "", {}, {"default": plan}).to_bytes())
