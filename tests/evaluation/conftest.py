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
