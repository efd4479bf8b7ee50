"""Several replay tables side by side, as arrays that N episodes look up at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.envs.prepared import N_ACTIONS, PENALTIES, SIGNS, Prepared, prepared_of
from ke_gym.envs.spaces import LAYOUT
from ke_gym.envs.table import NO_RACE, REFERENCE, REPEATED, Table
from ke_gym.evaluation.evaluation import OUTCOMES
from ke_gym.search import reward
from ke_gym.strategies import STOP

ILLEGAL = N_ACTIONS
"""The action that every illegal one is taken for."""
WIDTH = N_ACTIONS + 1
NO_VERSION, REFUSED_VERSION, REPEATED_VERSION, STOPPED_VERSION, ILLEGAL_VERSION = range(5)
"""Places behind a table's versions: its reference, and what stands for a version where an action makes none."""
_PAID = (0.0, reward.DUPLICATE_PENALTY, reward.DUPLICATE_PENALTY, 0.0, reward.DUPLICATE_PENALTY)
REAL = ("value", "gap", "margin", "lift", "first_repeat", "repeats", "cost", "paid", "outcome")
"""What is known of a version in floating point, the first columns of ``Bank.facts``: log-speedup; the lower end of its
interval over that (-inf unless correct); 1 if it won its race, else -1; -inf unless strategies are recorded on it, else
0; its repeats, by their place in ``Bank.noise`` and their number; seconds; the reward where nothing is gained; the
outcome as the observation shows it."""
WHOLE = ("told", "correct", "repeated", "rival", "actions", "sign", "draft")
"""The other columns: whether it was evaluated, whether it is correct, whether it counts as a duplicate; what it raced
against; the actions recorded on it, as bits; its sign among the latest evaluations; its number as a draft."""
COLUMNS = {name: i for i, name in enumerate((*REAL, *WHOLE))}


class Bank:
    """All tables' versions, one row each; table t's begin at ``offsets[t]``, its reference follows them.

    A row of facts is wide, so that an episode finds all it needs at one place in memory: integers, and in a view of
    the same row floating point.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = list(tables)
        prepared = [prepared_of(table) for table in self.tables]
        self.references = np.array([len(table) for table in self.tables])
        sizes = self.references + len(_PAID)
        self.offsets = np.cumsum(sizes) - sizes
        self.width = int(sizes.max())
        """Places of the largest table: as many has an array that keeps something of every version."""
        self.facts = np.zeros((int(sizes.sum()), len(COLUMNS)), np.int64)
        edges = np.zeros((len(self.facts), WIDTH), np.int32)
        self.first = edges.ravel()
        """Where the children of an action lie in ``children``. A child is twice its place in the table, plus one if
        the action is exhausted then."""
        self.described = np.zeros((len(self.facts), LAYOUT["code"] + LAYOUT["profile"]), np.float32)
        self.distances = np.zeros(
            (len(self.facts), max(one.distances.shape[1] for one in prepared)), np.float32
        )
        noise: list[NDArray[Any]] = [np.zeros(1)]
        noises, children = 1, list[int]()
        for offset, one in zip(self.offsets.tolist(), prepared):
            n = one.reference
            self._put(slice(offset, offset + n), _facts(one, noises))
            self._put(slice(offset + n, offset + n + len(_PAID)), _no_facts(one))
            self.described[offset : offset + n] = one.described
            noise.append(one.table.noise)
            noises += len(one.table.noise)
            self.distances[offset : offset + n, : one.distances.shape[1]] = one.distances
            first = edges[offset : offset + n + 1]
            # A stop exhausts nothing, since nothing comes after it; whatever is illegal can be taken again and again.
            first[:, STOP.id], first[:, ILLEGAL] = len(children), len(children) + 1
            children += [2 * (n + STOPPED_VERSION), 2 * (n + ILLEGAL_VERSION) + 1]
            for node, (row, totals) in enumerate(zip(one.children, one.totals)):
                for action, total in enumerate(totals):
                    if total:
                        first[node, action] = len(children)
                        children += [2 * child + (k == total) for k, child in enumerate(row[action], 1)]
                        repeated = one.ends.get((node, action), REPEATED) == REPEATED
                        children.append(2 * (n + (REPEATED_VERSION if repeated else REFUSED_VERSION)) + 1)
        self.children = np.array(children)
        self.noise = np.concatenate(noise)
        self.starts = np.stack([one.start for one in prepared])

    def _put(self, rows: slice, facts: dict[str, Any]) -> None:
        real = self.facts.view(np.float64)
        for name, values in facts.items():
            (real if name in REAL else self.facts)[rows, COLUMNS[name]] = values


def _facts(one: Prepared, noise: int) -> dict[str, Any]:
    """Of a table's versions; its repeats begin at ``noise``."""
    table, n, correct = one.table, one.reference, one.table.correct
    repeats = np.where(correct, np.bincount(table.repeats[:, 0], minlength=n), 0)
    first = noise + np.searchsorted(table.repeats[:, 0], np.arange(n))
    actions = np.array(one.actions[:n], np.int64)
    draft = np.zeros(n, np.int64)
    draft[table.drafts] = np.arange(len(table.drafts))
    return {
        "value": np.where(correct, one.values, 0.0), "gap": np.where(correct, [gap for gap, _ in one.gaps], -np.inf),
        "margin": np.where(correct & table.improved, 1.0, -1.0),
        "lift": np.where(correct & (actions > 0), 0.0, -np.inf), "first_repeat": np.where(repeats, first, 0),
        "repeats": repeats, "cost": one.costs, "paid": np.where(correct, 0.0, np.take(PENALTIES, table.outcomes)),
        "outcome": table.outcomes / (len(OUTCOMES) - 1), "told": 1, "correct": correct, "actions": actions,
        "rival": np.where(table.rivals == REFERENCE, n, table.rivals), "sign": np.take(SIGNS, table.outcomes),
        "draft": draft,
    }  # fmt: skip


def _no_facts(one: Prepared) -> dict[str, Any]:
    """Of its reference, and of what stands for a version."""
    places = np.arange(len(_PAID))
    return {
        "gap": -np.inf, "margin": -1.0, "lift": -np.inf, "paid": _PAID, "repeated": places == REPEATED_VERSION,
        "rival": NO_RACE, "actions": np.where(places == NO_VERSION, one.actions[one.reference], 0),
    }  # fmt: skip


@lru_cache(maxsize=8)
def bank_of(tables: tuple[Table, ...]) -> Bank:
    """The bank of these tables, made once."""
    return Bank(tables)
