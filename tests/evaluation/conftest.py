"""One evaluator of a small task for the whole folder: opening it costs a second, using it milliseconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ke_gym.evaluation import zygote as zygote_module
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.zygote import Zygote
from ke_gym.tasks.task import Task


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def evaluator(folder: Path) -> Iterator[Evaluator]:
    with Evaluator(
        Task.load("softmax"), folder=folder, shape_sets=["ragged"], build_timeout=600, call_timeout=300
    ) as opened:
        yield opened


CHOOSY = """
import torch
import torch.nn.functional as F
class Model(torch.nn.Module):
    def forward(self, x, y):
        return F.binary_cross_entropy(torch.sigmoid(x), torch.sigmoid(y))
def get_inputs():
    return [torch.randn(24, 40), torch.randn(24, 40)]
"""


@pytest.fixture
def choosy(tmp_path: Path) -> tuple[Task, str]:
    """A task whose reference refuses NaN, and a module for it: right with "" where it has a place."""
    path = tmp_path / "choosy.py"
    path.write_text(CHOOSY)
    source = (
        "import torch.nn.functional as F\ndef forward(x, y):\n"
        "    return F.binary_cross_entropy_with_logits(x, y.sigmoid()){}\n"
    )
    return Task.from_file(path), source


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A bare zygote that can import the workers of `hostile_workers.py`."""
    plain = zygote_module.worker_environment

    def environment(threads: int) -> dict[str, str]:
        found = plain(threads)
        return {**found, "PYTHONPATH": os.pathsep.join([found["PYTHONPATH"], str(Path(__file__).parent)])}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zygote_module, "worker_environment", environment)
        with Zygote(threads=2) as started:
            assert started.sandbox_level
            yield started
