"""Rotting bandit: what a strategy still gains falls with its use, along curves learned from earlier searches."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.bandit import Scores, ScoringPolicy
from ke_gym.policies.base import Observation, forced, transformations
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS, RESTART

USES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
"""Where the steps of a curve begin, in earlier uses of the strategy."""
USUAL = 0.02  # log-gain of a strategy about which nothing is known
WEIGHT = 10.0  # uses that this, and a strategy's own mean, are worth
SHARE = 0.5  # how much of a curve is what any strategy brings
KNOWN = 20  # uses from which on a strategy takes part in that
EXPLORED = 0.4  # share of training steps that are taken at random
DRAFTED = 0.3  # of these, how many are drafts, which are one action of many


class Rotting(ScoringPolicy):
    """The strategy that is expected to add most to the best speedup next, and a bonus for those seldom used.

    ``gains`` and ``uses``, shape (25, 13), say what a strategy added to the best log-speedup of the training searches
    at its first, second, ... use (shape ``USES``); their quotient, made to fall, is its curve. Half of each curve is
    that of all strategies together: on operators of another kind, what never paid may be what pays (fission on
    look-ups and ragged tensors). So every strategy is tried before one is repeated in vain, in the learned order.
    Within a search, each curve is scaled by what the strategy has yielded so far over what it should have, as under a
    Gamma prior of weight ``trust``. Source of the setting: Levine, Crammer and Mannor, Rotting Bandits (arXiv
    1702.07274).
    """

    name = "rotting"
    reward = "best"
    learned: ClassVar[tuple[str, ...]] = ("gains", "uses", "used", "yielded", "due", "c", "trust")

    positive = ("trust",)

    def __init__(self, seed: int = 0, c: float = 0.3, trust: float = 0.08) -> None:
        super().__init__(seed)
        self.c, self.trust = c, trust
        self.gains = np.zeros((len(ACTIONS), len(USES)))
        self.uses = np.zeros((len(ACTIONS), len(USES)))
        self.begin()

    def begin(self) -> None:
        self.used = np.zeros(len(ACTIONS), dtype=np.int64)
        """Uses in this search."""
        self.yielded = np.zeros(len(ACTIONS))
        """Log-speedup that each strategy added in it."""
        self.due = np.zeros(len(ACTIONS))
        """What its curve had promised."""
        self._curves = self.curves()

    def curves(self) -> Scores:
        """Expected gain of every action's next use, shape (25, 13), falling along each row."""
        usual = (self.gains.sum(1) + WEIGHT * USUAL) / (self.uses.sum(1) + WEIGHT)
        means = (self.gains + WEIGHT * usual[:, None]) / (self.uses + WEIGHT)
        known = self.uses >= KNOWN
        any_ = np.where(known.any(0), (means * known).sum(0) / np.maximum(known.sum(0), 1), usual.mean())
        return np.asarray(np.minimum.accumulate((1 - SHARE) * means + SHARE * any_, axis=1))

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        if self.training and self.rng.random() < EXPLORED:
            legal = transformations(mask)
            if mask[RESTART.id] and self.rng.random() < DRAFTED:
                return RESTART.id
            return int(self.rng.choice(legal))
        return super().choose(observation, mask, deterministic)

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        used = self.used + self.pending
        promised = self._promised(used)
        expected = promised * (self.trust + self.yielded) / (self.trust + self.due)
        seldom = np.sqrt(np.log(2.0 + used.sum()) / (1.0 + used))
        return np.asarray(expected + self.c * promised[mask].max() * seldom)

    def _promised(self, used: NDArray[np.int64]) -> Scores:
        return np.asarray(self._curves[np.arange(len(ACTIONS)), _step(used)])

    def update(self, transition: Transition) -> None:
        action, gain = transition.action, max(transition.reward, 0.0)
        if not forced(transition):
            self.due[action] += self._promised(self.used)[action]
            self.yielded[action] += gain
            if self.training:
                step = _step(self.used)[action]
                self.gains[action, step] += gain
                self.uses[action, step] += 1
        self.used[action] += 1

    def state_dict(self) -> dict[str, Any]:
        # Those at the search's beginning, while training moves on what they come from.
        return super().state_dict() | {"curves": self._curves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._curves = state.get("curves", self.curves())


def _step(used: NDArray[np.int64]) -> NDArray[np.intp]:
    """Where on its curve a strategy is after so many uses."""
    return np.searchsorted(USES, used, side="right") - 1
