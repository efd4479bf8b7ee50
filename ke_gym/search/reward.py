"""Rewards of one step: clipped log-gains, with penalties far below a typical gain.

``best`` sums to the final log-speedup, ``parent`` is denser and nearly stationary, so bandits prefer it.
"""

from __future__ import annotations

import math

from ke_gym.evaluation.evaluation import Evaluation

CLIP = math.log(3.0)
COMPILE_PENALTY = -0.05
FAILURE_PENALTY = -0.10
DUPLICATE_PENALTY = -0.05
REPAIR_BONUS = 0.05


def failure(evaluation: Evaluation) -> float:
    """The penalty of an evaluation that is not correct."""
    return COMPILE_PENALTY if evaluation.outcome in ("compile", "constraints") else FAILURE_PENALTY


def parent_gain(evaluation: Evaluation, parent_speedup: float, repair: bool = False) -> float:
    """``clip(ln(parent time / child time), -0.2, ln 3)``; ``parent_speedup`` 1 for the reference itself."""
    if not evaluation.correct or not evaluation.speedup:
        return failure(evaluation)
    if repair:
        return REPAIR_BONUS
    return min(max(math.log(evaluation.speedup / parent_speedup), -0.2), CLIP)


def best_gain(evaluation: Evaluation, best_speedup: float, became_best: bool) -> float:
    """``clip(ln(best time / new time), 0, ln 3)``, paid only for a verified new best."""
    if not evaluation.correct or not evaluation.speedup:
        return failure(evaluation)
    return min(max(math.log(evaluation.speedup / best_speedup), 0.0), CLIP) if became_best else 0.0
