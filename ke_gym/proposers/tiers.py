"""Which of several models is asked: a cost-aware upper confidence bound.

The dearest model is worth its price only where its answers gain more; how much they gain shows only in the
search itself. After the model-choosing bandit of ShinkaEvolve (arXiv 2509.19349), with the cost as a penalty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EXPLORATION = 0.1
"""In log-speedup: about what a good proposal gains."""
COST_WEIGHT = 0.05
"""What the dearest model has to gain more than a free one to be preferred to it, in log-speedup."""


@dataclass
class _Tier:
    pending: int = 0
    tries: int = 0
    gain: float = 0.0
    dollars: float = 0.0


class Tiers:
    """``choose`` a model for a proposal, ``release`` it when that is written or given up, ``learn`` what it gained.

    Not thread-safe: for the search's thread.
    """

    def __init__(self, models: tuple[str, ...]) -> None:
        self._tiers = {model: _Tier() for model in models}
        self._guess = dict.fromkeys(models, 0.0)

    def expect(self, model: str, dollars: float) -> None:
        """About what a proposal of this model costs, as long as none has been paid."""
        self._guess[model] = dollars

    def choose(self) -> str:
        """The model with the best bound; those being asked count as tries that have gained nothing yet."""
        total = sum(tier.tries + tier.pending for tier in self._tiers.values())
        dearest = max(self._cost(model) for model in self._tiers) or 1.0

        def score(model: str) -> float:
            tier = self._tiers[model]
            n = tier.tries + tier.pending
            if n == 0:
                return math.inf
            bonus = EXPLORATION * math.sqrt(math.log(total + 1) / n)
            return tier.gain / n + bonus - COST_WEIGHT * self._cost(model) / dearest

        chosen = max(self._tiers, key=score)
        self._tiers[chosen].pending += 1
        return chosen

    def release(self, model: str) -> None:
        """A request for which ``choose`` named ``model`` is over, however it ended and whoever wrote the answer."""
        if model in self._tiers:
            self._tiers[model].pending -= 1

    @property
    def pending(self) -> int:
        """How many requests have been given a model and are not over."""
        return sum(tier.pending for tier in self._tiers.values())

    def _cost(self, model: str) -> float:
        tier = self._tiers[model]
        return tier.dollars / tier.tries if tier.tries else self._guess[model]

    def learn(self, model: str, gain: float, dollars: float) -> None:
        """A proposal of ``model`` gained ``gain``: log-speedup over its parent, a draft's over the best; or 0."""
        if model in self._tiers:
            tier = self._tiers[model]
            tier.tries += 1
            tier.gain += max(gain, 0.0)
            tier.dollars += dollars
