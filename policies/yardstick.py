"""The score that chooses among the stages of a training, on tables that it does not learn from."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

from ke_gym import policies
from ke_gym.envs import REPLAY, make
from ke_gym.envs.table import Table
from ke_gym.policies.base import Policy
from ke_gym.policies.comparison import ROOM
from ke_gym.policies.playing import Episode, play

RUNS = 20
"""Searches per table and horizon."""


class Yardstick:
    """Scores a policy on tables by the normalized area under its curve: 0 is masked random, 1 the best known.

    Every policy meets the same random numbers, and every search starts from the policy as it is: what one search
    teaches does not help the next. Normalized by the room of all tables together: those where chance leaves little
    weigh little.
    """

    def __init__(self, tables: Sequence[Table], horizons: Sequence[int], runs: int = RUNS) -> None:
        self.places = [(table, horizon) for table in tables for horizon in horizons]
        self.runs = runs
        chance = policies.make("masked_random")
        self.chance = [
            np.median([episode.curve for episode in self._episodes(chance, *place, 2 * runs)], axis=0)
            for place in self.places
        ]
        rooms = [float((np.log(t.optimum) - c).mean()) for (t, _), c in zip(self.places, self.chance)]
        self.room = max(sum(rooms), ROOM)

    def _episodes(self, policy: Policy, table: Table, horizon: int, runs: int) -> list[Episode]:
        env = make(
            REPLAY, tables=table, horizon=horizon, parent_rule=policy.parent_rule, reward=policy.reward
        )
        made = []
        for run in range(runs):
            probe = copy.deepcopy(policy)
            probe.training = False
            probe.reseed(run)
            made.append(play(probe, env, seed=run))
        return made

    def score(self, policy: Policy) -> dict[str, float]:
        """``auc``, its standard error ``noise`` over runs, ``log_speedup`` at the end, and ``validity`` (share of
        correct evaluations), over tables, horizons and runs."""
        gained, finals, correct, evaluations = np.zeros(self.runs), [], 0, 0
        for place, chance in zip(self.places, self.chance):
            episodes = self._episodes(policy, *place, self.runs)
            correct += sum(episode.correct for episode in episodes)
            evaluations += sum(episode.evaluations for episode in episodes)
            curves = np.array([episode.curve for episode in episodes])
            finals.append(float(curves[:, -1].mean()))
            gained += (curves - chance).mean(axis=1)
        auc = gained / self.room
        return {
            "auc": float(auc.mean()),
            "noise": float(auc.std() / math.sqrt(self.runs)),
            "log_speedup": float(np.mean(finals)),
            "validity": correct / max(evaluations, 1),
        }
