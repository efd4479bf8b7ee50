"""Policies in environments, one episode at a time: what training, validation and comparison have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.envs.replay import KernelOptReplayEnv
from ke_gym.envs.table import Table
from ke_gym.evaluation.evaluation import OUTCOMES
from ke_gym.policies.base import Policy
from ke_gym.search import reward
from ke_gym.search.run import Transition


@dataclass(frozen=True)
class Episode:
    """What one search of one task came to.

    ``curve`` is the natural log of the best speedup after each step (at least 0: the reference stays), shape
    (horizon,); a search that stopped early keeps what it had. In a replay it is the verdict on the best version, not
    the repeat drawn.
    """

    task: str
    curve: NDArray[np.float64]
    returned: float
    evaluations: int
    correct: int
    vain: int
    """Steps that brought no evaluation: refused, illegal, lost."""
    seconds: float
    """Recorded or measured cost of all evaluations."""
    candidates: list[dict[str, Any]] = field(default_factory=list)
    """With ``keep``: outcome, speedup and source of each."""
    leaders: list[str] = field(default_factory=list)
    """With ``keep``: the best version's id after each step, "" while there is none; shape (horizon,)."""


def play(
    policy: Policy,
    env: Any,
    *,
    seed: int,
    task: str | None = None,
    deterministic: bool = False,
    learn: bool = True,
    keep: bool = False,
    watch: Callable[[int, float], None] | None = None,
) -> Episode:
    """One episode of ``env`` with ``policy``; ``learn``: it is told of every step.

    ``watch(step, log-speedup)`` is called after each.
    """
    observation, info = env.reset(seed=seed, options={"task": task} if task else None)
    horizon = env.unwrapped.rules.horizon
    curve: list[float] = []
    returned, seconds, correct, vain, best = 0.0, 0.0, 0, 0, 1.0
    candidates: list[dict[str, Any]] = []
    leader, leaders = "", []
    start, over = True, False
    while not over:
        mask = info["action_mask"].astype(np.bool_)
        action, _ = policy.predict(
            observation, episode_start=np.array([start]), deterministic=deterministic, action_masks=mask
        )
        start = False
        after, paid, terminated, truncated, info = env.step(int(action))
        over = terminated or truncated
        returned += paid
        seconds += info["cost_s"]
        judged = info["outcome"] in OUTCOMES
        correct += info["outcome"] == "correct"
        vain += not judged and info["outcome"] != "stop"
        if keep and judged:
            candidates.append({key: info[key] for key in ("candidate", "outcome", "speedup", "source")})
        if learn:
            gained = min(max(math.log(info["best_speedup"] / best), 0.0), reward.CLIP)
            told = {"outcome": info["outcome"], "candidate": info["candidate"], "best_gain": gained}
            policy.update(Transition(observation, int(action), paid, after, over, mask, told))
        if info["best_speedup"] != best:
            leader = info["candidate"]
        best = info["best_speedup"]
        if keep:
            leaders.append(leader)
        observation = after
        curve.append(reached(env, best))
        if watch is not None:
            watch(len(curve), curve[-1])
    curve += curve[-1:] * (horizon - len(curve))
    leaders += leaders[-1:] * (horizon - len(leaders))
    return Episode(
        info["task"],
        np.array(curve),
        returned,
        info["evaluations"],
        correct,
        vain,
        seconds,
        candidates,
        leaders,
    )


def settled(episodes: Sequence[Episode]) -> list[Episode]:
    """Kept searches with curves on which a version is worth the same in all: the mean of all its log-speedups.

    Each search measured its kernels for itself, and one lucky measurement should decide nothing between them.
    """
    measured: dict[tuple[str, str], list[float]] = {}
    for episode in episodes:
        for made in episode.candidates:
            if made["outcome"] == "correct":
                measured.setdefault((episode.task, made["candidate"]), []).append(math.log(made["speedup"]))
    worth = {key: max(float(np.mean(logs)), 0.0) for key, logs in measured.items()}
    return [
        replace(
            episode, curve=np.array([worth.get((episode.task, leader), 0.0) for leader in episode.leaders])
        )
        for episode in episodes
    ]


def replay_runs(
    makers: Mapping[str, Callable[[int], Policy]],
    tables: Sequence[Table],
    budget: int,
    seeds: int,
    watch: Callable[[str], None] = lambda name: None,
) -> dict[str, list[list[Episode]]]:
    """Policy to runs over tables, each run with an episode per table. ``makers`` make a policy from a seed.

    Run i of all policies shares its random numbers, and every search starts from the policy as it was made: what one
    taught must not help the next.
    """
    found: dict[str, list[list[Episode]]] = {}
    for name, maker in makers.items():
        found[name] = [[] for _ in range(seeds)]
        for table in tables:
            first = maker(0)
            env = KernelOptReplayEnv(
                table, horizon=budget, parent_rule=first.parent_rule, reward=first.reward  # type: ignore[arg-type]
            )  # fmt: skip
            for seed in range(seeds):
                found[name][seed].append(play(maker(seed), env, seed=seed))
        watch(name)
    return found


def reached(env: Any, best: float) -> float:
    """The log-speedup that a search has reached: at least 0, since the reference can be kept."""
    inner = env.unwrapped
    return math.log(inner.verdict() if isinstance(inner, KernelOptReplayEnv) else max(best, 1.0))
