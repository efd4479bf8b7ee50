"""One search for one task: a tree of evaluated candidates, a budget, and ``ask()``/``tell()``.

The caller owns the loop::

    while session.stopped() is None:
        situation = session.situation()
        action, _ = policy.predict(situation.observation, action_masks=situation.mask)
        ask = session.ask(action)
        if isinstance(ask, Ask):
            session.tell(ask, ask.known or evaluator.evaluate(ask.candidate, ask.rival_candidate))

Several asks may be in flight. Where writing a proposal takes its time, ``ask`` falls into three: ``request``
picks the parent, ``propose`` writes (in any thread), ``receive`` makes it an ask. Everything is written to the
store as it happens, so a session opened again under the same id continues: replayed asks take the recorded
candidates and evaluations instead of new ones.
Nothing here depends on the time of day; with the same seed and the same evaluations, a search repeats exactly
as long as asks and tells come in the same order.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym import strategies
from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers.base import NOTHING, Context, EditMode, Kind, Proposal, Proposer, Refusal, Trial, Usage
from ke_gym.proposers.prices import Purse
from ke_gym.search import observation, parents
from ke_gym.search.budget import Budget, Spent
from ke_gym.search.limits import worthwhile
from ke_gym.search.observation import Observation, Surroundings, Values
from ke_gym.search.store import Expense, NodeRecord, Purpose, Setting, Store
from ke_gym.search.tree import Node, Tree
from ke_gym.strategies import ACTIONS, FIX, RESTART, STOP, STRATEGIES, Strategy

TABU = 2
"""Failed answers after which one strategy is given up on one parent."""


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

    ``known`` is its evaluation if the store has one: tell that instead of evaluating again. It is compared by
    its speedup over the baseline: what it gained over the rival of its own time says nothing here.
    """

    number: int
    parent: Node | None
    strategy: Strategy
    draw: int
    candidate: Candidate
    rival: Node | None
    known: Evaluation | None
    dollars: float = 0.0
    usage: Usage = NOTHING

    @property
    def rival_candidate(self) -> Candidate | None:
        return self.rival.candidate if self.rival else None

    def baseline(self, best: Node | None) -> float:
        """The speedup its own is compared with: its parent's, and a fresh draft's that of the ``best`` before it.

        1 where that is the reference or was not correct: a draft is worth what it adds to what there is.
        """
        before = best if self.strategy is RESTART else self.parent
        return before.speedup if before and before.correct else 1.0


@dataclass(frozen=True)
class Request:
    """A proposal to be written: the ``number``-th request, by ``strategy`` from ``parent`` (None: the
    reference).

    ``recorded`` is what an earlier run of this session got; ``left`` more draws may follow a duplicate, and
    ``dollars`` and ``usage`` are what those before cost.
    """

    number: int
    parent: Node | None
    strategy: Strategy
    draw: int
    context: Context
    recorded: NodeRecord | None = None
    left: int = 0
    dollars: float = 0.0
    usage: Usage = NOTHING


@dataclass
class _Counts:
    """Asks of one strategy on one parent."""

    draws: int = 0
    failures: int = 0
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
        self.vain = 0
        """Requests for which a model wrote something that never became a candidate."""
        self.usage = NOTHING
        self._rule = parents.get(parent_rule)
        self._number = 0
        self._requested = 0
        self._flying: dict[int, Ask] = {}
        self._writing: dict[int, Request] = {}
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
        # What it was searched among is kept as well: a recorded search can then be replayed on any machine.
        seen = {"task": self.surroundings.task.tolist(), "hardware": self.surroundings.hardware.tolist()}
        store.open_session(session_id, setting.task, mine | {"surroundings": seen})
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
        # All of an earlier run is paid for, whether or not it is replayed to its end.
        paid = [(record.dollars, record.usage) for record in self._recorded.values()]
        paid += [(expense.dollars, expense.usage) for expense in store.expenses(session_id)]
        self._dollars = math.fsum(dollars for dollars, _ in paid)
        for _, usage in paid:
            self.usage = self.usage.plus(usage)
        self.purse = Purse()
        """What this search may still spend; whoever asks a model for it pays from here."""
        self.purse.fund(budget.dollars, self._dollars)
        proposer.fund(self.purse)

    # What has been spent, and whether to go on ------------------------------------------------------------

    @property
    def spent(self) -> Spent:
        seconds = self._seconds_before + time.monotonic() - self._started
        return Spent(len(self.tree) + self.vain, seconds, self._dollars)

    @property
    def recorded(self) -> int:
        """How many evaluations of an earlier run there are to replay."""
        return sum(1 for node in self._recorded.values() if node.evaluation is not None)

    @property
    def replaying(self) -> bool:
        """Whether the next request has been answered by an earlier run."""
        return self._number + len(self._writing) in self._recorded

    def stopped(self) -> str | None:
        """Why no more may be asked (``"evaluations"``, ``"seconds"``, ``"dollars"``, a policy's STOP), or
        None.

        What is in flight, evaluations and requests alike, counts as spent.
        """
        if self.stop_reason:
            return self.stop_reason
        spent = self.spent
        flying = len(self._flying) + len(self._writing)
        committed = Spent(spent.evaluations + flying, spent.seconds, spent.dollars)
        if self.replaying:  # what is replayed is paid for
            committed = Spent(committed.evaluations)
        return self.budget.exhausted(committed)

    # The policy's side ------------------------------------------------------------------------------------

    def situation(self) -> Situation:
        """The present parent, the legal actions on it, and the observation; stable until an ask or a tell."""
        if self._situation is None:
            flying: dict[int | None, int] = {}
            for parent, _ in self._pending():
                key = parent.number if parent else None
                flying[key] = flying.get(key, 0) + 1
            rng = np.random.default_rng((self.seed, self._requested))
            parent = self._rule(self.tree, flying, rng)
            mask = self.mask(parent)
            spent = not mask[: STOP.id if parent is None else len(STRATEGIES)].any()
            if spent and self._rule is not parents.root:
                # Nothing applies to this parent any more: another one, or a fresh draft, still may.
                parent, mask = self._alternative(parent, mask)
            seen = self._observe(parent)
            record = self._recorded.get(self._number + len(self._writing))
            recorded = strategies.get(record.strategy).id if record else None
            if recorded is not None:
                mask[recorded] = True
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

    def _alternative(
        self, parent: Node | None, mask: NDArray[np.bool_]
    ) -> tuple[Node | None, NDArray[np.bool_]]:
        for node in sorted(self.tree.correct(), key=lambda node: -node.speedup):
            other = self.mask(node)
            if other[: len(STRATEGIES)].any():
                return node, other
        return parent, mask

    def mask(self, parent: Node | None) -> NDArray[np.bool_]:
        """The legal actions, shape (25,), if the next candidate were made from ``parent``."""
        mask = np.zeros(len(ACTIONS), dtype=np.bool_)
        if parent is not None:
            mask[: len(STRATEGIES)] = self.proposer.mask(parent.candidate) & worthwhile(parent.evaluation)
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
        repairing = any(parent is broken and strategy is FIX for parent, strategy in self._pending())
        return None if repairing else broken

    def _pending(self) -> list[tuple[Node | None, Strategy]]:
        """From what, and by which strategy, the candidates in flight and those being written are made."""
        flying = [(ask.parent, ask.strategy) for ask in self._flying.values()]
        return flying + [(request.parent, request.strategy) for request in self._writing.values()]

    def _count(self, parent: int | None, strategy: Strategy) -> _Counts:
        return self._counts.setdefault((parent, strategy.name), _Counts())

    def ask(self, action: int, parent: Node | None = None, edit: EditMode | None = None) -> Ask | Refusal:
        """The candidate that ``action`` makes from the situation's parent, or why there is none.

        ``parent`` overrules the parent rule. STOP and illegal actions are refused without cost; STOP ends the
        session. A refused strategy is masked on that parent from then on.
        """
        step: Ask | Refusal | Request = self.request(action, parent, edit)
        while isinstance(step, Request):
            step = self.receive(step, self.propose(step))
        return step

    # Asking -----------------------------------------------------------------------------------------------

    def request(
        self, action: int, parent: Node | None = None, edit: EditMode | None = None
    ) -> Request | Refusal:
        """The first third of ``ask``: what is to be written, or why nothing is."""
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
        record = self._recorded.get(self._number + len(self._writing))
        if record is not None and self.proposer.stochastic:
            # Answers were taken in the order in which they were ready, which no rule repeats.
            origin = self.tree.nodes[record.parent] if record.parent is not None else None
        self._check(record, origin, strategy)
        count = self._count(origin.number if origin else None, strategy)
        context = self._context(origin, count, edit)
        if record is not None:
            count.draws = record.draw
        request = Request(
            self._requested, origin, strategy, count.draws, context, record, self.proposer.draws - 1
        )
        count.draws += 1
        self._requested += 1
        self._writing[request.number] = request
        return request

    def _check(self, record: NodeRecord | None, parent: Node | None, strategy: Strategy) -> None:
        """``UserError`` unless an earlier run did here (if it came this far) what is done now."""
        number = parent.number if parent else None
        if record is not None and (record.parent, record.strategy) != (number, strategy.name):
            raise UserError(
                f"session {self.id} cannot continue: its step {record.number} was {record.strategy} on node"
                f" {record.parent}, and is now {strategy.name} on node {number}; it was recorded by another"
                " version of the program, or on another number of GPUs"
            )

    def _context(self, parent: Node | None, count: _Counts, edit: EditMode | None) -> Context:
        told = {n: self.tree.nodes[n].evaluation for n in count.trials if n in self.tree.nodes}
        siblings = tuple(Trial(candidate, told.get(n)) for n, candidate in count.trials.items())
        path = self.tree.path(parent)[:-1] if parent else []
        children = self.tree.children(parent.number if parent else None)
        ancestors, made, leaders = (
            tuple(Trial(node.candidate, node.evaluation) for node in nodes)
            for nodes in (path, children, self.tree.leaders)
        )
        judged = parent.evaluation if parent else None
        model = self.proposer.assign()
        return Context(self.seed, judged, siblings, ancestors, made, leaders, self._requested, edit, model)

    def propose(self, request: Request) -> Proposal | Refusal:
        """The second third of ``ask``; touches nothing of the session, so it may run in another thread."""
        record = request.recorded
        if record is None:
            parent = request.parent.candidate if request.parent else None
            return self.proposer.propose(parent, request.strategy, request.draw, request.context)
        if record.candidate is None:
            kind: Kind = record.kind or "inapplicable"  # type: ignore[assignment]
            return Refusal(record.refusal, record.dollars, kind, record.usage)
        return Proposal(record.candidate, record.dollars, record.usage)

    def receive(self, request: Request, made: Proposal | Refusal) -> Ask | Refusal | Request:
        """The last third of ``ask``: the candidate to evaluate, why there is none, or (after a duplicate) the
        next draw to be written."""
        self._situation = None
        count = self._count(request.parent.number if request.parent else None, request.strategy)
        dollars, usage = request.dollars + made.dollars, request.usage.plus(made.usage)
        if isinstance(made, Refusal):
            return self._refuse(request, count, replace(made, dollars=dollars, usage=usage))
        if request.recorded is None and made.candidate.id in self._seen:
            if request.left:
                again = replace(
                    request, draw=count.draws, left=request.left - 1, dollars=dollars, usage=usage
                )
                count.draws += 1
                self._writing[again.number] = again
                return again
            reason = "it only repeats candidates already tried"
            return self._refuse(request, count, Refusal(reason, dollars, "duplicate", usage))
        return self._accept(request, count, replace(made, dollars=dollars, usage=usage))

    def withdraw(self, request: Request, dollars: float = 0.0, usage: Usage = NOTHING) -> None:
        """Forget a request that will not be received (an interrupt); what it cost until then stays booked."""
        self._situation = None
        if self._writing.pop(request.number, None):
            self.proposer.release(request.context.model)
            if request.recorded is None:
                self.book("unused", request.dollars + dollars, request.usage.plus(usage))

    def book(self, purpose: Purpose, dollars: float, usage: Usage) -> None:
        """Count, and record, what a model was asked besides proposals that were received."""
        if not (usage.calls or dollars):
            return
        # On disk first: what an interrupt loses there, ``balance`` finds missing.
        self.store.add_expense(self.id, Expense(purpose, dollars, usage))
        self._dollars += dollars
        self.usage = self.usage.plus(usage)

    def balance(self) -> None:
        """Book what was paid from the purse and came in nowhere, as when Ctrl-C fell between two steps."""
        missing = self.purse.spent - self._dollars
        if missing > 1e-9:
            self.book("unused", missing, NOTHING)

    def _settle(self, request: Request) -> int:
        """A request has been answered; returns the number of the ask."""
        del self._writing[request.number]
        self.proposer.release(request.context.model)
        number = self._number
        self._number += 1
        return number

    def _record(self, record: NodeRecord) -> None:
        """Keep an ask, then count its cost: what an interrupt loses on the way, ``balance`` finds missing."""
        self.store.asked(self.id, record)
        self._dollars += record.dollars
        self.usage = self.usage.plus(record.usage)

    def _accept(self, request: Request, count: _Counts, made: Proposal) -> Ask:
        number, candidate, parent = self._settle(request), made.candidate, request.parent
        self._seen.add(candidate.id)
        count.trials[number] = candidate
        known = None
        if request.recorded is not None:
            known = request.recorded.evaluation
        else:
            origin = parent.number if parent else None
            record = NodeRecord(
                number, origin, request.strategy.name, request.draw, candidate, "", made.dollars, None,
                usage=made.usage,
            )  # fmt: skip
            self._record(record)
        known = known or self._known(candidate)
        ask = Ask(
            number, parent, request.strategy, request.draw, candidate, self.tree.best, known, made.dollars,
            made.usage,
        )  # fmt: skip
        self._flying[number] = ask
        return ask

    def _refuse(self, request: Request, count: _Counts, made: Refusal) -> Refusal:
        number = self._settle(request)
        self.refusals += 1
        self.duplicates += made.kind == "duplicate"
        if made.attempt or made.usage.calls:  # a model that only repeats itself gains nothing either
            self.proposer.learn(0.0, made.dollars, made.usage)
        if made.kind == "dollars":
            if request.recorded is None:
                self.stop_reason = "dollars"
        elif made.attempt or (made.kind == "duplicate" and self.proposer.stochastic):
            # Twice in vain is enough for one strategy on one parent; a draft is always worth another attempt.
            self.vain += 1
            count.failures += 1
            count.exhausted = count.failures >= TABU and request.strategy is not RESTART
        else:
            count.exhausted = True
        if request.recorded is None:
            origin = request.parent.number if request.parent else None
            record = NodeRecord(
                number, origin, request.strategy.name, request.draw, None, made.reason, made.dollars, None,
                made.kind, made.usage,
            )  # fmt: skip
            self._record(record)
        return made

    def _known(self, candidate: Candidate) -> Evaluation | None:
        """The store's evaluation, which was made against another search's rival: only its speedup over the
        baseline, with its interval, means the same here."""
        known = self.store.evaluation(self.setting, candidate.id)
        return known.alone() if known else None

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
            ask.usage,
        )
        self.store.told(self.id, ask.number, self.setting, evaluation, self.spent.seconds)
        before = ask.baseline(self.tree.best)
        self.tree.add(node, ask.rival)
        gain = max(math.log(node.speedup / before), 0.0) if node.speedup else 0.0
        self.proposer.learn(gain, ask.dollars, ask.usage)
        return node

    def abandon(self, ask: Ask) -> None:
        """Forget an ask that will not be told (an interrupt); it is asked again when the session resumes."""
        self._situation = None
        self._flying.pop(ask.number, None)
        self._seen.discard(ask.candidate.id)


def new_session_id(*parts: object) -> str:
    """A short id from the parts that make a session what it is."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
