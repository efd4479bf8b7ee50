"""Every task proves itself before use (docs/tasks.md).

Its own reference must be accepted and race its own copy at 1.0 within noise; every mutant must be rejected. The
race is for the tasks that ship with the project; a user's own task is proven without it, before its first search.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from ke_gym.evaluation.checking import Case, draw_cases
from ke_gym.evaluation.judge_client import JudgeClient
from ke_gym.evaluation.mutants import computes_nothing
from ke_gym.evaluation.stats import sign_p_interval
from ke_gym.evaluation.zygote import Zygote
from ke_gym.targets import cpu
from ke_gym.tasks.task import Task

ROUNDS = 15
ATTEMPTS = 3
# Two processes of the same program may differ by this much on a shared machine (page placement, caches).
NOISE = 0.10


@dataclass(frozen=True)
class Proof:
    """How far a task's checks can be trusted: the mutants they were tried on, and those that survived.

    ``rejected`` is why its own reference is not accepted, if it is not.
    """

    mutants: int
    survivors: tuple[str, ...] = ()
    rejected: str = ""

    @property
    def ok(self) -> bool:
        return self.mutants > 0 and not self.survivors and not self.rejected

    @property
    def useless(self) -> bool:
        """Whether a kernel that computes nothing would be accepted, or none at all."""
        return bool(self.rejected) or not self.mutants or any(map(computes_nothing, self.survivors))

    def reasons(self) -> list[str]:
        """What is wrong with the task; nothing if all is well."""
        reasons = []
        if self.rejected:
            reasons.append(f"its own reference is rejected: {self.rejected}")
        if self.survivors:
            reasons.append(f"mutants survive: {', '.join(self.survivors)}")
        if not self.mutants:
            reasons.append("no mutant could be made: nothing about it can be checked")
        return reasons

    def __str__(self) -> str:
        if self.ok:
            return f"all {self.mutants} wrong versions of it are rejected"
        return "; ".join(self.reasons())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Proof:
        data = json.loads(text)
        return Proof(data["mutants"], tuple(data["survivors"]), data["rejected"])


class Judges(Protocol):
    """What a proof needs of a judge, on whatever device."""

    def self_verdict(self, shape_set: str) -> dict[str, Any]: ...

    def mutants(self, shape_set: str, cases: list[Case]) -> dict[str, bool]: ...


def prove(judge: Judges, shape_set: str, cases: Sequence[Case]) -> Proof:
    """The part of the check that takes no race; the mutants are judged on ``cases`` until all are rejected."""
    verdict = judge.self_verdict(shape_set)
    results: dict[str, bool] = {}
    for case in cases:  # a request each: requests are limited in time, and references may be slow
        for name, rejected in judge.mutants(shape_set, [case]).items():
            results[name] = results.get(name, False) or rejected
        if all(results.values()):
            break
    survivors = tuple(name for name, rejected in results.items() if not rejected)
    return Proof(len(results), survivors, "" if verdict["ok"] else str(verdict["reason"]))


@dataclass(frozen=True)
class SelfCheck:
    """Whether a task may be used: its reference's own verdict and race, and the mutants that survived."""

    task: str
    ok: bool
    reference_ms: float
    speedup: float
    speedup_ci: tuple[float, float]
    mutants: int
    survivors: tuple[str, ...]
    reason: str


def check(
    task: Task, zygote: Zygote | None = None, target: str = "cpu", seed: int | None = None
) -> SelfCheck:
    """Check one task; the race is between the reference in two processes, on the same inputs."""
    if zygote is None:
        with Zygote(cpu.facts().cores) as own:
            return check(task, own, target, seed)
    rng = random.Random(seed)
    contract = task.contract(target)
    threads = cpu.facts().cores
    first = JudgeClient(zygote, task, [contract], "eager", threads)
    try:
        second = JudgeClient(zygote, task, [contract], "eager", threads)
        try:
            return _check(task, contract, first, second, rng)
        finally:
            second.close()
    finally:
        first.close()


def _check(
    task: Task, contract: str, first: JudgeClient, second: JudgeClient, rng: random.Random
) -> SelfCheck:
    proof = prove(first, contract, draw_cases(rng))
    for _ in range(ATTEMPTS):
        ratios, seconds = _race(contract, first, second, rng)
        low, high = sign_p_interval(ratios)
        if low <= NOISE and high >= -NOISE:
            break
    median = float(np.median(ratios))
    reasons = proof.reasons()
    if low > NOISE or high < -NOISE:
        reasons.append(f"its reference races its own copy at {math.exp(median):.2f}x")
    return SelfCheck(
        task.name,
        not reasons,
        1e3 * float(np.median(seconds)),
        math.exp(median),
        (math.exp(low), math.exp(high)),
        proof.mutants,
        proof.survivors,
        "; ".join(reasons),
    )


def _race(
    contract: str, first: JudgeClient, second: JudgeClient, rng: random.Random
) -> tuple[list[float], list[float]]:
    """Log-ratios of paired calls of the reference in two processes, after one that warms up; all seconds."""
    seconds: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 1):
        if rng.random() < 0.5:
            a = first.call_baseline(contract)
            b = second.call_baseline(contract)
        else:
            b = second.call_baseline(contract)
            a = first.call_baseline(contract)
        seconds.append((a, b))
    return [math.log(a / b) for a, b in seconds[1:]], [s for pair in seconds[1:] for s in pair]
