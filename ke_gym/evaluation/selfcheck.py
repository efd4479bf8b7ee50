"""Every task proves itself before use (DESIGN section 5, rule 8).

Its own reference must be accepted and race its own copy at 1.0 within noise; every mutant must be rejected.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from ke_gym.evaluation.checking import draw_cases
from ke_gym.evaluation.judge_client import JudgeClient
from ke_gym.evaluation.stats import sign_p_interval
from ke_gym.evaluation.zygote import Zygote
from ke_gym.targets import cpu
from ke_gym.tasks.task import Task

ROUNDS = 15
ATTEMPTS = 3
# Two processes of the same program may differ by this much on a shared machine (page placement, caches).
NOISE = 0.10


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
    verdict = first.self_verdict(contract)
    results = first.mutants(contract, draw_cases(rng))
    survivors = tuple(name for name, rejected in results.items() if not rejected)
    for _ in range(ATTEMPTS):
        ratios, seconds = _race(contract, first, second, rng)
        low, high = sign_p_interval(ratios)
        if low <= NOISE and high >= -NOISE:
            break
    median = float(np.median(ratios))
    reasons = []
    if not verdict["ok"]:
        reasons.append(f"its own reference is rejected: {verdict['reason']}")
    if survivors:
        reasons.append(f"mutants survive: {', '.join(survivors)}")
    if not results:
        reasons.append("no mutant could be made: nothing about it can be checked")
    if low > NOISE or high < -NOISE:
        reasons.append(f"its reference races its own copy at {math.exp(median):.2f}x")
    return SelfCheck(
        task.name,
        not reasons,
        1e3 * float(np.median(seconds)),
        math.exp(median),
        (math.exp(low), math.exp(high)),
        len(results),
        survivors,
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
