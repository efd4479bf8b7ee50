"""KernelBand: a bandit over clusters of kernels and strategies, with a profile mask (arXiv 2511.18868)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Scores, ScoringPolicy
from ke_gym.policies.base import Observation
from ke_gym.policies.features import part, pressures
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS, FIX, RESTART

CLUSTERS = 3
FIRST, EVERY = 6, 10  # kernels before the first clustering, and between two
SATURATED = 0.75  # of peak


class KernelBand(ScoringPolicy):
    """UCB per (cluster of the parent, strategy) on the reward max(0, 1 - child time / parent time).

    Kernels are clustered (k-means) by code and profile. Strategies that use a saturated resource better have
    no headroom and are masked; fusion, which takes work off it, is not. ``c`` is the exploration weight: the
    released 2.0 hardly exploits within 20 steps, so sweep it.
    """

    name = "kernelband"
    learned = ("c", "features", "actions", "rewards", "centers")

    def __init__(self, seed: int = 0, c: float = 2.0) -> None:
        super().__init__(seed)
        self.c = c
        self.begin()

    def begin(self) -> None:
        self.features: list[list[float]] = []
        self.actions: list[int] = []
        self.rewards: list[float] = []
        self.centers: list[list[float]] = []

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        cluster = self._cluster(_features(observation))
        here = [
            (a, r)
            for a, r, f in zip(self.actions, self.rewards, self.features)
            if self._cluster(f) == cluster
        ]
        here += [(action, 0.0) for action in np.repeat(np.arange(len(ACTIONS)), self.pending).tolist()]
        scores = np.full(len(ACTIONS), np.inf)
        for action in {a for a, _ in here}:
            gains = [r for a, r in here if a == action]
            bonus = 0.0 if deterministic else self.c * math.sqrt(math.log(len(here)) / len(gains))
            scores[action] = sum(gains) / len(gains) + bonus
        hopeless = _saturated(observation) & mask
        if not (mask & ~hopeless)[: FIX.id].any():
            hopeless[:] = False
        scores[hopeless] = -np.inf
        # A draft competes with the strategies only where there is nothing else to do.
        if mask[: RESTART.id].any():
            scores[RESTART.id] = -np.inf
        return scores

    def update(self, transition: Transition) -> None:
        self.features.append(_features(transition.observation))
        self.actions.append(transition.action)
        self.rewards.append(max(0.0, 1.0 - math.exp(-transition.reward)))
        if len(self.features) == FIRST or (len(self.features) - FIRST) % EVERY == 0:
            self.centers = k_means(np.array(self.features), CLUSTERS).tolist()

    def _cluster(self, features: list[float]) -> int:
        if not self.centers:
            return 0
        return int(np.argmin(((np.array(self.centers) - features) ** 2).sum(axis=1)))


def _features(observation: Observation) -> list[float]:
    """The parent's code and profile: what the paper clusters by (time, registers, memory, occupancy)."""
    return [*part(observation, "code").tolist(), *part(observation, "profile").tolist()]


def _saturated(observation: Observation) -> NDArray[np.bool_]:
    busy = pressures(observation) or {}
    return np.array([a.family != "fusion" and busy.get(a.resource, 0.0) >= SATURATED for a in ACTIONS])


def k_means(points: NDArray[np.float64], k: int, rounds: int = 20) -> NDArray[np.float64]:
    """At most ``k`` cluster centers of ``points`` (n, d), from a farthest-first start, so without chance."""
    centers = points[:1]
    for _ in range(1, k):
        distance = ((points[:, None] - centers) ** 2).sum(axis=2).min(axis=1)
        if distance.max() == 0.0:
            break
        centers = np.vstack([centers, points[distance.argmax()]])
    for _ in range(rounds):
        nearest = ((points[:, None] - centers) ** 2).sum(axis=2).argmin(axis=1)
        centers = np.stack(
            [points[nearest == i].mean(axis=0) if (nearest == i).any() else c for i, c in enumerate(centers)]
        )
    return centers
