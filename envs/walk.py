"""One episode over a replay table, in plain Python: what the live session does, with recorded answers.

Everything that can be known of a table before an episode is computed once (``Prepared``); a step then touches a few
numbers, so that hundreds of thousands fit into a second. ``tests/envs/test_replay.py`` holds it against the live
environment, and the batched one against it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from ke_gym.envs.prepared import (
    DESCRIBED,
    HISTORY,
    N_ACTIONS,
    N_STRATEGIES,
    NOTHING,
    PENALTIES,
    PER_STRATEGY,
    SLICES,
    Prepared,
    Version,
)
from ke_gym.envs.spaces import PARENT_SLOTS
from ke_gym.envs.table import REPEATED
from ke_gym.evaluation.evaluation import OUTCOMES
from ke_gym.search import parents, reward
from ke_gym.search.observation import RECENT, Observation
from ke_gym.search.tree import Node, Tree
from ke_gym.strategies import ACTIONS, FIX, RESTART, STOP

FAST_RULES = ("best", "root")
_FIX, _RESTART, _STOP = FIX.id, RESTART.id, STOP.id
_TASK, _HARDWARE, _CODE, _PROFILE, _HISTORY, _STRATEGIES = SLICES.values()
_LOG_10, _LOG_MILESTONE, _LAST_OUTCOME = math.log(10), math.log(reward.MILESTONE), len(OUTCOMES) - 1
_CLIP, _REPAIRED = reward.CLIP, reward.REPAIR_BONUS
GAINED, COMPILED, WRONG, DULL = range(4)
"""Kinds of evaluations: won or failed otherwise, did not compile, was wrong, was correct but won nothing."""
KINDS = tuple({"compile": COMPILED, "correctness": WRONG}.get(outcome, GAINED) for outcome in OUTCOMES)
# The observation is written as bytes: an assignment to a slice of an array would take five times as long.
_FLOAT = np.dtype(np.float32).itemsize
_write_history = Struct(f"{HISTORY.stop - HISTORY.start}f").pack_into
_write_strategy = Struct("3f").pack_into
_write_one = Struct("f").pack_into
_HISTORY_AT, _STRATEGIES_AT, _STRATEGY = _FLOAT * HISTORY.start, _FLOAT * PER_STRATEGY, _FLOAT * 3
_DESCRIBED_AT, _DESCRIBED_END = _FLOAT * DESCRIBED.start, _FLOAT * DESCRIBED.stop
_PICTURE = _DESCRIBED_END - _DESCRIBED_AT
_NO_PICTURE = bytes(_PICTURE)


class Walk:
    """One episode of ``horizon`` steps. ``uniforms``: a random number for each (None: verdicts instead of repeats)."""

    __slots__ = (
        "_best_depth", "_best_share", "_breadth", "_broken", "_buffer", "_draft_share", "_drafts",
        "_dull_by_default", "_edges", "_flat", "_follows", "_gains", "_last_outcome", "_left", "_legal", "_masks",
        "_numbers", "_open", "_recent", "_seed", "_shown", "_shown_legal", "_told", "_tree", "_uniforms", "_used", "_versions",
        "_worked", "best", "best_at", "best_speedup", "best_value", "clock", "drafts_left", "duplicates",
        "evaluations", "horizon", "kind", "measured", "number", "parent", "prepared", "reference", "rule",
        "spent_dollars", "steps", "visited",
    )  # fmt: skip

    def __init__(
        self,
        prepared: Prepared,
        horizon: int,
        kind: reward.Kind,
        rule: str,
        uniforms: Sequence[float] | None,
        seed: int = 0,
    ) -> None:
        self.prepared, self.horizon, self.kind, self.rule = prepared, horizon, kind, rule
        self._uniforms, self._seed, self._follows = uniforms, seed, rule == "best"
        self._edges = prepared.edges
        reference = self.reference = self.parent = self._shown = prepared.reference
        self.steps = self.evaluations = self.number = self.duplicates = self._drafts = 0
        self.clock = self.spent_dollars = 0.0
        self.best = self.best_at = -1
        self.best_value, self.best_speedup = 0.0, 1.0
        self._best_share, self._best_depth = 0.0, 0.0
        """As the observation shows them."""
        self._dull_by_default = False
        """Whether the best is that as the first correct version, and won nothing either."""
        self.measured = NOTHING
        """The latest evaluation, as drawn."""
        self._last_outcome = self._draft_share = self._breadth = 0.0
        self.visited: dict[int, tuple[float, int, int]] = {}
        """Of every visited version, in order: the log-speedup drawn (0 if it failed), depth, and first draft."""
        self._used: dict[int, list[int]] = {}
        """How often each action was taken on each node."""
        self._left = {reference: 1}
        """Strategies that can still be taken, of visited versions; of the reference, that a parent may be it."""
        self._open = -1
        """The fastest visited version that has some; -1 if none has."""
        self._broken: dict[int, list[tuple[int, int]]] = {}
        """(failed version, repairs in a row) below each, the latest last."""
        self._recent = [0, 0, 0, 0]
        """How many of the latest ``RECENT`` evaluations are of each kind."""
        self.drafts_left = self._edges[reference][_RESTART][0] > 0
        self._worked: set[int] = set()
        self._gains: dict[int, tuple[int, int, float, int]] = {}
        """Of each strategy: tries, failures, the sum of its gains, and their number."""
        self._masks: dict[int, bytearray] = {}
        """Of each parent so far, a byte per action: 1 for strategies that can still be taken."""
        self._legal = bytearray(N_ACTIONS)
        self._shown_legal = np.frombuffer(self._legal, np.int8)
        """The legal actions now: as an array, over the bytes that are written."""
        self._buffer = bytearray(prepared.start)
        self._flat = np.frombuffer(self._buffer, np.float32)
        """The observation: as an array, over the bytes that are written."""
        self._told: list[tuple[int, int, int, int, bool, int]] = []
        """(version, origin, action, number, whether it became the best, kind) of every evaluation."""
        self._numbers: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._tree = None if rule in FAST_RULES else Tree()
        self._settle()

    # What is seen -----------------------------------------------------------------------------------------

    def observation(self) -> Observation:
        """The observation in arrays of its own."""
        flat = self._flat.copy()
        return {
            "task": flat[_TASK], "hardware": flat[_HARDWARE], "code": flat[_CODE], "profile": flat[_PROFILE],
            "history": flat[_HISTORY], "strategies": flat[_STRATEGIES],
        }  # fmt: skip

    def mask(self) -> NDArray[np.int8]:
        """The legal actions now, shape (25,), in an array of its own."""
        return self._shown_legal.copy()

    def slots(self) -> list[int]:
        """The parents that an extended action chooses from: the rule's own, then the fastest others."""
        others = [node for node in self.visited if node != self.parent and self.prepared.correct[node]]
        return [
            self.parent,
            *heapq.nlargest(PARENT_SLOTS - 1, others, key=lambda node: self.visited[node][0]),
        ]

    def extended_mask(self) -> NDArray[np.int8]:
        """The legal extended actions now, shape (91,): the strategies of every slot, then the controls."""
        blocks = [self._mask_of(node)[:N_STRATEGIES] for node in self.slots()]
        missing = bytes((PARENT_SLOTS - len(blocks)) * N_STRATEGIES)
        return np.frombuffer(bytearray(b"".join((*blocks, missing, self._legal[N_STRATEGIES:]))), np.int8)

    def _mask_of(self, node: int) -> bytearray:
        mask = self._masks.get(node)
        if mask is None:
            mask = self._masks[node] = bytearray(self.prepared.masks[node])
        return mask

    # Steps ------------------------------------------------------------------------------------------------

    def step(self, action: int, parent: int | None = None) -> tuple[str, float, Version | None]:
        """(outcome, reward, the new version). Observation and mask are then those of the next step.

        ``parent`` overrules the parent rule for a strategy: one of ``slots()``.
        """
        self.steps += 1
        legal = self._legal if parent is None else self._mask_of(parent)
        if not 0 <= action < N_ACTIONS or not legal[action]:
            return self._idle("illegal", reward.DUPLICATE_PENALTY)
        if action < N_STRATEGIES:
            origin = self.parent if parent is None else parent
        elif action == _RESTART:
            origin = self.reference
        elif action == _FIX:
            origin = self._broken[self.parent][-1][0]
        else:
            return self._idle("stop", 0.0)
        made = self._edges[origin][action]
        used = self._used.get(origin)
        if used is None:
            used = self._used[origin] = [0] * N_ACTIONS
        visited, k, end = self.visited, used[action] + 1, len(made)
        while k < end and made[k][0] in visited:
            k += 1
        self.number += 1
        total = made[0]
        taken = used[action] = k if k < end else total
        if taken >= total:  # nothing more is recorded
            if action < N_STRATEGIES:
                self._masks[origin][action] = 0
                self._left[origin] -= 1
                if origin == self._open and not self._left[origin]:
                    self._open = self._fastest()
            elif action == _RESTART:
                self.drafts_left = False
        if k < end:
            version: Version = made[k]
            value = self._tell(origin, action, version)
            self._settle()
            return version[2], value, version
        kind = self.prepared.ends.get((origin, action), REPEATED)
        self.duplicates += kind == REPEATED
        self.spent_dollars += self.prepared.dollars.get((origin, action, kind), 0.0)
        self._settle()
        return "refused", reward.DUPLICATE_PENALTY, None

    def _idle(self, outcome: str, value: float) -> tuple[str, float, None]:
        """A step that changes nothing but the budget that is left."""
        _write_one(self._buffer, _HISTORY_AT, 1.0 - self.steps / self.horizon)
        return outcome, value, None

    def _tell(self, origin: int, action: int, version: Version) -> float:
        """Add the version; returns the reward."""
        child, correct, _, code, measured, repeats, cost, rival, improved, low, left, _, _ = version
        if self._uniforms is not None:
            measured = repeats[int(self._uniforms[self.steps - 1] * len(repeats))]
        self.measured = measured
        value, visited, before, number = measured[0], self.visited, self.best_value, self.evaluations
        self.evaluations = number + 1
        self.clock += cost
        if self.prepared.dollars:
            self.spent_dollars += self.prepared.dollars.get((origin, action, child), 0.0)
        base = origin == self.reference
        if base:
            # A fresh draft has no parent: it is compared with the best so far.
            against, depth, root = before, 1, self.prepared.draft_of[child]
            self._drafts += 1
            self._draft_share = self._drafts / 5 if self._drafts < 5 else 1.0
        else:
            against, depth, root = visited[origin]
            depth += 1
        visited[child] = value, depth, root
        self._left[child] = left
        became = wins = False
        if correct:
            if left and (self._open < 0 or value > visited[self._open][0]):
                self._open = child
            if action not in self._worked:
                self._worked.add(action)
                self._breadth = min(len(self._worked) / N_STRATEGIES, 1.0)
            # A recorded race speaks of the rival it was run against (-1: the reference); else the interval has to do.
            wins = improved if rival == self.best else value + low > before
            kind = GAINED if wins else DULL
            if wins or self.best < 0:
                became = True
                self.best, self.best_at, self.best_value, self.best_speedup = (
                    child,
                    number,
                    value,
                    measured[1],
                )
                self._best_share = max(min(value / _LOG_10, 1.0), -1.0)
                self._best_depth = min(depth / 10, 1.0)
                self._dull_by_default = not wins
        else:
            kind = KINDS[code]
        self._last_outcome = code / _LAST_OUTCOME
        recent, all_told = self._recent, self._told
        recent[kind] += 1
        if number >= RECENT:
            recent[all_told[-RECENT][-1]] -= 1
        all_told.append((child, origin, action, self.number - 1, became, kind))
        if action < N_STRATEGIES:
            # The strategy's statistics, and what the observation says of them.
            tries, failures, gains, known = self._gains.get(action, (0, 0, 0.0, 0))
            tries += 1
            if not correct:
                failures += 1
            else:
                gains, known = gains + (value - against), known + 1
            self._gains[action] = tries, failures, gains, known
            mean = gains / (known or 1)
            _write_strategy(
                self._buffer,
                _STRATEGIES_AT + _STRATEGY * action,
                tries / 5 if tries < 5 else 1.0,
                (mean if mean > -1.0 else -1.0) if mean < 1.0 else 1.0,
                failures / tries,
            )
        if not correct or action == _FIX:
            self._repair(origin, action, child, correct)
        if self._tree is not None:
            self._grow(self._tree, all_told[-1])
        if not correct:
            return -1.0 if self.kind == "milestone" else PENALTIES[code]
        if self.kind == "milestone":
            return 1.0 if value <= _LOG_MILESTONE else 3.0 if became else 2.0
        best = 0.0
        if became and value > before:
            best = value - before if value - before < _CLIP else _CLIP
        if self.kind == "best":
            return best
        over = _REPAIRED
        if action != _FIX:
            over = value - against
            over = (over if over > -0.2 else -0.2) if over < _CLIP else _CLIP
        return over if self.kind == "parent" else best + reward.DENSITY * over

    def _repair(self, origin: int, action: int, child: int, correct: bool) -> None:
        """Keep track of failures worth a repair: the latest of a parent, at most twice in a row."""
        if action == _FIX:
            _, repairs = self._broken[self.parent].pop()
            if not correct and repairs == 0:
                self._broken[self.parent].append((child, 1))
        elif not correct:
            self._broken.setdefault(origin, []).append((child, 0))

    # Between steps ----------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Choose the next parent and write down what is seen of it."""
        reference, best = self.reference, self.best
        if self._tree is not None:
            parent = self._ruled(self._tree)
        else:
            parent = best if self._follows and best >= 0 else reference
            if not self._left[parent] and self._open >= 0:
                parent = self._open
        self.parent = parent
        legal = self._legal
        legal[:] = self._masks.get(parent) or self._mask_of(parent)
        legal[_RESTART] = self.drafts_left
        if self._broken:
            legal[_FIX] = self._repairable(parent)
        if parent != self._shown:
            self._shown = parent
            picture: bytes | memoryview = _NO_PICTURE
            if parent != reference:
                at = _PICTURE * (parent * self.prepared.drafts + self.visited[parent][2])
                picture = self.prepared.pictures[at : at + _PICTURE]
            self._buffer[_DESCRIBED_AT:_DESCRIBED_END] = picture
        gap = 0.0
        if best >= 0 and parent != best and parent != reference:
            gap = self.best_value - self.visited[parent][0]
        evaluations, duplicates, recent = self.evaluations, self.duplicates, self._recent
        count = (evaluations if evaluations < RECENT else RECENT) or 1
        since = evaluations - self.best_at - 1
        # Conditions instead of min and max: this runs at every step.
        _write_history(
            self._buffer,
            _HISTORY_AT,
            1.0 - self.steps / self.horizon,
            since / 10 if since < 10 else 1.0,
            self._best_share,
            (gap if gap > -1.0 else -1.0) if gap < 1.0 else 1.0,
            recent[COMPILED] / count,
            recent[WRONG] / count,
            (recent[DULL] - (self._dull_by_default and since < RECENT)) / count,
            duplicates / (evaluations + duplicates) if duplicates else 0.0,
            self._breadth,
            self._best_depth,
            self._last_outcome,
            self._draft_share,
        )

    def _repairable(self, node: int) -> bool:
        waiting = self._broken.get(node)
        if not waiting:
            return False
        failed = waiting[-1][0]
        used = self._used.get(failed)
        total: int = self._edges[failed][_FIX][0]
        return (used[_FIX] if used else 0) < total

    def _ruled(self, tree: Tree) -> int:
        """What a rule over the tree chooses, or the fastest open version where that has nothing left."""
        rng = np.random.default_rng((self._seed, self.number))
        node = parents.get(self.rule)(tree, {}, rng)
        parent = self.reference if node is None else self._versions[node.number]
        if parent != self.reference:
            spent = not self._left[parent]
        else:
            spent = self.best >= 0 and not self.drafts_left and not self._repairable(parent)
        return self._open if spent and self._open >= 0 else parent

    def _fastest(self) -> int:
        found, fastest = -1, -math.inf
        for node, (value, _, _) in self.visited.items():
            if self._left[node] and value > fastest:
                found, fastest = node, value
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

    def _grow(self, tree: Tree, told: tuple[int, int, int, int, bool, int]) -> None:
        child, origin, action, number, became, _ = told
        evaluation = self.prepared.evaluations[child]
        if evaluation.correct:
            evaluation = evaluation.replace(speedup=math.exp(self.visited[child][0]))
        above = None if origin == self.reference else self._numbers[origin]
        self._numbers[child], self._versions[number] = number, child
        node = Node(number, above, ACTIONS[action].name, 0, self.prepared.candidates[child], evaluation)
        # What became the best was decided above, where drawn repeats count.
        if tree.add(node, None):
            tree.leaders.pop()
        if became:
            tree.leaders.append(node)
        tree.best = tree.leaders[-1] if tree.leaders else None
