"""The operators of the paper: every one is a sound task, and the benchmark goes from task to table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ke_gym.evaluation import bundle, gpu_signature
from ke_gym.evaluation.evaluation import HARNESS_VERSION
from ke_gym.proposers.base import Context, Proposal
from ke_gym.proposers.rewriter import Rewriter
from ke_gym.strategies import RESTART


@pytest.fixture
def operators(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("operators")


def test_every_operator_is_a_task_with_the_sizes_it_is_named_after(operators: Any) -> None:
    for name, operator in operators.OPERATORS.items():
        task = operator.load(name)
        assert task.name == name and set(task.shapes) == {"cpu", "gpu"}
        outputs = task.reference("cpu")(*task.inputs("cpu", 0))
        assert all(torch.isfinite(out).all() for out in outputs if out.is_floating_point())
    for name, shape in {"fm_40": (8192, 40, 128), "conv1d": (2048, 96, 200)}.items():
        (spec,) = gpu_signature.signature(operators.OPERATORS[name].load(name), ["gpu"]).inputs["gpu"]
        assert (spec.shape, spec.dtype) == (shape, "float16")


def test_an_operator_becomes_device_code_where_there_is_no_gpu(operators: Any, tmp_path: Path) -> None:
    task = operators.OPERATORS["fm_24"].load("fm_24")
    first = Rewriter(task, "triton").propose(None, RESTART, 0, Context(seed=0))
    assert isinstance(first, Proposal)
    (packed,) = bundle.compile_bundle([("fm_24", task, first.candidate)], folder=tmp_path).packed
    assert packed.artifact is not None and packed.artifact.arch == "sm_90a"


@pytest.mark.usefixtures("steady_clock")
def test_from_task_to_table_on_the_cpu(
    operators: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KE_GYM_HOME", str(tmp_path))
    operators.Operators(("map_id",), target="cpu", budget=1, compilers=False, out=tmp_path / "out").run()
    (line,) = (tmp_path / "out" / "suite.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["task"] == "map_id" and row["floor_ms"] > 0 and row["harness"] == HARNESS_VERSION
    printed = capsys.readouterr().out
    assert "0.78-4.07x over (MTIA)" in printed and "operators without a correct kernel: none" in printed
