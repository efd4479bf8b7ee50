"""Comparing policies at equal cost: scores per run and task, and statistics that would survive review.

Every policy gets the same budget on the same tasks under the same random numbers. AUC is normalized per task by what
chance reaches (the median curve of masked random) and the best that is known. That denominator is itself estimated, and
small where chance does well, so that a task or two can decide the mean; ``faster`` compares the plain areas beside it.
Statistics treat tasks as the unit, not runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ke_gym.policies import statistics
from ke_gym.policies.playing import Episode
from ke_gym.policies.statistics import Array, Interval

CHANCE, DRAFTS = "masked_random", "best_of_n"
BASELINES = (CHANCE, DRAFTS)
"""What a policy has to beat before anything is claimed for it."""
FAST = (1.0, 1.2, 2.0)
NEAR = 0.9
ROOM = 0.02
"""Mean log-speedup that chance has to leave on a task: below it, policies differ by less than races can tell."""
TASKS, RUNS = 5, 2
"""Fewest telling tasks, and runs of each, for a verdict: of one task, every other interval of two equals leaves out 0."""


@dataclass(frozen=True)
class Score:
    """One policy's figures over all tasks and runs."""

    policy: str
    auc: Interval
    """Interquartile mean of the normalized area under the curve: 0 is chance, 1 the best known from the start."""
    final: Interval
    """Interquartile mean of the final log-speedup."""
    speedup: float
    """Geometric mean of the final speedup."""
    fast: dict[str, float]
    """Share of runs that end beyond 1x, 1.2x, 2x."""
    validity: float
    """Share of evaluations that were correct."""
    vain: float
    """Share of steps without an evaluation."""
    to_near: float | None
    """Median evaluations to 90 % of the best known log-speedup; None if half of the runs never get there."""
    over: dict[str, Interval]
    """Mean difference of AUC to each baseline, with an interval over tasks."""
    faster: dict[str, Interval]
    """How many times as fast as each baseline's the best kernel is while the search lasts: the geometric mean over
    evaluations, runs and all tasks. Unlike AUC it is divided by nothing, so that a task on which chance leaves next to
    nothing to gain weighs next to nothing."""
    chances: dict[str, float]
    """Probability that a run beats one of each baseline on the same task."""


class Comparison:
    """Scores of ``episodes``: policy to runs, each a list with one episode per task (the same order for all).

    ``seen`` names the tasks that a policy was trained or chosen on: no verdict is given with such a one.
    """

    def __init__(
        self,
        episodes: Mapping[str, Sequence[Sequence[Episode]]],
        best: Mapping[str, float],
        seen: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.seen = dict(seen or {})
        self.episodes = episodes
        self.policies = list(episodes)
        self.tasks = [episode.task for episode in episodes[CHANCE][0]]
        known = {task: math.log(max(speedup, 1.0)) for task, speedup in best.items()}
        self.best = np.array([known[task] for task in self.tasks])
        """Best known log-speedup per task."""
        self.curves = {
            name: np.array([[episode.curve for episode in run] for run in runs])
            for name, runs in episodes.items()
        }
        """Shape (runs, tasks, budget)."""
        self.budget = self.curves[CHANCE].shape[2]

    @cached_property
    def chance(self) -> Array:
        """The median curve of masked random, shape (tasks, budget)."""
        return np.asarray(np.median(self.curves[CHANCE], axis=0))

    @cached_property
    def telling(self) -> list[int]:
        """The tasks that tell policies apart: on average, chance leaves at least ``ROOM`` to the best known."""
        return [t for t in range(len(self.tasks)) if float((self.best[t] - self.chance[t]).mean()) >= ROOM]

    def auc(self, policy: str) -> Array:
        """Normalized areas, shape (runs, telling tasks)."""
        curves = self.curves[policy]
        return np.array(
            [
                [statistics.normalized_auc(run[t], self.chance[t], float(self.best[t])) for t in self.telling]
                for run in curves
            ]
        )

    def score(self, policy: str) -> Score:
        """All figures of one policy."""
        curves, auc = self.curves[policy], self.auc(policy)
        final = curves[:, :, -1]
        runs = [episode for run in self.episodes[policy] for episode in run]
        evaluations = max(sum(episode.evaluations for episode in runs), 1)
        reached = [
            statistics.evaluations_to(run[t], NEAR * float(self.best[t])) or math.inf
            for run in curves
            for t in self.telling
        ]
        middle = float(np.median(reached)) if reached else math.inf
        return Score(
            policy,
            statistics.bootstrap(statistics.iqm, auc),
            statistics.bootstrap(statistics.iqm, final),
            math.exp(float(final.mean())),
            {f"{limit:g}": float((np.exp(final) > limit).mean()) for limit in FAST},
            sum(episode.correct for episode in runs) / evaluations,
            sum(episode.vain for episode in runs) / max(sum(len(e.curve) for e in runs), 1),
            middle if math.isfinite(middle) else None,
            {name: statistics.paired_difference(auc, self.auc(name)) for name in BASELINES if name != policy},
            {name: self.faster(policy, name) for name in BASELINES if name != policy},
            {
                name: statistics.probability_of_improvement(auc, self.auc(name))
                for name in BASELINES
                if name != policy
            },
        )

    def faster(self, policy: str, other: str) -> Interval:
        """How many times as fast the best kernel of ``policy`` is than ``other``'s while the search lasts."""
        held = (self.curves[name].mean(axis=2) for name in (policy, other))
        return statistics.paired_difference(*held).exp()

    @cached_property
    def scores(self) -> list[Score]:
        """Of all policies, the best AUC first; none if no task tells policies apart."""
        if not self.telling:
            return []
        return sorted((self.score(name) for name in self.policies), key=lambda score: -score.auc.value)

    def profile(self, policy: str, thresholds: Array) -> Array:
        """The share of runs whose AUC exceeds each threshold."""
        return statistics.performance_profile(self.auc(policy), thresholds)

    def verdict(self) -> str:
        """Which policies beat both baselines, that none does, or why that cannot be said."""
        if self.seen:
            return f"No verdict: {', '.join(self.seen)} had seen some of these tasks before."
        if not self.telling:
            return "No verdict: masked random reaches the best known at once on all tasks."
        runs = len(self.curves[CHANCE])
        if len(self.telling) < TASKS or runs < RUNS:
            return (
                f"No verdict: 95 % intervals need at least {TASKS} tasks that tell policies apart and {RUNS} searches of"
                f" each; here are {len(self.telling)} and {runs}."
            )
        names = [
            score.policy
            for score in self.scores
            if score.policy not in BASELINES and all(gap.low > 0 for gap in score.over.values())
        ]
        tasks = f"{len(self.telling)} tasks, {self.budget} evaluations"
        if not names:
            return f"No policy beats masked random and best-of-N with 95 % confidence ({tasks})."
        return f"Beyond masked random and best-of-N with 95 % confidence ({tasks}): {', '.join(names)}."

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: figures, and every run's curve and counts (``pooling`` reads them again)."""
        return {
            "budget": self.budget,
            "tasks": self.tasks,
            "telling": [self.tasks[t] for t in self.telling],
            "best_known": np.exp(self.best).tolist(),
            "runs": int(self.curves[CHANCE].shape[0]),
            "verdict": self.verdict(),
            "scores": [_plain(score) for score in self.scores],
            "episodes": {
                name: [[_recorded(episode) for episode in run] for run in runs]
                for name, runs in self.episodes.items()
            },
        }


def _recorded(episode: Episode) -> dict[str, Any]:
    """All but the kernels."""
    kept = {key: value for key, value in vars(episode).items() if key not in ("candidates", "leaders")}
    return kept | {"curve": [round(value, 5) for value in episode.curve.tolist()]}


def _plain(score: Score) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Interval):
            return {"value": value.value, "low": value.low, "high": value.high}
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    return {key: plain(value) for key, value in vars(score).items()}
