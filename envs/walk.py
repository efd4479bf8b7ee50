"""One episode over a replay table, in plain Python: what the live session does, with recorded answers.

Everything that can be known of a table before an episode is computed once (``Prepared``); a step then touches a few
numbers, so that hundreds of thousands fit into a second. ``tests/envs/test_replay.py`` holds it against the live
environment, and the batched one against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.envs import spaces
from ke_gym.envs.table import REPEATED, Table
from ke_gym.evaluation.evaluation import OUTCOMES, Cost, Evaluation
from ke_gym.search import parents, reward
from ke_gym.search.observation import RECENT, Observation
from ke_gym.search.tree import Node, Tree
from ke_gym.strategies import ACTIONS, FIX, RESTART, STOP, STRATEGIES

N_STRATEGIES, N_ACTIONS = len(STRATEGIES), len(ACTIONS)
_FIX, _RESTART, _STOP = FIX.id, RESTART.id, STOP.id
FAST_RULES = ("best", "root")
_ENDS = np.cumsum(list(spaces.LAYOUT.values())).tolist()
SLICES = {name: slice(end - size, end) for (name, size), end in zip(spaces.LAYOUT.items(), _ENDS)}
"""Where each part of the observation lies in the flat vector."""
DESCRIBED = slice(SLICES["code"].start, SLICES["profile"].stop)
HISTORY, PER_STRATEGY = SLICES["history"], SLICES["strategies"].start
_TASK, _HARDWARE, _CODE, _PROFILE, _, _STRATEGIES = SLICES.values()
_LOG_10, _LAST_OUTCOME = math.log(10), len(OUTCOMES) - 1
_COMPILE, _WRONG = OUTCOMES.index("compile"), OUTCOMES.index("correctness")
PENALTIES = tuple(
    reward.COMPILE_PENALTY if outcome in ("compile", "constraints") else reward.FAILURE_PENALTY
    for outcome in OUTCOMES
)
"""Of each outcome; meaningless for the first, which is ``correct``."""


class Prepared:
    """A table as a walk needs it. The reference is node ``n``, the last."""

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
        self.masks = (np.array(self.totals) > 0).astype(np.int8)
        self.masks[:, _FIX], self.masks[:, _STOP] = 0, 1
        self.fanout = self.masks[:, :N_STRATEGIES].sum(axis=1).tolist()
        self.correct = table.correct.tolist()
        self.outcomes = table.outcomes.tolist()
        self.values = table.log_speedup.tolist()
        with np.errstate(invalid="ignore"):
            gaps = table.log_interval - table.log_speedup[:, None]
        self.gaps = np.where(table.correct[:, None], gaps, 0.0).tolist()
        self.rivals, self.improved = table.rivals.tolist(), table.improved.tolist()
        self.costs = table.costs.sum(axis=1, dtype=np.float64).tolist()
        self.noise: list[list[float]] = [[] for _ in range(n)]
        for node, noise in zip(table.repeats[:, 0].tolist(), table.noise.tolist()):
            self.noise[node].append(noise)
        self.draft_of = {node: i for i, node in enumerate(table.drafts.tolist())}
        code = np.repeat(table.code[:, None], max(len(table.drafts), 1), axis=1)
        if len(table.drafts):
            code[:, :, -1] = np.clip(table.distances, -1.0, 1.0)
        # One row for code and profile, since they change together.
        self.described = np.concatenate(
            [code, np.repeat(table.profile[:, None], code.shape[1], axis=1)], axis=2
        )
        self.start = np.zeros(spaces.SIZE, dtype=np.float32)
        self.start[SLICES["task"]] = table.surroundings.task
        self.start[SLICES["hardware"]] = table.surroundings.hardware
        self.oracle = table.optimum

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


class Walk:
    """One episode of ``horizon`` steps. ``uniforms``: a random number for each (None: verdicts instead of repeats)."""

    def __init__(
        self,
        prepared: Prepared,
        horizon: int,
        kind: reward.Kind,
        rule: str,
        uniforms: Sequence[float] | None,
        seed: int = 0,
    ) -> None:
        self.prepared, self.horizon, self.kind, self.uniforms = prepared, horizon, kind, uniforms
        self.rule, self.seed = rule, seed
        self.steps = 0
        self.clock = self.spent_dollars = 0.0
        self.evaluations = self.number = self.duplicates = self.drafts = 0
        self.best = -1
        self.best_value = 0.0
        self.best_at = -1
        self.values: dict[int, float] = {}
        """Of every visited version, the log-speedup drawn; 0 for one that failed."""
        self.order: list[int] = []
        self.depth: dict[int, int] = {}
        self.root: dict[int, int] = {}
        self.used: dict[tuple[int, int], int] = {}
        self.masks: dict[int, NDArray[np.int8]] = {}
        self.left: dict[int, int] = {}
        """Strategies that can still be taken, of visited versions."""
        self.open = -1
        """The fastest visited version that has some; -1 if none has."""
        self.broken: dict[int, list[tuple[int, int]]] = {}
        """(failed version, repairs in a row) below each, the latest last."""
        self.recent: list[tuple[int, int, int]] = []
        """Of the latest evaluations: did not compile, was wrong, was correct but won nothing."""
        self.compiled = self.wrong = self.dull = 0
        """Their sums."""
        self.best_dull = False
        """Whether the best is that by default, as the first correct version, and won nothing either."""
        self.last_outcome = 0
        self.drafts_left = prepared.totals[prepared.reference][_RESTART] > 0
        self.worked: set[int] = set()
        self.tries = [0] * N_STRATEGIES
        self.failures = [0] * N_STRATEGIES
        self.gains = [0.0] * N_STRATEGIES
        self.gain_counts = [0] * N_STRATEGIES
        self.flat = prepared.start.copy()
        self.parent = self._shown = prepared.reference
        self.mask = prepared.masks[self.parent]
        """The legal actions: int8, shape (25,), owned by the walk."""
        self._told: list[tuple[int, int, int, int, bool]] = []
        """(version, origin, action, number, whether it became the best) of every evaluation."""
        self._numbers: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._tree: Tree | None = None if rule in FAST_RULES else Tree()
        self._settle()

    # What is seen -----------------------------------------------------------------------------------------

    def observation(self) -> Observation:
        """The observation in arrays of its own."""
        flat = self.flat.copy()
        return {
            "task": flat[_TASK], "hardware": flat[_HARDWARE], "code": flat[_CODE], "profile": flat[_PROFILE],
            "history": flat[HISTORY], "strategies": flat[_STRATEGIES],
        }  # fmt: skip

    def _mask_of(self, node: int) -> NDArray[np.int8]:
        mask = self.masks.get(node)
        if mask is None:
            mask = self.masks[node] = self.prepared.masks[node].copy()
        return mask

    def _repairable(self, node: int) -> int | None:
        waiting = self.broken.get(node)
        if not waiting:
            return None
        failed = waiting[-1][0]
        return failed if self.used.get((failed, _FIX), 0) < self.prepared.totals[failed][_FIX] else None

    # Steps ------------------------------------------------------------------------------------------------

    def step(self, action: int) -> tuple[str, float, int]:
        """(outcome, reward, the new version or -1). The observation and mask are then those of the next step."""
        self.steps += 1
        if not 0 <= action < N_ACTIONS or not self.mask[action]:
            self.flat[HISTORY.start] = 1.0 - self.steps / self.horizon
            return "illegal", reward.DUPLICATE_PENALTY, -1
        if action == _STOP:
            self.flat[HISTORY.start] = 1.0 - self.steps / self.horizon
            return "stop", 0.0, -1
        prepared = self.prepared
        if action == _RESTART:
            origin = prepared.reference
        elif action == _FIX:
            origin = self.broken[self.parent][-1][0]
        else:
            origin = self.parent
        made = prepared.children[origin][action]
        k = self.used.get((origin, action), 0)
        while k < len(made) and made[k] in self.values:
            k += 1
        self.number += 1
        if k == len(made):
            self._use(origin, action, prepared.totals[origin][action])
            kind = prepared.ends.get((origin, action), REPEATED)
            self.duplicates += kind == REPEATED
            self.spent_dollars += prepared.dollars.get((origin, action, kind), 0.0)
            self._settle()
            return "refused", reward.DUPLICATE_PENALTY, -1
        child = made[k]
        self._use(origin, action, k + 1)
        value = self._tell(origin, action, child)
        self._settle()
        return OUTCOMES[prepared.outcomes[child]], value, child

    def _use(self, origin: int, action: int, used: int) -> None:
        self.used[origin, action] = used
        if action == _RESTART:
            self.drafts_left = used < self.prepared.totals[origin][action]
        if used >= self.prepared.totals[origin][action] and action < N_STRATEGIES:
            mask = self._mask_of(origin)
            if mask[action]:
                mask[action] = 0
                self.left[origin] -= 1
                if origin == self.open and not self.left[origin]:
                    self.open = self._fastest()

    def _tell(self, origin: int, action: int, child: int) -> float:
        """Add the version; returns the reward."""
        prepared = self.prepared
        correct, outcome = prepared.correct[child], prepared.outcomes[child]
        value = prepared.values[child]
        noise = prepared.noise[child]
        if noise and correct and self.uniforms is not None:
            value += noise[int(self.uniforms[self.steps - 1] * len(noise))]
        base = origin == prepared.reference
        before_best = self.best_value if self.best >= 0 else 0.0
        against = before_best if base else self.values[origin] if prepared.correct[origin] else 0.0
        self.values[child] = value if correct else 0.0
        self.order.append(child)
        self.evaluations += 1
        self.clock += prepared.costs[child]
        self.spent_dollars += prepared.dollars.get((origin, action, child), 0.0)
        self.depth[child] = 1 if base else self.depth[origin] + 1
        self.root[child] = prepared.draft_of[child] if base else self.root[origin]
        self.left[child] = prepared.fanout[child] if correct else 0
        if self.left[child] and (self.open < 0 or value > self.values[self.open]):
            self.open = child
        self.drafts += base
        # A recorded race speaks of the rival it was run against (-1: the reference); else the interval has to do.
        matched = prepared.rivals[child] == self.best
        wins = correct and (
            prepared.improved[child] if matched else value + prepared.gaps[child][0] > before_best
        )
        became = wins or (correct and self.best < 0)
        if correct:
            self.worked.add(action)
        if became:
            self.best, self.best_value, self.best_at = child, value, self.evaluations - 1
            self.best_dull = not wins
        self._strategy(action, correct, value, against, known=not base and prepared.correct[origin])
        self._repair(origin, action, child, correct)
        self._remember(outcome == _COMPILE, outcome == _WRONG, correct and not wins)
        self.last_outcome = outcome
        self._told.append((child, origin, action, self.number - 1, became))
        if self._tree is not None:
            self._grow(self._tree, self._told[-1])
        if not correct:
            return -1.0 if self.kind == "milestone" else PENALTIES[outcome]
        if self.kind != "milestone":
            best = min(max(value - before_best, 0.0), reward.CLIP) if became else 0.0
            over = reward.REPAIR_BONUS if action == _FIX else min(max(value - against, -0.2), reward.CLIP)
            return (
                best
                if self.kind == "best"
                else over
                if self.kind == "parent"
                else best + reward.DENSITY * over
            )
        return 1.0 if value <= math.log(reward.MILESTONE) else 3.0 if became else 2.0

    def _strategy(self, action: int, correct: bool, value: float, against: float, known: bool) -> None:
        if action >= N_STRATEGIES:
            return
        self.tries[action] += 1
        if not correct:
            self.failures[action] += 1
        elif known:
            self.gain_counts[action] += 1
            self.gains[action] += value - against
        at, tries = PER_STRATEGY + 3 * action, self.tries[action]
        gain = self.gains[action] / (self.gain_counts[action] or 1)
        self.flat[at : at + 3] = (
            tries / 5 if tries < 5 else 1.0,
            (gain if gain > -1.0 else -1.0) if gain < 1.0 else 1.0,
            self.failures[action] / tries,
        )

    def _remember(self, compiled: int, wrong: int, dull: int) -> None:
        """The sums over the latest ``RECENT`` evaluations."""
        self.recent.append((compiled, wrong, dull))
        if len(self.recent) > RECENT:
            gone = self.recent.pop(0)
            compiled, wrong, dull = compiled - gone[0], wrong - gone[1], dull - gone[2]
        self.compiled += compiled
        self.wrong += wrong
        self.dull += dull

    def _repair(self, origin: int, action: int, child: int, correct: bool) -> None:
        """Keep track of failures worth a repair: the latest of a parent, at most twice in a row."""
        if action == _FIX:
            _, repairs = self.broken[self.parent].pop()
            if not correct and repairs == 0:
                self.broken[self.parent].append((child, 1))
        elif not correct:
            self.broken.setdefault(origin, []).append((child, 0))

    # Between steps ----------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Choose the next parent and write down what is seen of it."""
        prepared = self.prepared
        parent = self._ruled()
        if self._spent(parent) and self.rule != "root":
            parent = self.open if self.open >= 0 else parent
        self.parent = parent
        mask = self.mask = self._mask_of(parent)
        mask[_RESTART] = self.drafts_left
        mask[_FIX] = bool(self.broken) and self._repairable(parent) is not None
        flat, best, best_value, gap = self.flat, self.best, self.best_value, 0.0
        if parent != self._shown:
            self._shown = parent
            known = parent != prepared.reference
            flat[DESCRIBED] = prepared.described[parent, self.root[parent]] if known else 0.0
        if best >= 0 and parent != best and parent != prepared.reference:
            gap = best_value - self.values[parent]
        count, since = len(self.recent) or 1, self.evaluations - self.best_at - 1
        depth = self.depth[best] if best >= 0 else 0
        logged = best_value / _LOG_10
        # Conditions instead of min and max: this runs at every step.
        flat[HISTORY] = (
            1.0 - self.steps / self.horizon,
            since / 10 if since < 10 else 1.0,
            (logged if logged > -1.0 else -1.0) if logged < 1.0 else 1.0,
            (gap if gap > -1.0 else -1.0) if gap < 1.0 else 1.0,
            self.compiled / count,
            self.wrong / count,
            (self.dull - (self.best_dull and since < RECENT)) / count,
            self.duplicates / ((self.evaluations + self.duplicates) or 1),
            min(len(self.worked) / N_STRATEGIES, 1.0),
            depth / 10 if depth < 10 else 1.0,
            self.last_outcome / _LAST_OUTCOME,
            self.drafts / 5 if self.drafts < 5 else 1.0,
        )

    def _ruled(self) -> int:
        if self._tree is None:
            return self.best if self.rule == "best" and self.best >= 0 else self.prepared.reference
        rng = np.random.default_rng((self.seed, self.number))
        node = parents.get(self.rule)(self._tree, {}, rng)
        return self.prepared.reference if node is None else self._versions[node.number]

    def _spent(self, parent: int) -> bool:
        """Whether nothing that is recorded of this parent is left to try."""
        if parent != self.prepared.reference:
            return not self.left[parent]
        return self.best >= 0 and not self.drafts_left and self._repairable(parent) is None

    def _fastest(self) -> int:
        found, fastest = -1, -math.inf
        for node in self.order:
            if self.left[node] and self.values[node] > fastest:
                found, fastest = node, self.values[node]
        return found

    # As a search tree -------------------------------------------------------------------------------------

    def tree(self) -> Tree:
        """The episode so far as the search tree it stands for."""
        if self._tree is not None:
            return self._tree
        tree = Tree()
        for told in self._told:
            self._grow(tree, told)
        return tree

    def _grow(self, tree: Tree, told: tuple[int, int, int, int, bool]) -> None:
        child, origin, action, number, became = told
        evaluation = self.prepared.evaluations[child]
        if evaluation.correct:
            evaluation = evaluation.replace(speedup=math.exp(self.values[child]))
        above = None if origin == self.prepared.reference else self._numbers[origin]
        self._numbers[child], self._versions[number] = number, child
        node = Node(number, above, ACTIONS[action].name, 0, self.prepared.candidates[child], evaluation)
        # What became the best was decided above, where drawn repeats count.
        if tree.add(node, None):
            tree.leaders.pop()
        if became:
            tree.leaders.append(node)
        tree.best = tree.leaders[-1] if tree.leaders else None
