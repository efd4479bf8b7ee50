"""Which strategies can still gain something, by what limits their parent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.strategies import STRATEGIES

REACHED = 0.95
"""From this share of a measured peak on, that is what a kernel is held back by and nothing else."""


def worthwhile(evaluation: Evaluation | None) -> NDArray[np.bool_]:
    """Shape (22,): all strategies; of a kernel that reaches 95 % of a measured peak those that relieve what limits it.

    Device memory (or the matrix units) at its peak is no faster for better caching, latency or occupancy. Guesses of the
    limiter, far from any peak, rule nothing out.
    """
    found = np.ones(len(STRATEGIES), dtype=np.bool_)
    if evaluation is None:
        return found
    shown = evaluation.profile
    reached = {"dram": shown.bandwidth_share, "compute": shown.flops_share}
    if reached.get(evaluation.limiter, 0.0) >= REACHED:
        for strategy in STRATEGIES:
            found[strategy.id] = strategy.resource in (evaluation.limiter, "all")
    return found
