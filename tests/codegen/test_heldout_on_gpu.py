"""The problems of ``test_heldout`` and random networks on a GPU: each first candidate, in either language, passes the judge's
own checks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ke_gym.evaluation.checking import CASES, draw_cases
from ke_gym.tasks import Task
from tests.codegen.networks import network
from tests.codegen.test_heldout import PROBLEMS, built_for_a_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PATIENCE = 20.0


def refusal(path: Path, packed: bytes) -> str:
    """Why the judge refuses a problem's candidate; "" if it does not."""
    from ke_gym.evaluation.gpu_judge import GpuJudge

    task, device, rng = Task.from_file(path), torch.device("cuda", 0), random.Random(1)
    contract = task.contract("cuda")
    with device:
        judge = GpuJudge(task, "eager", device)
        judge.describe([contract], signature=False)
        refused = [name for name, _ in CASES if judge.refuses(contract, name)["refused"]]
        arm = judge.load(contract, packed)["arm"]
        answer = judge.check(arm, draw_cases(rng, refused), rng.getrandbits(60), True, PATIENCE)
        judge.unload(arm)
    return str(answer.get("reason", ""))


@pytest.mark.parametrize("language", ["triton", "cuda"])
@pytest.mark.parametrize("path", PROBLEMS, ids=lambda path: path.stem)
def test_an_unseen_problem_gets_a_correct_first_candidate(path: Path, language: str) -> None:
    assert not refusal(path, built_for_a_gpu(path, language))


@pytest.mark.parametrize("language", ["triton", "cuda"])
@pytest.mark.parametrize("seed", range(40))
def test_a_random_network_gets_a_correct_first_candidate(seed: int, language: str, tmp_path: Path) -> None:
    path = tmp_path / f"network_{seed}.py"
    path.write_text(network(seed))
    assert not refusal(path, built_for_a_gpu(path, language))
