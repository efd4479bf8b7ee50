"""One episode over a replay table, in plain Python: what the live session does, with recorded answers.

Everything that can be known of a table before an episode is computed once (``Prepared``); a step then touches a few
numbers, so that hundreds of thousands fit into a second. ``tests/envs/test_replay.py`` holds it against the live
environment, and the batched one against it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from ke_gym.envs.prepared import (
    DESCRIBED,
    DISTANCE,
    FIELD,
    HISTORY,
    N_ACTIONS,
    N_STRATEGIES,
    PENALTIES,
    PER_STRATEGY,
    SIGNS,
    SLICES,
    SLOW,
    SLOW_BEST,
    WINDOW,
    WINDOWS,
    Prepared,
    Told,
    Version,
)
from ke_gym.envs.spaces import PARENT_SLOTS
from ke_gym.envs.table import REPEATED
from ke_gym.evaluation.evaluation import OUTCOMES
from ke_gym.search import parents, reward
from ke_gym.search.observation import RECENT, Observation
from ke_gym.search.tree import Node, Tree
from ke_gym.strategies import ACTIONS, FIX, RESTART

FAST_RULES = ("best", "root")
_FIX, _RESTART = FIX.id, RESTART.id
_LOG_10, _LOG_MILESTONE, _LAST_OUTCOME = math.log(10), math.log(reward.MILESTONE), len(OUTCOMES) - 1
_CLIP, _REPAIRED = reward.CLIP, reward.REPAIR_BONUS
# The observation is written as bytes: an assignment to a slice of an array would take five times as long.
_FLOAT = np.dtype(np.float32).itemsize
_write_history = Struct(f"{HISTORY.stop - HISTORY.start}f").pack_into
_write_strategy = Struct("3f").pack_into
_write_one = Struct("f").pack_into
_HISTORY_AT, _STRATEGIES_AT, _STRATEGY = _FLOAT * HISTORY.start, _FLOAT * PER_STRATEGY, _FLOAT * 3
_PICTURE_AT, _DISTANCE_AT = _FLOAT * DESCRIBED.start, _FLOAT * DISTANCE
_PICTURE = _FLOAT * (DESCRIBED.stop - DESCRIBED.start)
_write_picture = Struct(f"{_PICTURE}s").pack_into
_parts = itemgetter(*SLICES.values())
# Sets of actions have a byte for each.
_ONLY = tuple(1 << 8 * i for i in range(N_ACTIONS))
_STRATEGIES_ONLY = sum(_ONLY[:N_STRATEGIES])


@lru_cache(maxsize=1 << 14)
def _shares(recent: int, count: int) -> tuple[float, float, float]:
    """Shares of the latest ``count`` evaluations: those that were slow, did not compile, were wrong."""
    slow, compiled, wrong = ((recent >> FIELD * i & WINDOW).bit_count() / (count or 1) for i in range(3))
    return slow, compiled, wrong


Visit = tuple[float, int, int, int, int, int, bool]
"""Of a visited version: the log-speedup drawn (0 if it failed), depth, first draft, origin, the action that made it, its
number, and whether it became the best."""


class Walk:
    """One episode of ``horizon`` steps. ``uniforms``: a random number for each (None: verdicts instead of repeats)."""

    __slots__ = (
        "_actions", "_best_depth", "_best_share", "_breadth", "_broken", "_buffer", "_draft_share",
        "_edges", "_flat", "_follows", "_last_outcome", "_legal", "_numbers", "_open",
        "_places", "_recent", "_seed", "_shown", "_shown_legal", "_statistics", "_tree", "_uniforms",
        "_used", "_versions", "best", "best_at", "best_speedup", "best_value", "clock", "duplicates",
        "evaluations", "horizon", "kind", "number", "parent", "prepared", "reference", "rule",
        "spent_dollars", "steps", "stopped", "told", "visited",
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
        self._uniforms = uniforms or (0.0,) * horizon
        self._seed, self._follows = seed, rule == "best"
        self._edges = prepared.edges
        self._versions = prepared.judged if uniforms is None else prepared.drawn
        reference = self.reference = self.parent = self._shown = prepared.reference
        self.steps = self.evaluations = self.number = self.duplicates = 0
        self.clock = self.spent_dollars = 0.0
        self.best = self.best_at = -1
        self.best_value, self.best_speedup = 0.0, 1.0
        self.told, self.stopped = prepared.begun, False
        """What ``info`` says of the latest step whatever the episode; whether that was STOP."""
        self._best_share = self._best_depth = self._last_outcome = self._draft_share = self._breadth = 0.0
        """As the observation shows them."""
        self.visited: dict[int, Visit] = {}
        self._used: dict[int, int] = {}
        """How far each action has come on each node."""
        self._actions = {reference: prepared.spread[reference]}
        """What can still be taken, of visited versions and the reference."""
        self._open = -1
        """The fastest visited version that has a strategy left; -1 if none has."""
        self._broken: dict[int, list[tuple[int, int]]] = {}
        """(failed version, repairs in a row) below each, the latest last."""
        self._recent = 0
        """The latest evaluations, as fields of bits."""
        self._statistics: dict[int, tuple[int, int, float]] = {}
        """Of each action: how often it was tried, how often it failed, the sum of its gains."""
        self._legal = bytearray(N_ACTIONS)
        self._shown_legal = np.frombuffer(self._legal, np.int8)
        """The legal actions now: as an array, over the bytes that are written."""
        self._buffer = bytearray(prepared.start)
        self._flat = np.frombuffer(self._buffer, np.float32)
        """The observation: as an array, over the bytes that are written."""
        self._numbers: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._tree = None if rule in FAST_RULES else Tree()
        self._settle()

    # What is seen -----------------------------------------------------------------------------------------

    def observation(self) -> Observation:
        """The observation in arrays of its own."""
        task, hardware, code, profile, history, strategies = _parts(self._flat.copy())
        return {
            "task": task, "hardware": hardware, "code": code, "profile": profile,
            "history": history, "strategies": strategies,
        }  # fmt: skip

    def mask(self) -> NDArray[np.int8]:
        """The legal actions now, shape (25,), in an array of its own."""
        return self._shown_legal.copy()

    def info(self) -> Told:
        """What is told of the latest step."""
        info = self.told.copy()
        info["action_mask"] = self._shown_legal.copy()
        info["best_speedup"] = self.best_speedup
        info["clock_s"] = self.clock
        info["evaluations"] = self.evaluations
        return info

    def slots(self) -> list[int]:
        """The parents that an extended action chooses from: the rule's own, then the fastest others."""
        others = [node for node in self.visited if node != self.parent and self.prepared.correct[node]]
        return [
            self.parent,
            *heapq.nlargest(PARENT_SLOTS - 1, others, key=lambda node: self.visited[node][0]),
        ]

    def extended_mask(self) -> NDArray[np.int8]:
        """The legal extended actions now, shape (91,): the strategies of every slot, then the controls."""
        blocks = [self._actions[node] & _STRATEGIES_ONLY for node in self.slots()]
        blocks += [0] * (PARENT_SLOTS - len(blocks))
        shown = b"".join(block.to_bytes(N_ACTIONS, "little")[:N_STRATEGIES] for block in blocks)
        return np.frombuffer(bytearray(shown + self._legal[N_STRATEGIES:]), np.int8)

    # Steps ------------------------------------------------------------------------------------------------

    def step(self, action: int, parent: int | None = None) -> float:
        """The reward; ``told`` says what was done. Observation and mask are then those of the next step.

        ``parent`` overrules the parent rule for a strategy: one of ``slots()``.
        """
        self.steps += 1
        legal = self._legal if parent is None else self._actions[parent].to_bytes(N_ACTIONS, "little")
        if not 0 <= action < N_ACTIONS or not legal[action]:
            return self._idle(reward.DUPLICATE_PENALTY, self.prepared.illegal)
        if action < N_STRATEGIES:
            origin = self.parent if parent is None else parent
        elif action == _RESTART:
            origin = self.reference
        elif action == _FIX:
            origin = self._broken[self.parent][-1][0]
        else:
            self.stopped = True
            return self._idle(0.0, self.prepared.stopped)
        made, visited, place = self._edges[origin][action], self.visited, origin * N_ACTIONS + action
        k = self._used.get(place, 0) + 1
        while made[k] in visited:
            k += 1
        self.number += 1
        if k < made[0]:
            self._used[place] = k
        else:  # nothing more is recorded
            left = self._actions[origin] = self._actions[origin] ^ _ONLY[action]
            if origin == self._open and not left:
                self._open = self._fastest()
        child = made[k]
        if child >= 0:
            repeats = self._versions[child]
            paid = self._tell(origin, action, repeats[int(self._uniforms[self.steps - 1] * len(repeats))])
        else:
            self.duplicates += child == REPEATED
            self.spent_dollars += self.prepared.dollars.get((origin, action, child), 0.0)
            self.told, paid = self.prepared.not_made, reward.DUPLICATE_PENALTY
        self._settle()
        return paid

    def _idle(self, paid: float, told: Told) -> float:
        """A step that changes nothing but the budget that is left."""
        self.told = told
        _write_one(self._buffer, _HISTORY_AT, 1.0 - self.steps / self.horizon)
        return paid

    def _tell(self, origin: int, action: int, version: Version) -> float:
        """Add the version; returns the reward."""
        child, correct, code, rival, improved, low, actions, cost, value, self.told = version
        visited, before, number = self.visited, self.best_value, self.evaluations
        self.evaluations = number + 1
        self.clock += cost
        if self.prepared.dollars:
            self.spent_dollars += self.prepared.dollars.get((origin, action, child), 0.0)
        if action == _RESTART:
            # A fresh draft has no parent: it is compared with the best so far.
            against, depth, root = before, 1, self.prepared.draft_of[child]
        else:
            against, depth, root, *_ = visited[origin]
            depth += 1
        self._actions[child] = actions
        tries, failures, gains = self._statistics.get(action, (0, 0, 0.0))
        tries += 1
        became = wins = False
        recent = self._recent << 1 & WINDOWS
        if correct:
            if actions and (self._open < 0 or value > visited[self._open][0]):
                self._open = child
            if tries - failures == 1:
                self._breadth = min(self._breadth + 1 / N_STRATEGIES, 1.0)
            gains += value - against
            # A recorded race speaks of the rival it was run against (-1: the reference); else the interval has to do.
            wins = improved if rival == self.best else value + low > before
            if wins or self.best < 0:
                became = True
                self.best, self.best_at, self.best_value, self.best_speedup = (
                    child,
                    number,
                    value,
                    self.told["speedup"],
                )
                self._best_share = max(min(value / _LOG_10, 1.0), -1.0)
                self._best_depth = min(depth / 10, 1.0)
                recent = recent % SLOW_BEST | recent // SLOW_BEST
                if not wins:
                    recent |= SLOW_BEST
            else:
                recent |= SLOW
        else:
            failures += 1
            recent |= SIGNS[code]
        self._recent = recent
        self._last_outcome = code / _LAST_OUTCOME
        visited[child] = value, depth, root, origin, action, self.number - 1, became
        self._statistics[action] = tries, failures, gains
        share = tries / 5 if tries < 5 else 1.0
        if action < N_STRATEGIES:
            mean = gains / (tries - failures or 1)
            _write_strategy(
                self._buffer,
                _STRATEGIES_AT + _STRATEGY * action,
                share,
                (mean if mean > -1.0 else -1.0) if mean < 1.0 else 1.0,
                failures / tries,
            )
        elif action == _RESTART:
            self._draft_share = share
        if not correct or action == _FIX:
            self._repair(origin, action, child, correct)
        if self._tree is not None:
            self._grow(self._tree, child)
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
        reference, best, actions, broken = self.reference, self.best, self._actions, self._broken
        if self._tree is not None:
            parent = self._ruled(self._tree)
        else:
            parent = best if self._follows and best >= 0 else reference
            if not actions[parent] and self._open >= 0:
                parent = self._open
        self.parent = parent
        legal = actions[parent] | actions[reference]
        if broken:
            legal |= self._repairs(parent)
        self._legal[:] = legal.to_bytes(N_ACTIONS, "little")
        if parent != self._shown:
            self._shown = parent
            self._show(parent)
        gap = 0.0
        if best >= 0 and parent != best and parent != reference:
            gap = self.best_value - self.visited[parent][0]
        evaluations, duplicates, recent = self.evaluations, self.duplicates, self._recent
        slow, compiled, wrong = _shares(recent, evaluations if evaluations < RECENT else RECENT)
        since = evaluations - self.best_at - 1
        # Conditions instead of min and max: this runs at every step.
        _write_history(
            self._buffer,
            _HISTORY_AT,
            1.0 - self.steps / self.horizon,
            since / 10 if since < 10 else 1.0,
            self._best_share,
            (gap if gap > -1.0 else -1.0) if gap < 1.0 else 1.0,
            compiled,
            wrong,
            slow,
            duplicates / (evaluations + duplicates) if duplicates else 0.0,
            self._breadth,
            self._best_depth,
            self._last_outcome,
            self._draft_share,
        )

    def _show(self, node: int) -> None:
        """Write down code and profile of a node; the reference has neither."""
        if node == self.reference:
            _write_picture(self._buffer, _PICTURE_AT, bytes(_PICTURE))
            return
        at, prepared = _PICTURE * node, self.prepared
        _write_picture(self._buffer, _PICTURE_AT, prepared.pictures[at : at + _PICTURE])
        _write_one(self._buffer, _DISTANCE_AT, prepared.distances.item(node, self.visited[node][2]))

    def _repairs(self, node: int) -> int:
        """FIX, if the latest failure below the node has a recorded repair left."""
        waiting = self._broken.get(node)
        return self._actions[waiting[-1][0]] if waiting else 0

    def _ruled(self, tree: Tree) -> int:
        """What a rule over the tree chooses, or the fastest open version where that has nothing left."""
        rng = np.random.default_rng((self._seed, self.number))
        node = parents.get(self.rule)(tree, {}, rng)
        parent = self.reference if node is None else self._places[node.number]
        if parent != self.reference:
            spent = not self._actions[parent]
        else:
            drafts = self._actions[parent] & _ONLY[_RESTART]
            spent = self.best >= 0 and not drafts and not self._repairs(parent)
        return self._open if spent and self._open >= 0 else parent

    def _fastest(self) -> int:
        found, fastest = -1, -math.inf
        for node, (value, *_) in self.visited.items():
            if value > fastest and self._actions[node] & _STRATEGIES_ONLY:
                found, fastest = node, value
        return found

    # As a search tree -------------------------------------------------------------------------------------

    def tree(self) -> Tree:
        """The episode so far as the search tree it stands for."""
        if self._tree is not None:
            return self._tree
        tree = Tree()
        for child in self.visited:
            self._grow(tree, child)
        return tree

    def _grow(self, tree: Tree, child: int) -> None:
        value, _, _, origin, action, number, became = self.visited[child]
        evaluation = self.prepared.evaluations[child]
        if evaluation.correct:
            evaluation = evaluation.replace(speedup=math.exp(value))
        above = None if origin == self.reference else self._numbers[origin]
        self._numbers[child], self._places[number] = number, child
        node = Node(number, above, ACTIONS[action].name, 0, self.prepared.candidates[child], evaluation)
        # What became the best was decided above, where drawn repeats count.
        if tree.add(node, None):
            tree.leaders.pop()
        if became:
            tree.leaders.append(node)
        tree.best = tree.leaders[-1] if tree.leaders else None
