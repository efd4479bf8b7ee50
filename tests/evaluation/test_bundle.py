"""Bundles: what travels between the machine that compiles and the one that races."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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
        return Evaluation(
            self.task.name, "cuda", candidate.language, candidate.id, "correct", speedup=2.0, gain=2.0
        )

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


SIZES = {"SHAPE": (4, (8, 1)), "DTYPE": torch.float16, "LIST": [1, 2.5, None], "DEEP": {"tuple": (True, "a")}}


def test_sizes_travel_as_they_are() -> None:
    task = replace(SOFTMAX, shapes={"cpu": {"ROWS": 4}, "gpu": SIZES})
    (read,) = Bundle.from_bytes(Bundle("sm_90a", (task,)).to_bytes()).tasks
    assert read.shapes == task.shapes and read.id == task.id
    sizes = read.shapes["gpu"]
    assert type(sizes["SHAPE"]) is tuple and type(sizes["LIST"]) is list


@pytest.mark.parametrize("value", [torch.zeros(2), {1: 2}, {3}, (print,)])
def test_what_is_not_plain_does_not_travel(value: Any) -> None:
    task = replace(SOFTMAX, shapes={"gpu": {"THING": value}})
    with pytest.raises(UserError, match=r"task softmax: shape set 'gpu' sets THING to .* can't travel"):
        Bundle("sm_90a", (task,)).to_bytes()


def with_header(change: Any) -> bytes:
    """A bundle of one task whose header says something else."""
    whole = Bundle("sm_90a", (SOFTMAX,)).to_bytes()
    start = len(bundle._MAGIC) + 8
    header = json.loads(whole[start:])
    change(header)
    text = json.dumps(header).encode()
    return bundle._MAGIC + len(text).to_bytes(8, "little") + text


def test_bundles_of_the_version_before_are_read() -> None:
    def before(header: Any) -> None:
        header["version"] = 2
        header["tasks"][0]["shapes"] = {"gpu": {"SHAPE": [4, 8], "MORE": {"dtype": "x"}}}

    (task,) = Bundle.from_bytes(with_header(before)).tasks
    assert task.shapes == {"gpu": {"SHAPE": [4, 8], "MORE": {"dtype": "x"}}}
    with pytest.raises(ValueError, match="of version 1, this is version 3"):
        Bundle.from_bytes(with_header(lambda header: header.update(version=1)))


@pytest.mark.parametrize(
    "value",
    [
        {"dtype": "load"}, {"dtype": ["float16"]}, {"tuple": "ab"}, {"dict": [1]}, {"tuple": [], "dict": {}}, {},
        {"tuple": [{"unknown": 1}]},
    ],
)  # fmt: skip
def test_sizes_of_no_known_kind_are_refused(value: Any) -> None:
    def hostile(header: Any) -> None:
        header["tasks"][0]["shapes"] = {"gpu": {"ROWS": value}}

    with pytest.raises(ValueError, match="unknown kind"):
        Bundle.from_bytes(with_header(hostile))


def test_shape_sets_that_are_none_are_refused() -> None:
    for shapes in ([], {"gpu": 3}, {"gpu": [1]}):
        with pytest.raises(ValueError, match="damaged"):
            Bundle.from_bytes(with_header(lambda header, s=shapes: header["tasks"][0].update(shapes=s)))
    deep = b"[" * 100_000
    with pytest.raises(ValueError, match="damaged"):
        Bundle.from_bytes(bundle._MAGIC + len(deep).to_bytes(8, "little") + deep)


def test_live_modules_do_not_travel() -> None:
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


def test_an_incumbent_that_is_refused_is_left_out() -> None:
    rival = Candidate("def forward(x): return x + x", "triton"), one_launch("rows", SPEC)
    batch = Bundle("sm_90a", (SOFTMAX,), (Packed("good", 0, GOOD, one_launch("rows", SPEC), rival=rival),))
    (judged,) = bundle.run_bundle(batch, FakeEvaluator)  # type: ignore[arg-type]
    assert judged.evaluation.correct and judged.evaluation.gain is None
    said = "the incumbent failed (not what was asked for): raced against the baseline alone"
    assert judged.evaluation.log == said


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
