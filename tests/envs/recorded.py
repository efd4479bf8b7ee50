"""Tables of the synthetic problem: every draw of two strategies, four levels deep, recorded as a live search is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.envs import compiling
from ke_gym.envs.recording import Breadth, record
from ke_gym.envs.table import Table
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers.base import Context, Proposal, Refusal
from ke_gym.search.budget import Budget
from ke_gym.search.observation import Surroundings
from ke_gym.search.session import Session
from ke_gym.search.store import Setting, Store
from ke_gym.strategies import STRATEGIES, Strategy
from ke_gym.tasks import Task
from tests.envs.live import FakeEvaluator
from tests.search.fakes import FakeProposer, judge

DEPTH = 4


class Narrow(FakeProposer):
    """Only two strategies ever apply, with two draws each, and no two paths lead to the same kernel."""

    def mask(self, parent: Candidate) -> NDArray[np.bool_]:
        return np.array([s.id in (0, 3) for s in STRATEGIES])

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        made = super().propose(parent, strategy, draw, context)
        if isinstance(made, Refusal) or parent is None:
            return made
        path = parent.source.partition("PATH = ")[2] + "abcdefgh"[2 * (strategy.id > 0) + min(draw, 1)]
        source = made.candidate.source + f"\nPATH = {path}"
        return Proposal(Candidate(source, "cpp", parent.id, strategy.name, "fake"), dollars=0.002)


class Racer(FakeEvaluator):
    """A race says what the intervals say, and leaves raw times behind."""

    def evaluate(self, candidate: Candidate, incumbent: Candidate | None = None) -> Evaluation:
        judged = judge(candidate, incumbent)
        if not judged.speedup or judged.gain is None:
            return judged
        rng = np.random.default_rng(int(candidate.id, 16))
        baseline = rng.lognormal(0.0, 0.01, 24)
        return judged.replace(
            improved=judged.gain * 0.99 > 1,
            times_ms=tuple((rng.lognormal(0.0, 0.02, 24) / judged.speedup).round(6).tolist()),
            reference_times_ms=tuple(baseline.round(6).tolist()),
            races=(14, 10),
        )


NARROW: dict[str, Any] = {"proposer": lambda task: Narrow(), "open_evaluator": Racer}


def search(store: Store, task: str, breadth: Breadth, budget: int = 10_000) -> str:
    """Record ``task`` into the store."""
    known = Task.load(task)
    racer = Racer(known)
    setting = Setting(known.id, "cpu", racer.facts.fingerprint, "eager", 1)
    store.add_task(known)
    session = Session(
        store, f"recording {task} {breadth}", setting, Narrow(), budget=Budget(budget),
        surroundings=Surroundings.of(racer),  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        return record(session, racer.evaluate, breadth)
    finally:
        racer.close()


@lru_cache
def tables() -> tuple[Table, ...]:
    """Of three tasks; the first is recorded completely, the others hardly."""
    with Store(":memory:") as store:
        search(store, "softmax", Breadth(6, DEPTH, 500, 3))
        search(store, "rms_norm", Breadth(3, 3, 2, 1))
        search(store, "bias_gelu", Breadth(1, 2, 1, 2))
        return tuple(compiling.build([one]) for one in compiling.searches(store))
