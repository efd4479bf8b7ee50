"""Design rule 8 over the whole built-in suite, and on tasks that deserve to fail it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ke_gym.evaluation.checking import draw_cases
from ke_gym.evaluation.judge_client import JudgeClient
from ke_gym.evaluation.selfcheck import check, prove
from ke_gym.evaluation.zygote import Zygote
from ke_gym.targets import cpu
from ke_gym.tasks import library
from ke_gym.tasks.task import Task


@pytest.fixture(scope="module")
def zygote(zygotes: Callable[[int], Zygote]) -> Zygote:
    return zygotes(cpu.facts().cores)


@pytest.mark.parametrize("name", library())
def test_every_task_proves_itself(name: str, zygote: Zygote) -> None:
    """At its smallest sizes; at those that are timed, ``scripts/tasks.py check`` asks for the same."""
    task = library()[name]
    judge = JudgeClient(zygote, task, ["ragged"], "eager", zygote.threads)
    try:
        proof = prove(judge, "ragged", draw_cases(random.Random(0)))
    finally:
        judge.close()
    assert proof.ok, str(proof)
    assert proof.mutants >= 2


def test_a_reference_races_its_own_copy(zygote: Zygote) -> None:
    result = check(library()["softmax"], zygote)
    # Not `result.ok`: the race is of times, which a loaded machine may spoil.
    assert not result.survivors and "rejected" not in result.reason, result.reason
    assert result.mutants >= 2 and result.reference_ms > 0
    low, high = result.speedup_ci
    assert low <= result.speedup <= high


@pytest.mark.parametrize(("precision", "judged"), [("strict", True), ("bf16", False)])
def test_half_precision_is_a_fault_only_where_it_is_not_allowed(
    precision: str, judged: bool, tmp_path: Path, zygote: Zygote
) -> None:
    path = tmp_path / "product.py"
    path.write_text(
        f"import torch\nprecision = {precision!r}\nclass Model(torch.nn.Module):\n"
        "    def forward(self, x, y):\n        return torch.relu(x @ y)\n"
        "def get_inputs():\n    return [torch.randn(64, 64), torch.randn(64, 64)]\n"
    )
    judge = JudgeClient(zygote, Task.load(str(path)), ["default"], "eager", 1)
    try:
        rejected = judge.mutants("default", draw_cases(random.Random(0)))
    finally:
        judge.close()
    assert ("half precision" in rejected) == judged
    assert all(rejected.values()) and len(rejected) >= 3


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        ("return torch.zeros_like(x) * x.shape[0]", "mutants survive: zeros"),
        ("return x.clone()", "copy of input 0"),
        ("return x * 1.5", "skipped mul"),
    ],
)
def test_a_task_that_could_be_cheated_is_refused(
    forward: str, reason: str, tmp_path: Path, zygote: Zygote
) -> None:
    path = tmp_path / "weak.py"
    path.write_text(
        "import torch\ntolerance = 0.9\nclass Model(torch.nn.Module):\n"
        f"    def forward(self, x):\n        {forward}\n"
        "def get_inputs():\n    return [torch.randn(64, 64)]\n"
    )
    result = check(Task.load(str(path)), zygote)
    assert not result.ok
    assert reason in result.reason
