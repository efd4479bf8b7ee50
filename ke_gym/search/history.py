"""The history part of an observation: what the search itself knows, as fixed float32 boxes in [-1, 1].

Twelve values about the search and three per strategy (layout: research on search policies, section 5). The
environments add task, hardware, code and profile beside them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ke_gym.evaluation.evaluation import OUTCOMES
from ke_gym.search.tree import Node, Tree
from ke_gym.strategies import STRATEGIES

Observation = dict[str, NDArray[np.float32]]

HISTORY = (
    "budget_left",
    "steps_since_improvement",
    "log_best_speedup",
    "parent_gap",
    "compile_failures",
    "wrong_failures",
    "slow_rate",
    "duplicate_rate",
    "archive_coverage",
    "tree_depth",
    "last_outcome",
    "drafts",
)
PER_STRATEGY = ("tries", "mean_gain", "failure_rate")


def observe(tree: Tree, parent: Node | None, budget_left: float, duplicates: int) -> Observation:
    """``{"history": (12,), "strategies": (22 * 3,)}``; names in ``HISTORY`` and ``PER_STRATEGY``."""
    nodes = list(tree)
    recent = nodes[-8:]
    count = max(len(recent), 1)
    log_best = math.log(tree.best.speedup) if tree.best else 0.0
    since = sum(1 for node in nodes if tree.best and node.number > tree.best.number)
    gap = math.log(tree.best.speedup / parent.speedup) if tree.best and parent and parent.correct else 0.0
    slow = sum(
        1 for node in recent if node.correct and node is not tree.best and not node.evaluation.improved
    )
    families = {node.strategy for node in nodes if node.correct}
    history = (
        budget_left,
        since / 10,
        log_best / math.log(10),
        gap,
        sum(1 for node in recent if node.evaluation.outcome == "compile") / count,
        sum(1 for node in recent if node.evaluation.outcome == "correctness") / count,
        slow / count,
        duplicates / max(len(nodes) + duplicates, 1),
        len(families) / len(STRATEGIES),
        tree.depth(tree.best) / 10,
        OUTCOMES.index(nodes[-1].evaluation.outcome) / (len(OUTCOMES) - 1) if nodes else 0.0,
        len(tree.children(None)) / 5,
    )
    return {"history": _box(history), "strategies": _box(_per_strategy(tree))}


def _per_strategy(tree: Tree) -> list[float]:
    tries = dict.fromkeys((s.name for s in STRATEGIES), 0)
    gains: dict[str, list[float]] = {name: [] for name in tries}
    failures = dict(tries)
    for node in tree:
        if node.strategy not in tries:
            continue
        tries[node.strategy] += 1
        parent = tree.nodes[node.parent] if node.parent is not None else None
        if not node.correct:
            failures[node.strategy] += 1
        elif parent is not None and parent.correct:
            gains[node.strategy].append(math.log(node.speedup / parent.speedup))
    values: list[float] = []
    for name, count in tries.items():
        gain = sum(gains[name]) / len(gains[name]) if gains[name] else 0.0
        values += [count / 5, gain, failures[name] / max(count, 1)]
    return values


def _box(values: tuple[float, ...] | list[float]) -> NDArray[np.float32]:
    return np.clip(np.asarray(values, dtype=np.float32), -1.0, 1.0)
