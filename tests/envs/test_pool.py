from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ke_gym.candidate import Candidate
from ke_gym.envs.episode import Episode, Rules
from ke_gym.envs.pool import EvaluationPool, LostEvaluation
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.search.session import Ask
from ke_gym.strategies import RESTART
from ke_gym.tasks import Task
from tests.envs.live import FAKE, FakeEvaluator

EPISODES = 4


class Together(FakeEvaluator):
    """Ends the first evaluation, ``broken`` or not, when all episodes have built what they ask for."""

    broken = False

    def __init__(self, task: Task, evaluated: list[str], built: threading.Semaphore) -> None:
        super().__init__(task)
        self.evaluated, self._built = evaluated, built

    def build(self, candidate: Candidate) -> Any:
        self._built.release()
        return SimpleNamespace(binary_id=candidate.id)

    def evaluate(self, candidate: Candidate, incumbent: Candidate | None = None) -> Evaluation:
        self.evaluated.append(candidate.id)
        for _ in range(EPISODES if len(self.evaluated) == 1 else 0):
            assert self._built.acquire(timeout=300)
        if self.broken:
            raise EOFError("the worker is gone")
        return super().evaluate(candidate, incumbent)


class Broken(Together):
    broken = True


def begun(kind: type[Together]) -> tuple[EvaluationPool, list[Any], list[str]]:
    """Episodes that begin with the same draft, as futures of one pool, and what its evaluators are asked for."""
    evaluated: list[str] = []
    built = threading.Semaphore(0)
    pool = EvaluationPool(
        workers=EPISODES, **{**FAKE, "open_evaluator": lambda task: kind(task, evaluated, built)}
    )
    case = pool.case(Task.load("softmax"))
    asks = [Episode(case, Rules(), pool.store, seed=0).begin(RESTART.id) for _ in range(EPISODES)]
    return pool, [pool.submit(case, ask) for ask in asks if isinstance(ask, Ask)], evaluated


def test_episodes_that_begin_alike_pay_for_one_evaluation() -> None:
    pool, futures, evaluated = begun(Together)
    judged = [future.result(300) for future in futures]
    assert len(judged) == EPISODES and len(evaluated) == 1
    assert {each.candidate for each in judged} == set(evaluated)
    pool.close()


def test_a_loss_that_episodes_share_counts_once() -> None:
    pool, futures, _ = begun(Broken)
    for future in futures:
        with pytest.raises(LostEvaluation, match="the worker is gone"):
            future.result(300)
    pool.close()
