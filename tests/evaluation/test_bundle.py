"""Bundles: what travels between the machine that compiles and the one that races."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import bundle
from ke_gym.evaluation.bundle import Bundle, Judged, Packed
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import one_launch

SPEC = TensorSpec((4, 8), (8, 1), "float32")
SOFTMAX = Task.load("softmax")
GOOD = Candidate("def forward(x): return x", "triton", proposer="tests")
BAD = Candidate("def forward(x: return x", "triton")


def made() -> Bundle:
    packed = (
        Packed("good", 0, GOOD, one_launch("rows", SPEC)),
        Packed("bad", 0, BAD, None, "compile", "a parenthesis"),
    )
    return Bundle("sm_90a", (SOFTMAX,), packed)


class FakeEvaluator:
    """Takes every artifact and finds every candidate correct."""

    devices = 1

    def __init__(self, task: Task, arch: str = "sm_90") -> None:
        self.task, self.target = task, "cuda"
        self.facts = SimpleNamespace(arch=arch)
        self.adopted: list[Artifact] = []

    def adopt(self, candidate: Candidate, artifact: Artifact) -> None:
        if "return x + x" in candidate.source:
            raise BuildError("constraints", "not what was asked for")
        self.adopted.append(artifact)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        return Evaluation(self.task.name, "cuda", candidate.language, candidate.id, "correct", speedup=2.0)

    def __enter__(self) -> FakeEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_bundle_survives_the_way_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "batch.keb"
    made().write(path)
    read = Bundle.read(path)
    assert read.tasks[0].id == SOFTMAX.id and read.arch == "sm_90a"
    assert [(p.label, p.candidate, p.outcome, p.log) for p in read.packed] == [
        ("good", GOOD, "correct", ""),
        ("bad", BAD, "compile", "a parenthesis"),
    ]
    artifact = read.packed[0].artifact
    assert artifact is not None and artifact.binaries == {"k": b"rows"}


def test_live_modules_do_not_travel() -> None:
    import torch

    task = Task.from_module(torch.nn.ReLU(), torch.zeros(3))
    with pytest.raises(UserError, match="live module"):
        Bundle("sm_90a", (task,)).to_bytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_no_bundle_is_refused_as_such(data: Any) -> None:
    whole = made().to_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    try:
        Bundle.from_bytes(damaged)
    except ValueError:
        return
    assert len(damaged) == len(whole)  # a changed letter of a source or a label is still a bundle


def test_everything_packed_comes_back_judged() -> None:
    other = Candidate("def forward(x): return x + x", "triton")
    batch = Bundle("sm_90a", (SOFTMAX,), (*made().packed, Packed("odd", 0, other, one_launch("rows", SPEC))))
    told: list[str] = []
    judged = bundle.run_bundle(batch, FakeEvaluator, lambda j: told.append(j.label))  # type: ignore[arg-type]
    assert told == ["good", "bad", "odd"]
    assert [(j.evaluation.outcome, j.evaluation.log) for j in judged] == [
        ("correct", ""),
        ("compile", "a parenthesis"),
        ("constraints", "not what was asked for"),
    ]


def test_another_architecture_is_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="--arch sm_80"):
        bundle.run_bundle(made(), lambda task: FakeEvaluator(task, "sm_80"))  # type: ignore[arg-type, return-value]


def test_results_come_back_as_one_file() -> None:
    judged = [Judged("a", Evaluation("softmax", "cuda", "triton", "1", "correct", speedup_ci=(1.0, 2.0)))]
    text = bundle.results(judged, {"model": "Fake"})
    assert json.loads(text)["machine"] == {"model": "Fake"}
    assert bundle.read_results(text) == judged
    with pytest.raises(ValueError):
        bundle.read_results('{"results": [{}]}')


def test_kernels_for_a_gpu_are_compiled_without_one(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    source = """
import torch
import triton
import triton.language as tl

@triton.jit
def double(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

def forward(x):
    out = torch.empty_like(x)
    double[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
    return out
"""
    work = [("right", SOFTMAX, Candidate(source, "triton")), ("wrong", SOFTMAX, BAD)]
    batch = bundle.compile_bundle(work, folder=tmp_path)
    right, wrong = batch.packed
    assert right.artifact is not None and right.artifact.arch == batch.arch == "sm_90a"
    assert right.artifact.plans["gpu"].device == "cuda" and right.artifact.binaries
    assert wrong.artifact is None and wrong.outcome == "compile"
