"""A synthetic search problem: kernels are lists of numbers, speedups a fixed function of them."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.evaluation.evaluation import Cost, Evaluation
from ke_gym.proposers.base import Context, Proposal, Proposer, Refusal
from ke_gym.search.store import Setting
from ke_gym.strategies import FIX, RESTART, STRATEGIES, Strategy

SETTING = Setting(task="t" * 16, target="cpu", machine="test", baseline="eager", threads=1)


def genes(candidate: Candidate) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", candidate.source))


def kernel(values: tuple[int, ...], parent: Candidate | None, strategy: Strategy) -> Candidate:
    source = f"GENES = {list(values)}"
    return Candidate(source, "cpp", parent.id if parent else None, strategy.name, "fake")


class FakeProposer(Proposer):
    """Strategy s adds s + draw to gene s % 4; draws beyond the second repeat, odd strategies need a gene."""

    name = "fake"
    draws = 3

    def __init__(self) -> None:
        self.calls = 0

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        self.calls += 1
        if strategy is RESTART:
            return Proposal(kernel((draw % 6, 1, 1, 1), None, strategy), dollars=0.01)
        assert parent is not None
        values = list(genes(parent))
        if strategy is FIX:
            values[0] += 1
            return Proposal(kernel(tuple(values), parent, strategy))
        if not self.mask(parent)[strategy.id]:
            return Refusal("needs a gene")
        values[strategy.id % 4] += strategy.id + min(draw, 1)
        return Proposal(kernel(tuple(values), parent, strategy))

    def mask(self, parent: Candidate) -> NDArray[np.bool_]:
        return np.array([s.id % 2 == 0 or sum(genes(parent)) > 3 for s in STRATEGIES])


def judge(candidate: Candidate, rival: Candidate | None = None) -> Evaluation:
    """About one in five fails; speedups lie between 0.6 and 4 and improve with the genes' closeness to 20."""
    digest = hashlib.sha256(candidate.source.encode()).digest()
    if digest[0] < 50:
        outcome = ("compile", "correctness", "runtime", "timeout")[digest[1] % 4]
        return evaluation(candidate, None, outcome)
    judged = evaluation(candidate, fitness(candidate), rival=fitness(rival) if rival else 1.0)
    return judged.replace(rival=rival.id) if rival else judged


def fitness(candidate: Candidate) -> float:
    distance = sum(abs(value - 20) for value in genes(candidate))
    return 0.6 + 3.4 / (1 + distance / 20)


def evaluation(
    candidate: Candidate, speedup: float | None, outcome: str = "correct", rival: float = 1.0
) -> Evaluation:
    gain = speedup / rival if speedup else None
    return Evaluation(
        task="fake",
        target="cpu",
        language="cpp",
        candidate=candidate.id,
        outcome=outcome,  # type: ignore[arg-type]
        time_ms=1 / speedup if speedup else None,
        reference_ms=1.0 if speedup else None,
        speedup=speedup,
        speedup_ci=(speedup * 0.99, speedup * 1.01) if speedup else None,
        gain=gain,
        gain_ci=(gain * 0.99, gain * 1.01) if gain else None,
        improved=bool(gain and gain > 1.02),
        kernel_coverage=1.0 if speedup else None,
        binary=candidate.id,
        cost=Cost(0.1, 0.2, 0.3),
    )


@dataclass
class Judge:
    """``judge`` with a count, and delays that shuffle the order in which threads finish."""

    jitter: float = 0.0

    def __post_init__(self) -> None:
        self.judged: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, candidate: Candidate, rival: Candidate | None) -> Evaluation:
        with self._lock:
            self.judged.append(candidate.id)
        if self.jitter:
            time.sleep(self.jitter * hashlib.sha256(candidate.id.encode()).digest()[3] / 255)
        return judge(candidate, rival)
