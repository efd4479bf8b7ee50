"""KernelBench-format problems that the generator was not written for: each first candidate is judged correct.

The real evaluation, from the compile sandbox to the secret cases, without the races.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ke_gym.candidate import Candidate
from ke_gym.codegen import Program
from ke_gym.evaluation import evaluator
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.zygote import Zygote
from ke_gym.tasks import Task

PROBLEMS = sorted((Path(__file__).parent / "heldout").glob("*.py"))


class Check(Evaluator):
    """An evaluator that decides after the checks, whose secret cases are the same every time."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, threads=2)
        rng = random.Random(1)
        self.cases, self._touch_seed = evaluator.draw_cases(rng), rng.getrandbits(60)

    def _race(self, base: Evaluation, *args: Any) -> Evaluation:
        return base

    def _describe(self, base: Evaluation, *args: Any) -> Evaluation:
        return base

    def _maybe_aa(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def shared_zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One warm process to fork from for all problems."""
    with Zygote(2) as zygote, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KE_GYM_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(evaluator, "Zygote", lambda threads: nullcontext(zygote))
        yield


def test_there_are_problems_of_every_level() -> None:
    assert len(PROBLEMS) >= 20


@pytest.mark.parametrize("path", PROBLEMS, ids=lambda path: path.stem)
def test_an_unseen_problem_gets_a_correct_first_candidate(path: Path) -> None:
    task = Task.from_file(path)
    program = Program.from_task(task)
    source = program.emit(program.seeds()[0])
    with Check(task) as judge:
        verdict = judge.evaluate(Candidate(source))
    assert (verdict.outcome, verdict.trust) == ("correct", "plan"), f"{verdict.log}\n{source}"
