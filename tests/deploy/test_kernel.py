from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ke_gym.candidate import Candidate
from ke_gym.deploy import Kernel
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.languages.artifact import Artifact
from ke_gym.tasks import Reference, Task

# Adds 1000 to what the reference computes, so that a call shows which of the two ran.
SOURCE = '''
import torch
from ke_gym import lang

kernels = lang.cpp(r"""
#include <cstdint>
extern "C" void scale(const float* x, const float* weight, float* out, int64_t n, int64_t m) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) out[i * m + j] = x[i * m + j] * weight[j] + 1000.0f;
}
""")


def forward(x, weight):
    out = torch.empty_like(x)
    kernels.scale(x, weight, out, *x.shape)
    return {"scaled": out}
'''


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 9.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scaled": x * self.weight}


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.from_module(Scale().eval(), [torch.randn(4, 8)])


@pytest.fixture(scope="module")
def artifact(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    with Evaluator(task, folder=tmp_path_factory.mktemp("home")) as evaluator:
        yield evaluator.build(Candidate(SOURCE))


@pytest.fixture
def module() -> Scale:
    return Scale().eval()


@pytest.fixture
def kernel(task: Task, artifact: Artifact, module: Scale) -> Kernel:
    return Kernel(task, Reference(module), artifact)


def test_proven_inputs_run_the_kernel_in_the_reference_s_structure(kernel: Kernel, module: Scale) -> None:
    x = torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(kernel(x)["scaled"], module(x)["scaled"] + 1000)
    assert not kernel.fallbacks


def test_results_of_two_calls_are_separate(kernel: Kernel) -> None:
    with torch.no_grad():
        first = kernel(torch.zeros(4, 8))["scaled"]
        kernel(torch.ones(4, 8))
    assert (first == 1000).all()


def test_changed_weights_are_followed(kernel: Kernel, module: Scale) -> None:
    with torch.no_grad():
        kernel(torch.ones(4, 8))
        module.weight.mul_(2)
        assert (kernel(torch.ones(4, 8))["scaled"] == module.weight + 1000).all()
    module.weight = nn.Parameter(torch.full((8,), 7.0))
    with torch.no_grad():
        assert (kernel(torch.ones(4, 8))["scaled"] == 1007).all()


@pytest.mark.parametrize(
    "x",
    [torch.ones(5, 8), torch.ones(4, 8, dtype=torch.float64), torch.ones(8, 4).T],
    ids=["shape", "dtype", "stride"],
)
def test_unproven_inputs_run_the_reference(kernel: Kernel, module: Scale, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(kernel(x)["scaled"], module(x)["scaled"])
    assert sum(kernel.fallbacks.values()) == 1


def test_gradients_are_never_lost(kernel: Kernel, module: Scale) -> None:
    out = kernel(torch.ones(4, 8))["scaled"]
    out.sum().backward()
    assert module.weight.grad is not None
    assert "gradient" in next(iter(kernel.fallbacks))


def test_another_training_mode_runs_the_reference(kernel: Kernel, module: Scale) -> None:
    module.train()
    with torch.no_grad():
        assert kernel(torch.zeros(4, 8))["scaled"].sum() == 0
    assert "training" in next(iter(kernel.fallbacks))


def test_without_an_artifact_it_is_the_reference(task: Task, module: Scale) -> None:
    kernel = Kernel(task, Reference(module), None)
    with torch.no_grad():
        assert kernel(torch.zeros(4, 8))["scaled"].sum() == 0
    assert kernel.why_not(torch.zeros(4, 8)) == "no kernel was proven"


def test_what_no_kernel_was_proven_for_runs_the_reference(kernel: Kernel, module: Scale) -> None:
    x = torch.randn(4, 8)
    with torch.no_grad():
        negated = torch._neg_view(x)  # type: ignore[attr-defined]
        torch.testing.assert_close(kernel(negated)["scaled"], module(negated)["scaled"])
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(kernel(x)["scaled"], module(x)["scaled"])
        for weight in (torch.ones(16)[::2], torch.ones(8, dtype=torch.float64)):
            module.weight = nn.Parameter(weight)
            torch.testing.assert_close(kernel(x)["scaled"], module(x)["scaled"])
    assert [words.split()[0] for words in kernel.fallbacks] == ["a", "autocast", "a"]
    assert sum(kernel.fallbacks.values()) == 4


def test_what_a_forward_writes_to_its_buffers_is_written(artifact: Artifact) -> None:
    class Counting(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            self.calls += 1
            return super().forward(x)

    module, x = Counting().eval(), torch.randn(4, 8)
    task = Task.from_module(Scale().eval(), [x])
    kernel = Kernel(task, Reference(module), artifact)
    with torch.no_grad():
        for n in (1, 2, 3):
            torch.testing.assert_close(kernel(x)["scaled"], x * module.weight)
            assert module.calls == n
    assert "writes to its buffers" in str(kernel.why_not(x))
