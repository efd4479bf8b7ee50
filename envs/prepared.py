"""A replay table as a walk over it needs it: all that can be known before an episode, computed once."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ke_gym.candidate import Candidate
from ke_gym.envs import spaces
from ke_gym.envs.table import Table
from ke_gym.evaluation.evaluation import OUTCOMES, Cost, Evaluation
from ke_gym.search import reward
from ke_gym.strategies import ACTIONS, FIX, STOP, STRATEGIES

N_STRATEGIES, N_ACTIONS = len(STRATEGIES), len(ACTIONS)
_ENDS = np.cumsum(list(spaces.LAYOUT.values())).tolist()
SLICES = {name: slice(end - size, end) for (name, size), end in zip(spaces.LAYOUT.items(), _ENDS)}
"""Where each part of the observation lies in the flat vector."""
DESCRIBED = slice(SLICES["code"].start, SLICES["profile"].stop)
HISTORY, PER_STRATEGY = SLICES["history"], SLICES["strategies"].start
PENALTIES = tuple(
    reward.COMPILE_PENALTY if outcome in ("compile", "constraints") else reward.FAILURE_PENALTY
    for outcome in OUTCOMES
)
"""Of each outcome; meaningless for the first, which is ``correct``."""

Measured = tuple[float, float, tuple[float, float]]
"""Log-speedup, speedup, and the speedup's interval."""
NOTHING: Measured = (0.0, 0.0, (0.0, 0.0))
Version = tuple[
    int, bool, str, int, Measured, tuple[Measured, ...], float, int, bool, float, int, str, str,
]  # fmt: skip
"""A version as a step needs it, at one place in memory: node, whether it is correct, its outcome by name and number,
its verdict and its repeats (the verdict alone where none is recorded), cost, rival, whether it improved on that, the
lower end of its interval over its value, the number of strategies recorded on it, id and source."""
Edge = tuple[Any, ...]
"""How often an action can be taken on a node, and the versions that it makes, one after the other."""


class Prepared:
    """A table's versions, edges and repeats as plain Python values. The reference is node ``n``, the last."""

    def __init__(self, table: Table) -> None:
        self.table = table
        n = len(table)
        self.reference = n
        self.children: list[list[tuple[int, ...]]] = [[()] * N_ACTIONS for _ in range(n + 1)]
        self.dollars: dict[tuple[int, int, int], float] = {}
        self.ends: dict[tuple[int, int], int] = {}
        """(node, action) to the kind of refusal recorded after its children."""
        for (parent, action, _, child), dollars in zip(table.edges.tolist(), table.dollars.tolist()):
            origin = parent if parent >= 0 else n
            if child < 0:
                self.ends[origin, action] = child
            else:
                self.children[origin][action] += (child,)
            if dollars:
                self.dollars[origin, action, child] = dollars
        self.totals = [
            [len(made) + ((node, action) in self.ends) for action, made in enumerate(row)]
            for node, row in enumerate(self.children)
        ]
        """How often each action can be taken on each node, a recorded refusal included."""
        masks = (np.array(self.totals) > 0).astype(np.int8)
        masks[:, FIX.id], masks[:, STOP.id] = 0, 1
        self.masks = [row.tobytes() for row in masks]
        """The actions recorded on each node (FIX is left to the walk): a byte for each, 0 or 1."""
        self.fanout: list[int] = masks[:, :N_STRATEGIES].sum(axis=1).tolist()
        self.correct: list[bool] = table.correct.tolist()
        self.outcomes: list[int] = table.outcomes.tolist()
        self.values: list[float] = table.log_speedup.tolist()
        with np.errstate(invalid="ignore"):
            gaps = table.log_interval - table.log_speedup[:, None]
        self.gaps: list[list[float]] = np.where(table.correct[:, None], gaps, 0.0).tolist()
        self.rivals: list[int] = table.rivals.tolist()
        self.improved: list[bool] = table.improved.tolist()
        self.costs: list[float] = table.costs.sum(axis=1, dtype=np.float64).tolist()
        self.noise: list[list[float]] = [[] for _ in range(n)]
        for node, noise in zip(table.repeats[:, 0].tolist(), table.noise.tolist()):
            self.noise[node].append(noise)
        self.draft_of = {node: i for i, node in enumerate(table.drafts.tolist())}
        code = np.repeat(table.code[:, None], max(len(table.drafts), 1), axis=1)
        if len(table.drafts):
            code[:, :, -1] = np.clip(table.distances, -1.0, 1.0)
        # One row for code and profile, since they change together.
        self.drafts = code.shape[1]
        self.described = np.concatenate(
            [code, np.repeat(table.profile[:, None], code.shape[1], axis=1)], axis=2
        )
        self.start = np.zeros(spaces.SIZE, dtype=np.float32)
        self.start[SLICES["task"]] = table.surroundings.task
        self.start[SLICES["hardware"]] = table.surroundings.hardware
        self.oracle = table.optimum
        known = [self._version(node) for node in range(n)]
        # Tuples, one of them for all that was never recorded: the less memory a walk meets, the faster it is.
        nothing: Edge = (0,)
        self.edges: tuple[tuple[Edge, ...], ...] = tuple(
            tuple(
                (total, *(known[child] for child in made)) if total else nothing
                for made, total in zip(row, totals)
            )
            for row, totals in zip(self.children, self.totals)
        )
        """What each action makes of each node."""

    def _version(self, node: int) -> Version:
        table, value = self.table, self.values[node]
        return (
            node,
            self.correct[node],
            OUTCOMES[self.outcomes[node]],
            self.outcomes[node],
            self._measured(node, value),
            tuple(self._measured(node, value + noise) for noise in self.noise[node] or (0.0,)),
            self.costs[node],
            self.rivals[node],
            self.improved[node],
            self.gaps[node][0],
            self.fanout[node] if self.correct[node] else 0,
            table.candidates[node],
            table.sources[node],
        )

    def _measured(self, node: int, value: float) -> Measured:
        if not self.correct[node]:
            return NOTHING
        low, high = self.gaps[node]
        return value, math.exp(value), (math.exp(value + low), math.exp(value + high))

    @cached_property
    def pictures(self) -> memoryview:
        """The bytes of ``described``, version after version and draft after draft."""
        return self.described.data.cast("B")

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Of every version, as far as a table remembers it."""
        table = self.table
        return [
            Evaluation(
                table.task, table.target, table.languages[i], table.candidates[i], OUTCOMES[table.outcomes[i]],
                speedup=math.exp(table.log_speedup[i]) if table.correct[i] else None,
                speedup_ci=(
                    (math.exp(table.log_interval[i, 0]), math.exp(table.log_interval[i, 1]))
                    if table.correct[i] else None
                ),
                baseline=table.baseline, improved=bool(table.improved[i]), threads=table.threads,
                machine=table.machine, cost=Cost(*table.costs[i].tolist()),
            )
            for i in range(len(table))
        ]  # fmt: skip

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Of every version; where it came from is the tree's to say."""
        return [
            Candidate(source, language) for source, language in zip(self.table.sources, self.table.languages)
        ]


@lru_cache(maxsize=256)
def prepared_of(table: Table) -> Prepared:
    """The table, prepared once."""
    return Prepared(table)
