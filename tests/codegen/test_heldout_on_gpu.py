"""The problems of ``test_heldout`` on a GPU: each first candidate, in either language, passes the judge's own checks."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from ke_gym.evaluation.checking import draw_cases
from ke_gym.tasks import Task
from tests.codegen.test_heldout import PROBLEMS, built_for_a_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PATIENCE = 20.0


def hide_gpus() -> None:
    """As compile workers see it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def refusal(path: Path, packed: bytes) -> str:
    """Why the judge refuses a problem's candidate; "" if it does not."""
    from ke_gym.evaluation.gpu_judge import GpuJudge

    task, device, rng = Task.from_file(path), torch.device("cuda", 0), random.Random(1)
    contract = task.contract("cuda")
    with device:
        judge = GpuJudge(task, "eager", device)
        judge.describe([contract], signature=False)
        arm = judge.load(contract, packed)["arm"]
        answer = judge.check(arm, draw_cases(rng), rng.getrandbits(60), True, PATIENCE)
        judge.unload(arm)
    return str(answer.get("reason", ""))


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawning, initializer=hide_gpus) as pool:
        yield pool


@pytest.mark.parametrize("language", ["triton", "cuda"])
@pytest.mark.parametrize("path", PROBLEMS, ids=lambda path: path.stem)
def test_an_unseen_problem_gets_a_correct_first_candidate(
    workers: ProcessPoolExecutor, path: Path, language: str
) -> None:
    assert not refusal(path, workers.submit(built_for_a_gpu, path, language).result())
