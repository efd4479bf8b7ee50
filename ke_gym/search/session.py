"""One search for one task: a tree of evaluated candidates, a budget, and ``ask()``/``tell()``.

The caller owns the loop::

    while session.stopped() is None:
        situation = session.situation()
        action, _ = policy.predict(situation.observation, action_masks=situation.mask)
        ask = session.ask(action)
        if isinstance(ask, Ask):
            session.tell(ask, ask.known or evaluator.evaluate(ask.candidate, ask.rival_candidate))

Several asks may be in flight. Everything is written to the store as it happens, so a session opened again
under the same id continues: replayed asks take the recorded candidates and evaluations instead of new ones.
Nothing here depends on the time of day; with the same seed and the same evaluations, a search repeats exactly
as long as asks and tells come in the same order.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym import strategies
from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers.base import Context, Proposer, Refusal, Trial
from ke_gym.search import observation, parents
from ke_gym.search.budget import Budget, Spent
from ke_gym.search.observation import Observation, Surroundings, Values
from ke_gym.search.store import NodeRecord, Setting, Store
from ke_gym.search.tree import Node, Tree
from ke_gym.strategies import ACTIONS, FIX, RESTART, STOP, STRATEGIES, Strategy


@dataclass(frozen=True)
class Situation:
    """What a policy sees before an action: the observation, the legal actions (shape (25,)), the parent.

    ``recorded`` is the action taken here by an earlier run of the same session: a loop that continues it
    takes that one, whatever the policy says now (a larger budget changes what it sees).
    """

    observation: Observation
    mask: NDArray[np.bool_]
    parent: Node | None
    recorded: int | None = None


@dataclass(frozen=True)
class Ask:
    """A candidate to be evaluated against ``rival`` (None: the baseline alone).

    ``known`` is its evaluation if the store has one: tell that instead of evaluating again.
    """

    number: int
    parent: Node | None
    strategy: Strategy
    draw: int
    candidate: Candidate
    rival: Node | None
    known: Evaluation | None
    dollars: float = 0.0

    @property
    def rival_candidate(self) -> Candidate | None:
        return self.rival.candidate if self.rival else None


@dataclass
class _Counts:
    """Asks of one strategy on one parent."""

    draws: int = 0
    exhausted: bool = False
    trials: dict[int, Candidate] = field(default_factory=dict)


class Session:
    """The search ``session_id`` in ``store``, new or continued.

    ``parent_rule`` is a name from ``parents.RULES``; ``surroundings`` are what a policy sees of task and machine
    (None: a synthetic problem, which has neither). Raises ``UserError`` when the recorded session had other
    settings than these (the budget may differ).
    """

    def __init__(
        self,
        store: Store,
        session_id: str,
        setting: Setting,
        proposer: Proposer,
        *,
        budget: Budget,
        seed: int = 0,
        parent_rule: str = "best",
        settings: dict[str, Any] | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.surroundings = surroundings or Surroundings.unknown()
        self.store, self.id, self.setting, self.proposer = store, session_id, setting, proposer
        self.budget, self.seed = budget, seed
        self.tree = Tree()
        self.stop_reason: str | None = None
        self.refusals = 0
        self.duplicates = 0
        self._rule = parents.get(parent_rule)
        self._number = 0
        self._dollars = 0.0
        self._flying: dict[int, Ask] = {}
        self._seen: set[str] = set()
        self._counts: dict[tuple[int | None, str], _Counts] = {}
        self._situation: Situation | None = None
        self._described: dict[int, tuple[Values, Values]] = {}
        mine = {
            "seed": seed,
            "proposer": proposer.name,
            "parent_rule": parent_rule,
            "harness": setting.harness,
            **(settings or {}),
        }
        store.open_session(session_id, setting.task, mine)
        recorded = store.session_settings(session_id) or {}
        for key in sorted(mine.keys() & recorded.keys()):
            if recorded[key] != mine[key]:
                raise UserError(
                    f"session {session_id} was recorded with {key} = {recorded[key]!r} and cannot continue"
                    f" with {mine[key]!r}"
                )
        self._recorded = {node.number: node for node in store.nodes(session_id)}
        self._seconds_before = store.session_seconds(session_id)
        self._started = time.monotonic()

    # What has been spent, and whether to go on ------------------------------------------------------------

    @property
    def spent(self) -> Spent:
        seconds = self._seconds_before + time.monotonic() - self._started
        return Spent(len(self.tree), seconds, self._dollars)

    @property
    def recorded(self) -> int:
        """How many evaluations of an earlier run there are to replay."""
        return sum(1 for node in self._recorded.values() if node.evaluation is not None)

    def stopped(self) -> str | None:
        """Why no more may be asked (``"evaluations"``, ``"seconds"``, ``"dollars"``, a policy's STOP), or
        None.

        Evaluations in flight count as spent.
        """
        if self.stop_reason:
            return self.stop_reason
        spent = self.spent
        committed = Spent(spent.evaluations + len(self._flying), spent.seconds, spent.dollars)
        return self.budget.exhausted(committed)

    # The policy's side ------------------------------------------------------------------------------------

    def situation(self) -> Situation:
        """The present parent, the legal actions on it, and the observation; stable until an ask or a tell."""
        if self._situation is None:
            flying: dict[int | None, int] = {}
            for ask in self._flying.values():
                key = ask.parent.number if ask.parent else None
                flying[key] = flying.get(key, 0) + 1
            rng = np.random.default_rng((self.seed, self._number))
            parent = self._rule(self.tree, flying, rng)
            mask = self.mask(parent)
            if parent is not None and not mask[: len(STRATEGIES)].any():
                # Nothing applies to this parent any more: another one, or a fresh draft, still may.
                parent, mask = self._alternative(parent, mask)
            seen = self._observe(parent)
            record = self._recorded.get(self._number)
            recorded = strategies.get(record.strategy).id if record else None
            self._situation = Situation(seen, mask, parent, recorded)
        return self._situation

    def _observe(self, parent: Node | None) -> Observation:
        counters = observation.count(self.tree, parent, self.budget.left(self.spent), self.duplicates)
        return observation.observe(self.surroundings, *self._describe(parent), counters)

    def _describe(self, node: Node | None) -> tuple[Values, Values]:
        """The node's code and profile as features; zeros for the reference."""
        if node is None:
            return observation.NO_CODE, observation.NO_PROFILE
        if node.number not in self._described:
            draft = self.tree.path(node)[0]
            root = draft.candidate.source if draft is not node else None
            self._described[node.number] = (
                observation.code_features(node.candidate.source, node.candidate.language, root),
                observation.profile_features(node.evaluation),
            )
        return self._described[node.number]

    def _alternative(self, parent: Node, mask: NDArray[np.bool_]) -> tuple[Node, NDArray[np.bool_]]:
        for node in sorted(self.tree.correct(), key=lambda node: -node.speedup):
            other = self.mask(node)
            if other[: len(STRATEGIES)].any():
                return node, other
        return parent, mask

    def mask(self, parent: Node | None) -> NDArray[np.bool_]:
        """The legal actions, shape (25,), if the next candidate were made from ``parent``."""
        mask = np.zeros(len(ACTIONS), dtype=np.bool_)
        if parent is not None:
            mask[: len(STRATEGIES)] = self.proposer.mask(parent.candidate)
            for strategy in STRATEGIES:
                if self._count(parent.number, strategy).exhausted:
                    mask[strategy.id] = False
        mask[FIX.id] = self._broken(parent) is not None
        mask[RESTART.id] = not self._count(None, RESTART).exhausted
        mask[STOP.id] = True
        return mask

    def _broken(self, parent: Node | None) -> Node | None:
        broken = self.tree.broken(parent.number if parent else None)
        if broken is None or self._count(broken.number, FIX).exhausted:
            return None
        repairing = any(a.parent is broken and a.strategy is FIX for a in self._flying.values())
        return None if repairing else broken

    def _count(self, parent: int | None, strategy: Strategy) -> _Counts:
        return self._counts.setdefault((parent, strategy.name), _Counts())

    def ask(self, action: int, parent: Node | None = None) -> Ask | Refusal:
        """The candidate that ``action`` makes from the situation's parent, or why there is none.

        ``parent`` overrules the parent rule. STOP and illegal actions are refused without cost; STOP ends the
        session. A refused strategy is masked on that parent from then on.
        """
        situation = self.situation()
        strategy = ACTIONS[int(action)]
        legal = situation.mask if parent is None else self.mask(parent)
        self._situation = None
        if strategy is STOP:
            self.stop_reason = "STOP"
            return Refusal("the policy stopped")
        if not legal[strategy.id]:
            return Refusal(f"{strategy.name} does not apply here")
        origin = parent or situation.parent
        if strategy is FIX:
            origin = self._broken(origin)
        elif strategy is RESTART:
            origin = None
        return self._replay(origin, strategy) or self._propose(origin, strategy)

    # Asking -----------------------------------------------------------------------------------------------

    def _propose(self, parent: Node | None, strategy: Strategy) -> Ask | Refusal:
        count = self._count(parent.number if parent else None, strategy)
        context = Context(self.seed, parent.evaluation if parent else None, self._siblings(count))
        dollars, reason, duplicate = 0.0, "", False
        for _ in range(self.proposer.draws):
            draw = count.draws
            count.draws += 1
            made = self.proposer.propose(parent.candidate if parent else None, strategy, draw, context)
            dollars += made.dollars
            if isinstance(made, Refusal):
                reason, duplicate = made.reason, False
                break
            if made.candidate.id not in self._seen:
                return self._accept(parent, strategy, draw, made.candidate, dollars, count)
            reason, duplicate = "it only repeats candidates already tried", True
        self.duplicates += duplicate
        return self._refuse(parent, strategy, count, reason, dollars)

    def _siblings(self, count: _Counts) -> tuple[Trial, ...]:
        told = {n: self.tree.nodes[n].evaluation for n in count.trials if n in self.tree.nodes}
        return tuple(Trial(candidate, told.get(n)) for n, candidate in count.trials.items())

    def _accept(
        self,
        parent: Node | None,
        strategy: Strategy,
        draw: int,
        candidate: Candidate,
        dollars: float,
        count: _Counts,
    ) -> Ask:
        number = self._number
        self._number += 1
        self._dollars += dollars
        self._seen.add(candidate.id)
        count.trials[number] = candidate
        record = NodeRecord(
            number, parent.number if parent else None, strategy.name, draw, candidate, "", dollars, None
        )
        self.store.asked(self.id, record)
        known = self.store.evaluation(self.setting, candidate.id)
        ask = Ask(number, parent, strategy, draw, candidate, self.tree.best, known, dollars)
        self._flying[number] = ask
        return ask

    def _refuse(
        self, parent: Node | None, strategy: Strategy, count: _Counts, reason: str, dollars: float
    ) -> Refusal:
        count.exhausted = True
        record = NodeRecord(
            self._number,
            parent.number if parent else None,
            strategy.name,
            count.draws - 1,
            None,
            reason,
            dollars,
            None,
        )
        self._number += 1
        self._dollars += dollars
        self.refusals += 1
        self.store.asked(self.id, record)
        return Refusal(reason, dollars)

    def _replay(self, parent: Node | None, strategy: Strategy) -> Ask | Refusal | None:
        """The recorded ask of this number, so that resuming neither proposes nor evaluates it again."""
        record = self._recorded.get(self._number)
        if record is None:
            return None
        number = parent.number if parent else None
        if (record.parent, record.strategy) != (number, strategy.name):
            raise UserError(
                f"session {self.id} cannot continue: its step {record.number} was {record.strategy} on node"
                f" {record.parent}, and is now {strategy.name} on node {number}; it was recorded by another"
                " version of the program"
            )
        count = self._count(number, strategy)
        count.draws = record.draw + 1
        if record.candidate is None:
            count.exhausted = True
            self._number += 1
            self._dollars += record.dollars
            self.refusals += 1
            return Refusal(record.refusal, record.dollars)
        candidate = record.candidate
        self._number += 1
        self._dollars += record.dollars
        self._seen.add(candidate.id)
        count.trials[record.number] = candidate
        known = record.evaluation or self.store.evaluation(self.setting, candidate.id)
        ask = Ask(
            record.number, parent, strategy, record.draw, candidate, self.tree.best, known, record.dollars
        )
        self._flying[ask.number] = ask
        return ask

    # Telling ----------------------------------------------------------------------------------------------

    def tell(self, ask: Ask, evaluation: Evaluation) -> Node:
        """Add the evaluated candidate to the tree; durable when this returns."""
        self._situation = None
        del self._flying[ask.number]
        node = Node(
            ask.number,
            ask.parent.number if ask.parent else None,
            ask.strategy.name,
            ask.draw,
            ask.candidate,
            evaluation,
            ask.dollars,
        )
        self.store.told(self.id, ask.number, self.setting, evaluation, self.spent.seconds)
        self.tree.add(node, ask.rival)
        return node

    def abandon(self, ask: Ask) -> None:
        """Forget an ask that will not be told (an interrupt); it is asked again when the session resumes."""
        self._situation = None
        self._flying.pop(ask.number, None)


def new_session_id(*parts: object) -> str:
    """A short id from the parts that make a session what it is."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
