"""Anytime-valid statistics for paired races.

The sign e-process bets, with the Krichevsky-Trofimov (Beta(1/2, 1/2)) mixture, that the rounds a candidate
wins are not coin flips. Under the null its value is a non-negative martingale of mean 1, so stopping as soon
as it reaches ``1/alpha`` keeps the false-positive rate below ``alpha`` however often one looks (Ville).
Inverting it gives a confidence sequence for the median log-ratio. Source: Ramdas et al.,
"Game-theoretic statistics and safe anytime-valid inference" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ALPHA = 0.05
FEWEST = 6
"""Values of which order statistics bound the median with that confidence: the least and the greatest, of fewer, do not."""


def log_e_value(wins: int, losses: int) -> float:
    """Natural log of the KT sign e-process after ``wins`` and ``losses`` rounds (ties excluded)."""
    n = wins + losses
    log_beta = math.lgamma(wins + 0.5) + math.lgamma(losses + 0.5) - math.lgamma(n + 1) - math.log(math.pi)
    return log_beta + n * math.log(2)


@lru_cache(maxsize=4096)
def _order_statistic(n: int, alpha: float) -> int:
    """How many of ``n`` sorted values may lie below the median before the e-process objects; -1 if all may."""
    limit = math.log(1 / alpha)
    below = -1
    for k in range(n // 2 + 1):
        if log_e_value(k, n - k) >= limit:
            below = k
        else:
            break
    return below


def confidence_sequence(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float]:
    """Anytime-valid interval for the median of ``values``; infinite while there are too few of them."""
    ordered = sorted(values)
    k = _order_statistic(len(ordered), alpha)
    if k < 0:
        return -math.inf, math.inf
    return ordered[k], ordered[len(ordered) - 1 - k]


def sign_p_interval(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float]:
    """Fixed-sample interval for the median from order statistics (binomial); the range if there are few."""
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        return -math.inf, math.inf
    tail, k = 0.0, -1
    for i in range(n // 2):
        tail += math.comb(n, i) * 0.5**n
        if 2 * tail > alpha:
            break
        k = i
    return ordered[max(k, 0)], ordered[n - 1 - max(k, 0)]


_T975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % Student interval for the mean of a few independent values (process medians)."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    t = _T975[n - 2] if n - 2 < len(_T975) else 1.96
    half = t * float(np.std(values, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(values))
    return mean - half, mean + half


@dataclass
class SignTest:
    """A running sign e-process over log-ratios ``ln(rival / candidate)``: positive means a won round."""

    alpha: float = ALPHA

    def __post_init__(self) -> None:
        self.values: list[float] = []
        self.wins = 0
        self.losses = 0
        self.peak = 0.0

    def add(self, log_ratio: float) -> None:
        self.values.append(log_ratio)
        if log_ratio > 0:
            self.wins += 1
        elif log_ratio < 0:
            self.losses += 1
        self.peak = max(self.peak, log_e_value(self.wins, self.losses))

    @property
    def decided(self) -> bool:
        """Whether the e-process has ever reached ``1/alpha``: the two are not equally fast."""
        return self.peak >= math.log(1 / self.alpha)

    @property
    def median(self) -> float:
        return float(np.median(self.values)) if self.values else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return confidence_sequence(self.values, self.alpha)
