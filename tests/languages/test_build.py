from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ke_gym import tasks
from ke_gym.errors import UserError
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError, BuildOptions, Signature, build, get_language
from ke_gym.languages.module import load
from ke_gym.languages.plan import Call, TensorSpec
from ke_gym.targets.executor import PlanRunner
from ke_gym.tasks.task import Task

TASK = """
import torch
import torch.nn as nn

ROWS = 5
shapes = {"small": {"ROWS": 3}}

class Model(nn.Module):
    def __init__(self, features, by):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.norm = nn.Sequential(nn.LayerNorm(features))
        self.by = by

    def forward(self, x):
        return torch.softmax(self.norm(self.linear(x)) * self.by, -1)

def get_inputs():
    return [torch.randn(ROWS, 8)]

def get_init_inputs():
    return [8, 2.0]
"""

KERNELS = """
import torch
from ke_gym import lang

kernels = lang.cpp(r'''
#include <ke/math.h>
extern "C" void rows(const float* x, float* out, int64_t r, int64_t n, float by) {
  for (int64_t i = 0; i < r; ++i) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += ke::exp(by * x[i * n + j]);
    for (int64_t j = 0; j < n; ++j) out[i * n + j] = ke::exp(by * x[i * n + j]) / sum;
  }
}
''', flags="-O2 -DUNUSED=1")
"""

FORWARD = (
    KERNELS
    + """
def forward(x, linear_weight, linear_bias, norm_0_weight, norm_0_bias):
    y = torch.nn.functional.linear(x, linear_weight, linear_bias)
    y = torch.nn.functional.layer_norm(y, y.shape[-1:], norm_0_weight, norm_0_bias)
    out = torch.empty_like(y)
    kernels.rows(y, out, *y.shape, 2)
    return out
"""
)

MODEL_NEW = (
    KERNELS
    + """
import torch.nn as nn

class ModelNew(nn.Module):
    def __init__(self, features, by):
        super().__init__()
        renamed = nn.Linear(features, features)
        self.weight, self.bias = renamed.weight, renamed.bias
        self.norm = nn.Sequential(nn.LayerNorm(features))
        self.by = by

    def forward(self, x):
        y = self.norm(torch.nn.functional.linear(x, self.weight, self.bias))
        out = torch.empty_like(y)
        kernels.rows(y, out, *y.shape, self.by)
        return out
"""
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("task") / "softmax_of_linear.py"
    path.write_text(TASK)
    return Task.load(path)


@pytest.fixture(scope="module")
def signature(task: Task) -> Signature:
    return Signature.from_bytes(Signature.of(task).to_bytes())


def _run(artifact: Artifact, task: Task, shape_set: str) -> None:
    artifact = Artifact.from_bytes(artifact.to_bytes())
    reference = task.reference(shape_set)
    reference.randomize(7)
    inputs = task.inputs(shape_set, seed=11)
    got = PlanRunner(artifact, shape_set, inputs, reference.state).run()
    torch.testing.assert_close(got, reference(*inputs))


def test_the_signature_knows_shapes_and_state_but_no_inputs(task: Task, signature: Signature) -> None:
    assert signature.shape_sets == ("default", "small")
    assert signature.inputs["small"] == (TensorSpec((3, 8), (8, 1), "float32"),)
    assert signature.outputs["default"] == (TensorSpec((5, 8), (8, 1), "float32"),)
    assert list(signature.state["default"]) == [
        "linear_weight",
        "linear_bias",
        "norm_0_weight",
        "norm_0_bias",
    ]
    assert signature.init_inputs["default"] == (8, 2.0)
    assert Signature.of(task, ["small"]).shape_sets == ("small",)


@pytest.mark.parametrize("source", [FORWARD, MODEL_NEW])
def test_builds_a_plan_per_shape_set_that_computes_the_task(
    task: Task, signature: Signature, source: str
) -> None:
    artifact = build(source, signature)
    assert (artifact.language, artifact.lane, artifact.general) == ("cpp", "plan", False)
    assert set(artifact.plans) == {"default", "small"}
    assert len(artifact.binaries) == 1
    for name in artifact.plans:
        _run(artifact, task, name)
    (unit,) = artifact.report["units"]
    assert unit["compiler"] == "g++"
    assert unit["flags"][-2:] == ["-O2", "-DUNUSED=1"]
    assert {r["kernel"] for r in artifact.report["vectorization"]} == {"rows"}


def test_the_state_that_a_model_holds_is_bound_by_name_or_contents(signature: Signature) -> None:
    plan = build(MODEL_NEW, signature).plans["default"]
    assert {(i.source, i.name) for i in plan.inputs} == {
        ("input", "0"),
        ("state", "linear_weight"),
        ("state", "linear_bias"),
        ("state", "norm_0_weight"),
        ("state", "norm_0_bias"),
    }


def test_data_dependent_python_goes_to_the_host_lane_with_its_reason(signature: Signature) -> None:
    artifact = build(
        FORWARD.replace("    return out", "    return out if out.sum() > 0 else -out"), signature
    )
    assert (artifact.lane, dict(artifact.plans)) == ("host", {})
    assert "depends on the contents of a tensor" in artifact.report["host_reason"]
    assert len(artifact.binaries) == 1
    assert Artifact.from_bytes(artifact.to_bytes()) == artifact


def test_general_is_claimed_by_the_module(signature: Signature) -> None:
    assert build(FORWARD + "\ngeneral = True\n", signature).general
    assert not build(FORWARD + "\ngeneral = 1\n", signature).general


@pytest.mark.parametrize(
    ("source", "outcome", "message"),
    [
        ("def forward(x:\n", "compile", "SyntaxError"),
        ("import nothing_of_that_name", "compile", "No module named"),
        ("raise SystemExit(3)", "compile", "SystemExit: 3"),
        ("x = 1", "constraints", "neither forward"),
        ("forward = 1", "constraints", "forward is not a function"),
        ("class ModelNew:\n    def __init__(self, *a): pass", "constraints", "not a torch.nn.Module"),
        ("def forward(): return 1", "constraints", "forward takes 0 arguments, the task has 1 inputs"),
        (
            "def forward(x, wight): return x",
            "constraints",
            "'wight', which is neither .*linear_weight, linear_bias",
        ),
        ("def forward(x): return x.softmax(-1), x + 1", "correctness", "returns 2 tensors, the reference 1"),
        ("def forward(x): return x.t() + 1", "correctness", r"output 0 is float32 \[8, 5\], .* \[5, 8\]"),
        (
            "def forward(x): return x.double()",
            "correctness",
            "output 0 is float64 .* the reference gives float32",
        ),
        (FORWARD.replace("float sum = 0;", ""), "compile", "'sum' was not declared"),
        (FORWARD.replace('flags="', 'flags="-fplugin=x '), "compile", "'-fplugin=x' is not accepted"),
        (FORWARD.replace("kernels.rows", "kernels.row"), "compile", "did you mean 'rows'"),
    ],
)
def test_what_cannot_be_built_says_why(signature: Signature, source: str, outcome: str, message: str) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        build(source, signature)
    assert caught.value.outcome == outcome


def test_tracebacks_show_the_module_alone(signature: Signature) -> None:
    source = "def forward(x):\n    return helper(x)\n\ndef helper(x):\n    return x @ x\n"
    with pytest.raises(BuildError) as caught:
        build(source, signature)
    log = caught.value.log
    assert "line 5, in helper\n    return x @ x" in log
    assert "fake_tensor.py" not in log
    assert len(log.splitlines()) <= 40
    with pytest.raises(BuildError) as caught:
        build("def forward(x):\n    return forward(x)\n", signature)
    assert len(caught.value.log.splitlines()) <= 40


def test_a_compiler_out_of_time_is_a_compile_error(signature: Signature) -> None:
    with pytest.raises(BuildError, match="took longer than"):
        build(FORWARD, signature, options=BuildOptions(seconds=0.001))


def test_unknown_languages_name_the_nearest() -> None:
    assert get_language("cpp").targets == ("cpu",)
    with pytest.raises(UserError, match="unknown language 'cp'; did you mean 'cpp'"):
        get_language("cp")


def test_modules_may_define_dataclasses() -> None:
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    source += "@dataclass\nclass A:\n    x: int\n"
    assert load(source).A(3).x == 3


def _one_per_family() -> list[Path]:
    """The built-in forwards that write no gradients, one of each family."""
    chosen: dict[str, Path] = {}
    for path in sorted((Path(tasks.__file__).parent / "library").glob("[a-z]*.py")):
        task = Task.load(path)
        if not task.backward:
            chosen.setdefault(task.family, path)
    return list(chosen.values())


@pytest.mark.parametrize("path", _one_per_family(), ids=lambda path: path.stem)
def test_the_reference_itself_is_a_kernel_module(path: Path) -> None:
    """A forward can be traced as it is, and its plan computes what it computes."""
    task = Task.load(path)
    chosen = min(task.public_shapes(), key=lambda name: _elements(task.inputs(name)))
    overridden = "".join(f"\n{name} = {value!r}" for name, value in task.shapes.get(chosen, {}).items())
    signature = Signature.of(task, [chosen])
    artifact = build(f"{task.source}{overridden}\nModelNew = Model\n", signature)
    assert artifact.lane == "plan", artifact.report
    assert all(isinstance(step, Call) for step in artifact.plans[chosen].steps)
    reference = task.reference(chosen)
    reference.randomize(1)
    inputs = task.inputs(chosen, seed=2)
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    got = PlanRunner(artifact, chosen, tensors, reference.state).run()
    torch.testing.assert_close(got, reference(*inputs), equal_nan=True)


def _elements(inputs: list[Any]) -> int:
    return sum(value.numel() for value in inputs if isinstance(value, torch.Tensor))
