"""Several replay tables side by side, as arrays that N episodes look up at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ke_gym.envs import spaces
from ke_gym.envs.prepared import N_ACTIONS, N_STRATEGIES, PENALTIES, Prepared, prepared_of
from ke_gym.envs.table import REFUSED, Table
from ke_gym.envs.walk import KINDS
from ke_gym.evaluation.evaluation import OUTCOMES
from ke_gym.strategies import RESTART

NOWHERE = -9
"""As a rival: none in any episode."""
FACTS = (
    "correct", "value", "gap", "rival", "improved", "cost", "penalty", "outcome", "kind", "fanout", "draft",
    "noise_first", "noise_count",
)  # fmt: skip
"""What is known of a version, in the order of ``Bank.facts``; ``outcome`` as the observation shows it."""
EDGE = ("first", "count", "total", "repeating")
"""What is known of an action on a version, in the order of ``Bank.edges``: where its children lie, how many there are,
how often it can be taken, and whether the end of its children counts as a duplicate."""


class Bank:
    """All tables' versions, one row each. Table t's row 0 is at ``offsets[t]``; its reference is its last row.

    Rows are wide, so that an episode finds what it needs by one look-up instead of many. Per-episode arrays are indexed
    by a version's place in its own table: they are as wide as the largest table, and one place wider, for nothing.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = list(tables)
        prepared = [prepared_of(table) for table in self.tables]
        sizes = [len(table) for table in self.tables]
        self.offsets = np.cumsum([0, *(n + 1 for n in sizes)])[:-1]
        self.references = np.array(sizes)
        self.width = max(sizes) + 2
        rows = sum(sizes) + len(sizes)
        self.facts = np.zeros((rows, len(FACTS)))
        self.facts[:, FACTS.index("rival")] = NOWHERE
        edges = np.zeros((rows, N_ACTIONS, len(EDGE)), np.int64)
        edges[:, :, EDGE.index("repeating")] = 1
        self.described_first = np.zeros(rows, np.int64)
        """Of each version, the row of ``described`` for its first draft; other drafts follow. Row 0 is the reference's."""
        children: list[int] = []
        noise: list[float] = [0.0]
        described = [np.zeros((1, spaces.LAYOUT["code"] + spaces.LAYOUT["profile"]), np.float32)]
        described_rows = 1
        for offset, one, n in zip(self.offsets.tolist(), prepared, sizes):
            self.described_first[offset : offset + n] = described_rows + one.drafts * np.arange(n)
            described.append(one.described.reshape(n * one.drafts, -1))
            described_rows += len(described[-1])
            for node in range(n):
                self.facts[offset + node] = _facts(one, node, len(noise))
                noise += one.noise[node]
            for node, (by_action, totals) in enumerate(zip(one.children, one.totals)):
                for action, (made, total) in enumerate(zip(by_action, totals)):
                    edges[offset + node, action, :3] = len(children), len(made), total
                    children += made
            for (node, action), kind in one.ends.items():
                edges[offset + node, action, 3] = kind != REFUSED
        self.children = np.array([*children, 0])
        self.noise = np.array(noise)
        self.described = np.concatenate(described)
        self.starts = np.stack([one.start for one in prepared])
        self.recorded = edges[:, :N_STRATEGIES, EDGE.index("total")] > 0
        self.has_drafts = np.array([one.totals[one.reference][RESTART.id] > 0 for one in prepared])
        self.edges = edges.reshape(rows * N_ACTIONS, len(EDGE))


def _facts(one: Prepared, node: int, noise: int) -> tuple[float, ...]:
    outcome, correct, repeats = one.outcomes[node], one.correct[node], len(one.noise[node])
    return (
        correct,
        one.values[node] if correct else 0.0,
        one.gaps[node][0],
        one.rivals[node],
        one.improved[node],
        one.costs[node],
        PENALTIES[outcome],
        outcome / (len(OUTCOMES) - 1),
        KINDS[outcome],
        one.fanout[node] if correct else 0,
        one.draft_of.get(node, 0),
        noise if repeats and correct else 0,
        repeats if correct else 0,
    )


@lru_cache(maxsize=8)
def bank_of(tables: tuple[Table, ...]) -> Bank:
    """The bank of these tables, made once."""
    return Bank(tables)
