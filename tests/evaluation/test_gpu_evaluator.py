"""The evaluator for a GPU, on one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ke_gym.candidate import Candidate
from ke_gym.deploy.kernel import Kernel
from ke_gym.errors import UserError
from ke_gym.evaluation import bundle
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.gpu_client import APART
from ke_gym.evaluation.gpu_tools import ToolFailed
from ke_gym.evaluation.opening import open_evaluator
from ke_gym.languages.nvrtc import nvcc
from ke_gym.tasks.task import Reference, Task

TASK = """
import torch
import torch.nn as nn
ROWS, COLS = 512, 1000
shapes = {"default": {"ROWS": 512, "COLS": 1000}, "ragged": {"ROWS": 3, "COLS": 77}}
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, x):
        return torch.softmax(x * self.scale, dim=-1)
def get_inputs():
    return [torch.randn(ROWS, COLS)]
"""
KERNEL = """
import torch
import triton
import triton.language as tl
general = True

@triton.autotune([triton.Config({}, num_warps=w) for w in (2, 4, 8)], key=["n"])
@triton.jit
def rows(x, scale, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + at, mask=at < n, other=-float("inf")) * tl.load(scale)
    v = tl.where(at < n, v, -float("inf"))
    e = tl.exp(v - tl.max(tl.where(v != v, float("inf"), v), 0))
    tl.store(out + row * n + at, e / tl.sum(tl.where(at < n, e, 0.0), 0), mask=at < n)

def forward(x, scale):
    out = torch.empty_like(x)
    rows[(x.shape[0],)](x, scale, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out
"""
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("task") / "scaled.py"
    path.write_text(TASK)
    return Task.from_file(path)


@pytest.fixture(scope="module")
def evaluator(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluator]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        opened = open_evaluator(task, "cuda", folder=tmp_path_factory.mktemp("home"), call_timeout=2)
    except UserError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


def test_a_right_kernel_is_correct_on_hidden_shapes_too(evaluator: Evaluator) -> None:
    evaluation = evaluator.evaluate(Candidate(KERNEL, "triton"))
    assert evaluation.correct, evaluation.log
    assert evaluation.kernel_coverage == 1.0 and evaluation.trust == "plan"
    assert evaluation.time_ms is not None and evaluation.profile.resources


def test_a_reference_that_stops_the_device_on_special_inputs_is_not_asked_about_them(
    evaluator: Evaluator, choosy: tuple[Task, str], tmp_path: Path
) -> None:
    task, source = choosy
    with open_evaluator(task, "cuda", folder=tmp_path, call_timeout=2) as opened:
        right, wrong = (opened.evaluate(Candidate(source.format(more), "triton")) for more in ("", " * 1.01"))
    assert right.correct, right.log
    assert wrong.outcome == "correctness", wrong.log
    assert "nothing is checked on special inputs, on which the reference itself fails" in right.log


def test_a_wrong_kernel_is_not(evaluator: Evaluator) -> None:
    wrong = evaluator.evaluate(Candidate(KERNEL.replace("* tl.load(scale)", ""), "triton"))
    assert wrong.outcome == "correctness"


def test_a_fault_ends_one_process_and_no_session(evaluator: Evaluator) -> None:
    faulty = KERNEL.replace("tl.store(out + row * n + at,", "tl.store(out + (1 << 40) + at,")
    assert evaluator.evaluate(Candidate(faulty, "triton")).outcome == "runtime"
    assert evaluator.evaluate(Candidate(KERNEL, "triton")).correct


def test_the_incumbent_races_its_own_copy_to_no_gain(evaluator: Evaluator) -> None:
    best = Candidate(KERNEL, "triton")
    again = Candidate(KERNEL + "\nOTHER = 1\n", "triton")
    assert not evaluator.evaluate(again, best).improved


def test_of_two_the_slower_is_not_ahead(evaluator: Evaluator) -> None:
    alone = Candidate(KERNEL, "triton")
    thrice = Candidate(IN_THREE, "triton")
    assert evaluator.ahead(alone, thrice)
    assert not evaluator.ahead(thrice, alone)
    assert not evaluator.ahead(alone, alone)


def test_the_reference_passes_and_its_mutants_do_not(evaluator: Evaluator) -> None:
    assert evaluator.judge.self_verdict("default")["ok"]
    cases = [(5, "task", 7), (6, "ties", 8), (9, "zeros", 10)]
    assert all(evaluator.judge.mutants("default", cases).values())


def test_what_was_compiled_elsewhere_is_judged_here(task: Task, evaluator: Evaluator, tmp_path: Path) -> None:
    path = tmp_path / "batch"
    bundle.compile_bundle([("one", task, Candidate(KERNEL, "triton"))], folder=tmp_path).write(path)
    (judged,) = bundle.run_bundle(
        bundle.Bundle.read(path), lambda task: open_evaluator(task, "cuda", folder=tmp_path)
    )
    assert judged.label == "one" and judged.evaluation.correct, judged.evaluation.log


def test_the_proven_kernel_runs_in_the_user_s_process(task: Task, evaluator: Evaluator) -> None:
    reference = Reference(task.reference("default").module.cuda())
    kernel = Kernel(task, reference, evaluator.settled(Candidate(KERNEL, "triton")), "cuda")
    for _ in range(2):
        x = torch.randn(512, 1000, device="cuda")
        with torch.no_grad():
            assert torch.allclose(kernel(x), torch.softmax(x, -1), atol=1e-6)
    assert kernel.why_not(torch.randn(4, 4, device="cuda")) is not None
    assert kernel.why_not(torch.randn(512, 1000)) is not None


def test_a_device_that_is_not_there_says_how_to_go_on(task: Task, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--compile-only"):
        open_evaluator(task, "cuda:99", folder=tmp_path)


IN_THREE = (
    KERNEL.replace("general = True\n", "")
    + """

@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)

def forward(x, scale):
    first, second, out = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    rows[(x.shape[0],)](x, scale, first, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    for a, b in ((first, second), (second, out)):
        copy[(triton.cdiv(x.numel(), 1024),)](a, b, x.numel(), BLOCK=1024)
    return out
"""
)


def test_a_plan_that_goes_as_a_graph_is_right_in_every_call(task: Task, evaluator: Evaluator) -> None:
    candidate = Candidate(IN_THREE, "triton")
    artifact = evaluator.settled(candidate)
    plan = replace(artifact.plans["default"].choose({}), graph=True)
    evaluator.adopt(candidate, replace(artifact, plans={"default": plan}))
    evaluation = evaluator.evaluate(candidate)
    assert evaluation.correct, evaluation.log
    assert evaluator.settled(candidate).plans["default"].graph
    kernel = Kernel(
        task, Reference(task.reference("default").module.cuda()), evaluator.settled(candidate), "cuda"
    )
    for _ in range(3):
        x = torch.randn(512, 1000, device="cuda")
        with torch.no_grad():
            assert torch.allclose(kernel(x), torch.softmax(x, -1), atol=1e-6)


def test_a_winner_is_looked_at_by_the_tools_that_are_there(evaluator: Evaluator) -> None:
    final = evaluator.final(Candidate(KERNEL, "triton"))
    assert final.correct, final.log
    assert dict(final.profile.counters).get("time_ns", 0) > 0 or "no counters" in final.log


def test_proton_times_each_kernel_of_a_plan(evaluator: Evaluator) -> None:
    candidate = Candidate(KERNEL, "triton")
    evaluation = evaluator.evaluate(candidate)
    try:
        times = evaluator.kernel_times(candidate)
    except ToolFailed as failure:
        pytest.skip(str(failure))
    assert list(times) == ["rows"] and evaluation.time_ms is not None
    assert 0.1 * evaluation.time_ms < 1e3 * times["rows"] < 10 * evaluation.time_ms


def test_kernels_that_another_process_launches_are_judged_alike(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluator: Evaluator
) -> None:
    monkeypatch.setenv(APART, "1")
    with open_evaluator(task, "cuda:0", folder=tmp_path, call_timeout=2) as opened:
        assert opened.judge.apart, opened.judge.why_not_apart  # type: ignore[attr-defined]
        judged = opened.evaluate(Candidate(KERNEL, "triton"))
        assert judged.correct and judged.trust == "plan", judged.log
        wrong = opened.evaluate(Candidate(KERNEL.replace("* tl.load(scale)", ""), "triton"))
        assert wrong.outcome == "correctness"
        faulty = KERNEL.replace("tl.store(out + row * n + at,", "tl.store(out + (1 << 40) + at,")
        assert opened.evaluate(Candidate(faulty, "triton")).outcome == "runtime"
        assert opened.evaluate(Candidate(KERNEL, "triton")).correct


def test_a_compiled_reference_takes_the_baseline_s_place(task: Task, tmp_path: Path) -> None:
    try:
        opened = open_evaluator(task, "cuda:0", folder=tmp_path)
    except UserError as error:
        pytest.skip(str(error))
    with opened:
        for baseline in ("compile", "max-autotune"):
            opened.compile_baseline(baseline)
            assert opened.baseline == baseline and opened.race_baseline(Candidate(KERNEL, "triton"))[0] > 0
        assert {"compiling the reference", "racing"} <= opened.account.spent().keys()


INLINE = """
import torch
from torch.utils.cpp_extension import load_inline

CUDA = r'''
#include <torch/extension.h>
#include <c10/cuda/CUDAStream.h>

__global__ void rows(const float* x, const float* scale, float* out, int n) {
  extern __shared__ float part[];
  const float* in = x + (long)blockIdx.x * n;
  const float s = *scale;
  float top = -INFINITY;
  for (int i = threadIdx.x; i < n; i += blockDim.x) top = isnan(in[i] * s) ? NAN : isnan(top) ? top : fmaxf(top, in[i] * s);
  part[threadIdx.x] = top;
  __syncthreads();
  for (int half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half) {
      const float a = part[threadIdx.x], b = part[threadIdx.x + half];
      part[threadIdx.x] = isnan(a) ? a : isnan(b) ? b : fmaxf(a, b);
    }
    __syncthreads();
  }
  top = part[0];
  __syncthreads();
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += expf(in[i] * s - top);
  part[threadIdx.x] = sum;
  __syncthreads();
  for (int half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  sum = part[0];
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[(long)blockIdx.x * n + i] = expf(in[i] * s - top) / sum;
}

torch::Tensor softmax(torch::Tensor x, torch::Tensor scale) {
  auto out = torch::empty_like(x);
  rows<<<x.size(0), 256, 256 * sizeof(float), c10::cuda::getCurrentCUDAStream()>>>(
      x.data_ptr<float>(), scale.data_ptr<float>(), out.data_ptr<float>(), x.size(1));
  return out;
}
'''
extension = load_inline(
    name="scaled_rows",
    cpp_sources="torch::Tensor softmax(torch::Tensor x, torch::Tensor scale);",
    cuda_sources=CUDA,
    functions=["softmax"],
    verbose=True,
)

class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return extension.softmax(x.contiguous(), self.scale)
"""


@pytest.fixture(scope="module")
def patient(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluator]:
    """Compiling against torch's headers takes a minute and more."""
    if not torch.cuda.is_available() or not nvcc():
        pytest.skip("no GPU, or no nvcc")
    with open_evaluator(task, "cuda", folder=tmp_path_factory.mktemp("home"), build_timeout=600) as opened:
        yield opened


def test_a_module_that_builds_itself_with_load_inline_is_in_the_host_lane(
    patient: Evaluator, evaluator: Evaluator
) -> None:
    inline = patient.evaluate(Candidate(INLINE, "cuda"))
    assert (inline.outcome, inline.trust) == ("correct", "host"), inline.log
    assert "it calls scaled_rows.softmax, which load_inline built" in inline.log
    assert inline.kernel_coverage == 0.0 and inline.time_ms is not None
    # Its calls are timed as a whole, with its Python: a little more than a plan's that does the same.
    traced = patient.evaluate(Candidate(KERNEL, "triton"), Candidate(INLINE, "cuda"))
    assert traced.correct and traced.rival, traced.log
