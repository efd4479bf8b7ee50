"""A replay table as a walk over it needs it: all that can be known before an episode, computed once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ke_gym.candidate import Candidate
from ke_gym.envs import spaces
from ke_gym.envs.table import REPEATED, Table
from ke_gym.evaluation.evaluation import OUTCOMES, Cost, Evaluation
from ke_gym.search import reward
from ke_gym.search.observation import CODE, RECENT
from ke_gym.strategies import ACTIONS, FIX, RESTART, STOP, STRATEGIES

N_STRATEGIES, N_ACTIONS = len(STRATEGIES), len(ACTIONS)
_ENDS = np.cumsum(list(spaces.LAYOUT.values())).tolist()
SLICES = {name: slice(end - size, end) for (name, size), end in zip(spaces.LAYOUT.items(), _ENDS)}
"""Where each part of the observation lies in the flat vector."""
DESCRIBED = slice(SLICES["code"].start, SLICES["profile"].stop)
DISTANCE = DESCRIBED.start + CODE.index("distance_to_root")
HISTORY, PER_STRATEGY = SLICES["history"], SLICES["strategies"].start
PENALTIES = tuple(
    reward.COMPILE_PENALTY if outcome in ("compile", "constraints") else reward.FAILURE_PENALTY
    for outcome in OUTCOMES
)
"""Of each outcome; meaningless for the first, which is ``correct``."""
PLAIN = (1 << N_STRATEGIES) - 1
"""The bits of the strategies in a set of actions."""

FIELD, WINDOW = 16, (1 << RECENT) - 1
"""The latest ``RECENT`` evaluations are four fields of bits in one number, the latest lowest: which were slow (correct,
but won nothing), which did not compile, which were wrong, and which is slow, but the best nevertheless."""
WINDOWS = sum(WINDOW << FIELD * i for i in range(4))
SLOW, SLOW_BEST = 1, 1 << 3 * FIELD
SIGNS = tuple({"compile": 1 << FIELD, "correctness": 1 << 2 * FIELD}.get(outcome, 0) for outcome in OUTCOMES)
"""What a failed evaluation of each outcome adds to the fields."""

Told = dict[str, Any]
"""What ``info`` says of a step, as far as it does not depend on the episode: to copy and complete."""
Version = tuple[int, bool, int, int, bool, float, int, float, float, Told]
"""What a step needs of a version, at one place in memory: node, whether it is correct, its outcome by number, its rival,
whether it improved on that, the lower end of its interval over its value, the actions recorded on it, its cost, its
log-speedup as drawn, and what is told of it."""
Edge = tuple[int, ...]
"""How often an action can be taken on a node, the nodes that it makes one after the other, and what ends them: ``REFUSED``
or ``REPEATED``."""


def told(
    task: str, outcome: str, candidate: str = "", source: str = "", speedup: float = 0.0,
    interval: tuple[float, float] = (0.0, 0.0), cost: float = 0.0,
) -> Told:  # fmt: skip
    """All keys of ``info``, those of the episode not yet filled in."""
    return {
        "action_mask": None, "task": task, "outcome": outcome, "candidate": candidate, "source": source,
        "speedup": speedup, "speedup_ci": interval, "best_speedup": 1.0, "cost_s": cost, "clock_s": 0.0, "dollars": 0.0,
        "evaluations": 0, "reason": "",
    }  # fmt: skip


class Prepared:
    """A table's versions, edges and repeats as plain Python values. The reference is node ``n``, the last."""

    def __init__(self, table: Table) -> None:
        self.table, self.name = table, table.task
        n = len(table)
        self.reference = n
        self.begun, self.stopped, self.illegal, self.not_made = (
            told(table.task, outcome) for outcome in ("", "stop", "illegal", "refused")
        )
        """Told of steps that evaluate nothing."""
        known = list(range(n))  # one object for each number: fewer to fetch
        self.children: list[list[tuple[int, ...]]] = [[()] * N_ACTIONS for _ in range(n + 1)]
        self.dollars: dict[tuple[int, int, int], float] = {}
        self.ends: dict[tuple[int, int], int] = {}
        """(node, action) to the kind of refusal recorded after its children."""
        for (parent, action, _, child), dollars in zip(table.edges.tolist(), table.dollars.tolist()):
            origin = parent if parent >= 0 else n
            if child < 0:
                self.ends[origin, action] = child
            else:
                self.children[origin][action] += (known[child],)
            if dollars:
                self.dollars[origin, action, child] = dollars
        self.totals = [
            [len(made) + ((node, action) in self.ends) for action, made in enumerate(row)]
            for node, row in enumerate(self.children)
        ]
        """How often each action can be taken on each node, a recorded refusal included."""
        self.correct: list[bool] = table.correct.tolist()
        kept = np.zeros((n + 1, N_ACTIONS), np.bool_)
        kept[:n, :N_STRATEGIES] = table.correct[:, None]
        kept[:n, FIX.id] = ~table.correct
        kept[n, RESTART.id] = True
        legal = kept & (np.array(self.totals) > 0)
        legal[n, STOP.id] = True
        self.actions: list[int] = (legal @ (1 << np.arange(N_ACTIONS))).tolist()
        """The legal actions that each node brings, as bits: strategies of correct versions, FIX of failed ones,
        RESTART and STOP of the reference. What is legal is the union of parent, failure and reference."""
        sets: dict[int, int] = {}
        self.spread = [sets.setdefault(*[int.from_bytes(row.tobytes(), "little")] * 2) for row in legal]
        """The same with a byte for each action, so that the bytes are a mask."""
        self.outcomes: list[int] = table.outcomes.tolist()
        self.values: list[float] = table.log_speedup.tolist()
        with np.errstate(invalid="ignore"):
            gaps = table.log_interval - table.log_speedup[:, None]
        self.gaps: list[list[float]] = np.where(table.correct[:, None], gaps, 0.0).tolist()
        self.rivals: list[int] = [known[rival] if rival >= 0 else rival for rival in table.rivals.tolist()]
        self.improved: list[bool] = table.improved.tolist()
        self.costs: list[float] = table.costs.sum(axis=1, dtype=np.float64).tolist()
        self.noise: list[list[float]] = [[] for _ in range(n)]
        for node, noise in zip(table.repeats[:, 0].tolist(), table.noise.tolist()):
            self.noise[node].append(noise)
        self.draft_of = {node: i for i, node in enumerate(table.drafts.tolist())}
        self.described = np.concatenate([table.code, table.profile], axis=1)
        """Code and profile of each version side by side, since they change together; its distances to drafts apart."""
        self.pictures = self.described.tobytes()
        self.distances = np.clip(table.distances, -1.0, 1.0)
        self.start = np.zeros(spaces.SIZE, dtype=np.float32)
        self.start[SLICES["task"]] = table.surroundings.task
        self.start[SLICES["hardware"]] = table.surroundings.hardware
        self.oracle = table.optimum
        nothing: Edge = (0,)
        self.edges: tuple[tuple[Edge, ...], ...] = tuple(
            tuple(
                (total, *made, self.ends.get((node, action), REPEATED)) if total else nothing
                for action, (made, total) in enumerate(zip(row, totals))
            )
            for node, (row, totals) in enumerate(zip(self.children, self.totals))
        )
        """What each action makes of each node."""

    @cached_property
    def drawn(self) -> tuple[tuple[Version, ...], ...]:
        """Every version as each of its recorded repeats shows it; its verdict where none is recorded."""
        return tuple(tuple(self._versions(node, noise or (0.0,))) for node, noise in enumerate(self.noise))

    @cached_property
    def judged(self) -> tuple[tuple[Version, ...], ...]:
        """Every version by its verdict alone."""
        return tuple(tuple(self._versions(node, (0.0,))) for node in range(self.reference))

    def _versions(self, node: int, noises: Sequence[float]) -> Iterator[Version]:
        table, value, (low, high), cost = self.table, self.values[node], self.gaps[node], self.costs[node]
        correct, code = self.correct[node], self.outcomes[node]
        known = table.task, OUTCOMES[code], table.candidates[node], table.sources[node]
        for noise in noises:
            drawn, speedup, interval = 0.0, 0.0, (0.0, 0.0)
            if correct:
                drawn = value + noise
                speedup, interval = math.exp(drawn), (math.exp(drawn + low), math.exp(drawn + high))
            yield (
                node, correct, code, self.rivals[node], self.improved[node], low, self.spread[node], cost, drawn,
                told(*known, speedup, interval, cost),
            )  # fmt: skip

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
