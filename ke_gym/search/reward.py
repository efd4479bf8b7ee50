"""Rewards of one step: clipped log-gains, with penalties far below a typical gain.

``best`` sums to the final log-speedup, ``parent`` is denser and nearly stationary, so bandits prefer it;
``dense`` is the first with a fifth of the second, so that steps between two bests say something too; ``milestone``
compares across tasks whose gains differ in size.
"""

from __future__ import annotations

import math
from typing import Literal

from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers import base as proposers

Kind = Literal["best", "parent", "dense", "milestone"]
KINDS: tuple[Kind, ...] = ("best", "parent", "dense", "milestone")

CLIP = math.log(3.0)
COMPILE_PENALTY = -0.05
FAILURE_PENALTY = -0.10
DUPLICATE_PENALTY = -0.05
REPAIR_BONUS = 0.05
DENSITY = 0.2
"""What a gain over the parent counts beside one over the best."""
MILESTONE = 1.05


def failure(evaluation: Evaluation) -> float:
    """The penalty of an evaluation that is not correct."""
    return COMPILE_PENALTY if evaluation.outcome in ("compile", "constraints") else FAILURE_PENALTY


def refusal(kind: proposers.Kind) -> float:
    """What an action is worth that brought no candidate: a model's unusable answer is as bad as a candidate that
    does not compile; an endpoint's failure is nobody's fault."""
    if kind in proposers.ANSWER_KINDS:
        return COMPILE_PENALTY
    return 0.0 if kind in proposers.ENDPOINT_KINDS or kind == "dollars" else DUPLICATE_PENALTY


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


def milestone(evaluation: Evaluation, became_best: bool) -> float:
    """-1 for a failure, 1 for correct, 2 beyond 5 % over the baseline, 3 if it is also a verified new best.

    After CUDA Agent's staged reward, whose highest stage is a stronger baseline; here that is the incumbent.
    """
    if not evaluation.correct or not evaluation.speedup:
        return -1.0
    if evaluation.speedup <= MILESTONE:
        return 1.0
    return 3.0 if became_best else 2.0


def reward(
    kind: Kind,
    evaluation: Evaluation,
    *,
    parent_speedup: float,
    best_speedup: float,
    became_best: bool,
    repair: bool = False,
) -> float:
    """The reward of this kind; the speedups are those before the step, 1 for the reference itself."""
    if kind == "milestone":
        return milestone(evaluation, became_best)
    if kind == "best":
        return best_gain(evaluation, best_speedup, became_best)
    gained = parent_gain(evaluation, parent_speedup, repair)
    if kind == "parent" or not evaluation.correct:
        return gained
    return best_gain(evaluation, best_speedup, became_best) + DENSITY * gained
