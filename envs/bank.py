"""Several replay tables side by side, as arrays that N episodes look up at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ke_gym.envs import spaces
from ke_gym.envs.prepared import N_ACTIONS, N_STRATEGIES, PENALTIES, prepared_of
from ke_gym.envs.table import REFUSED, Table

NOWHERE = -9
"""As a rival: none in any episode."""


class Bank:
    """All tables' versions, one row each. Table t's row 0 is at ``offsets[t]``; its reference is its last row.

    Per-episode arrays are indexed by a version's place in its own table, so they are as wide as the largest table.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = list(tables)
        prepared = [prepared_of(table) for table in self.tables]
        sizes = [len(table) for table in self.tables]
        self.offsets = np.cumsum([0, *(n + 1 for n in sizes)])[:-1]
        self.references = np.array(sizes)
        self.width = max(sizes) + 1
        rows = sum(sizes) + len(sizes)
        self.correct = np.zeros(rows, np.bool_)
        self.outcomes = np.zeros(rows, np.int64)
        self.values = np.zeros(rows)
        self.gaps = np.full(rows, -np.inf)
        self.rivals = np.full(rows, NOWHERE)
        self.improved = np.zeros(rows, np.bool_)
        self.costs = np.zeros(rows)
        self.penalties = np.zeros(rows)
        self.fanout = np.zeros((len(sizes), self.width), np.int64)
        self.totals = np.zeros((rows, N_ACTIONS), np.int64)
        self.counts = np.zeros((rows, N_ACTIONS), np.int64)
        self.first = np.zeros((rows, N_ACTIONS), np.int64)
        self.repeating = np.ones((rows, N_ACTIONS), np.bool_)
        """Whether the end of an edge's children counts as a duplicate."""
        self.draft = np.zeros(rows, np.int64)
        self.noise_first = np.zeros(rows, np.int64)
        self.noise_count = np.zeros(rows, np.int64)
        self.described_first = np.zeros(rows, np.int64)
        children: list[int] = []
        noise: list[float] = [0.0]
        described = [np.zeros((1, 26), np.float32)]
        described_rows = 1
        for t, (one, n) in enumerate(zip(prepared, sizes)):
            at = slice(self.offsets[t], self.offsets[t] + n)
            row = int(self.offsets[t])
            self.correct[at], self.outcomes[at] = one.correct, one.outcomes
            self.values[at] = np.where(one.correct, one.values, 0.0)
            self.gaps[at] = [low for low, _ in one.gaps]
            self.rivals[at], self.improved[at] = one.rivals, one.improved
            self.costs[at] = one.costs
            self.penalties[at] = [PENALTIES[outcome] for outcome in one.outcomes]
            self.fanout[t, :n] = np.where(one.correct, one.fanout[:n], 0)
            for node, draft in one.draft_of.items():
                self.draft[row + node] = draft
            self.described_first[at] = described_rows + np.arange(n) * one.described.shape[1]
            described.append(one.described.reshape(-1, 26))
            described_rows += len(described[-1])
            for node in range(n):
                if one.noise[node]:
                    self.noise_first[row + node], self.noise_count[row + node] = (
                        len(noise),
                        len(one.noise[node]),
                    )
                    noise += one.noise[node]
            self.totals[row : row + n + 1] = one.totals
            for node, by_action in enumerate(one.children):
                for action, made in enumerate(by_action):
                    self.first[row + node, action], self.counts[row + node, action] = len(children), len(made)
                    children += made
            for (node, action), kind in one.ends.items():
                self.repeating[row + node, action] = kind != REFUSED
        self.children = np.array([*children, 0])
        self.noise = np.array(noise)
        self.described = np.concatenate(described)
        self.starts = np.stack([one.start for one in prepared])
        self.recorded = self.totals[:, :N_STRATEGIES].astype(np.int16)
        assert self.described.shape[1] == spaces.LAYOUT["code"] + spaces.LAYOUT["profile"]


@lru_cache(maxsize=8)
def bank_of(tables: tuple[Table, ...]) -> Bank:
    """The bank of these tables, made once."""
    return Bank(tables)
