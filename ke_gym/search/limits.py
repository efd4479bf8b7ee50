"""Which strategies can still gain something, by what limits their parent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.strategies import STRATEGIES

REACHED = 0.95
"""From this share of a peak on, that is what a kernel is held back by and nothing else."""
PEAKS = ("dram", "compute")
"""Limiters whose peaks are measured and make the physical floor."""


def worthwhile(evaluation: Evaluation | None) -> NDArray[np.bool_]:
    """Shape (22,): all strategies; of a kernel that is within 5 % of its floor those that relieve what limits it.

    Device memory (or the matrix units) at its peak is no faster for better caching, latency or occupancy. Guesses of the
    limiter, far from any peak, rule nothing out.
    """
    found = np.ones(len(STRATEGIES), dtype=np.bool_)
    if evaluation is None or not evaluation.time_ms or evaluation.limiter not in PEAKS:
        return found
    if evaluation.profile.floor_ms >= REACHED * evaluation.time_ms:
        for strategy in STRATEGIES:
            found[strategy.id] = strategy.resource in (evaluation.limiter, "all")
    return found
