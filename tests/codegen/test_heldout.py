"""KernelBench-format problems that the generator was not written for: each first candidate is judged correct.

The real evaluation, from the compile sandbox to the secret cases, without the races.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ke_gym.candidate import Candidate
from ke_gym.codegen import Program
from ke_gym.errors import UserError
from ke_gym.evaluation.checking import draw_cases
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.gpu_signature import signature
from ke_gym.languages.base import BuildOptions, build
from ke_gym.targets import cpu
from ke_gym.tasks import Task

PROBLEMS = sorted((Path(__file__).parent / "heldout").glob("*.py"))


class Check(Evaluator):
    """An evaluator that decides after the checks, whose secret cases are the same every time."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, threads=min(2, cpu.facts().cores))
        rng = random.Random(1)
        self.cases, self._touch_seed = draw_cases(rng), rng.getrandbits(60)

    def _race(self, base: Evaluation, *args: Any) -> Evaluation:
        return base

    def _describe(self, base: Evaluation, *args: Any) -> Evaluation:
        return base

    def _maybe_aa(self) -> None:
        pass


def judged(task: Task, source: str) -> Evaluation:
    with Check(task) as judge:
        return judge.evaluate(Candidate(source))


def built_for_a_gpu(path: Path, language: str) -> bytes:
    """A problem's first candidate, compiled."""
    task = Task.from_file(path)
    program = Program.for_language(task, language)
    source = program.emit(program.seeds()[0])
    return build(source, signature(task, [task.contract("cuda")]), language, BuildOptions("cuda")).to_bytes()


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Iterator[dict[Path, tuple[str, Future[Evaluation]]]]:
    """First candidates of the chosen problems and their evaluations, two at a time, forked from one process."""
    names = {item.name for item in request.session.items}
    chosen = [path for path in PROBLEMS if any(name.endswith(f"[{path.stem}]") for name in names)]
    with ThreadPoolExecutor(2) as pool:
        made: dict[Path, tuple[str, Future[Evaluation]]] = {}
        for path in chosen:
            task = Task.from_file(path)
            try:
                program = Program.from_task(task)
                source = program.emit(program.seeds()[0])
            except UserError as error:
                refused: Future[Evaluation] = Future()
                refused.set_exception(error)
                made[path] = ("", refused)
            else:
                made[path] = (source, pool.submit(judged, task, source))
        yield made


def test_there_are_enough_problems() -> None:
    assert len(PROBLEMS) >= 20


@pytest.mark.parametrize("path", PROBLEMS, ids=lambda path: path.stem)
def test_an_unseen_problem_gets_a_correct_first_candidate(
    verdicts: dict[Path, tuple[str, Future[Evaluation]]], path: Path
) -> None:
    source, future = verdicts[path]
    verdict = future.result()
    assert (verdict.outcome, verdict.trust) == ("correct", "plan"), f"{verdict.log}\n{source}"


@pytest.mark.parametrize("language", ["triton", "cuda"])
@pytest.mark.parametrize("path", PROBLEMS, ids=lambda path: path.stem)
def test_its_first_candidate_for_a_gpu_is_compiled(path: Path, language: str) -> None:
    if language == "triton":
        pytest.importorskip("triton")
    assert built_for_a_gpu(path, language)
