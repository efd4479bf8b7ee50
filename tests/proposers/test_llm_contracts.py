"""The worked examples in the prompts are what they say: modules that build and compute."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ke_gym.languages.base import BuildOptions, Signature, build
from ke_gym.languages.module import load
from ke_gym.proposers import prefilter, prompt
from ke_gym.tasks import Task

REFERENCE = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self, cols):
        super().__init__()
        self.norm = nn.RMSNorm(cols, eps=1e-6)

    def forward(self, x):
        return self.norm(x)

def get_inputs():
    return [torch.randn(64, 96)]

def get_init_inputs():
    return [96]
"""


def example(language: str) -> str:
    found = re.search(
        r"```python\n(.*?)```", (prompt.TEMPLATES / prompt.contract(language)).read_text(), re.DOTALL
    )
    assert found is not None
    return found[1]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    path = tmp_path / "norm.py"
    path.write_text(REFERENCE)
    return Task.from_file(path)


@pytest.mark.parametrize("language", ["cpp", "triton", "cuda"])
def test_examples_keep_the_contract(language: str) -> None:
    assert prefilter.check(example(language), language, 1, ("norm_weight",)) is None
    assert prompt.docstring(example(language)).startswith("RMS norm")


def test_the_example_in_cpp_computes_what_it_says(task: Task) -> None:
    x = torch.randn(64, 96)
    reference = task.reference(task.contract("cpu"))
    (expected,) = reference(x)
    got = load(example("cpp")).forward(x, reference.state["norm_weight"])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_example_in_triton_compiles(task: Task) -> None:
    pytest.importorskip("triton")
    artifact = build(example("triton"), Signature.of(task), "triton", BuildOptions(target="cuda"))
    assert artifact.language == "triton" and artifact.binaries
