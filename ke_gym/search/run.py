"""The search loop: a policy asks, a pool of threads evaluates, the session is told.

Evaluations run side by side, but are told in the order they were asked: a slow one delays its followers a
little, and in return a search repeats exactly however the machine schedules them. Where a proposer takes its
time, its proposals are written side by side too, ahead of the evaluations and enough of them to keep these busy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.proposers.base import NOTHING, OutOfDollars, Proposal, ProposerLost, Refusal, Usage
from ke_gym.proposers.prices import Purse
from ke_gym.search import reward
from ke_gym.search.observation import Observation
from ke_gym.search.session import Ask, Request, Session, Situation
from ke_gym.search.tree import Node
from ke_gym.strategies import ACTIONS, FIX, STOP
from ke_gym.tasks import Task

Evaluate = Callable[[Candidate, Candidate | None], Evaluation]


@dataclass(frozen=True)
class Transition:
    """One completed step: what the policy saw and did, what it was worth, what it sees now."""

    observation: Observation
    action: int
    reward: float
    next_observation: Observation
    terminated: bool
    mask: NDArray[np.bool_]
    info: dict[str, Any]


class Chooser(Protocol):
    """What the loop needs of a policy (``ke_gym.policies.Policy`` has it)."""

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: NDArray[np.bool_] | None = None,
    ) -> tuple[Any, Any]: ...

    def update(self, transition: Transition) -> None: ...


@runtime_checkable
class Paying(Protocol):
    """What a policy has besides whose choices cost dollars.

    It raises ``OutOfDollars`` from ``predict`` where the purse pays for no further choice.
    """

    def fund(self, purse: Purse, prices: str = "") -> None:
        """Pay from ``purse`` from now on; ``prices`` names a file that overrules the price table."""

    def bill(self) -> tuple[float, Usage]:
        """Dollars and usage since the last bill."""
        ...


@runtime_checkable
class Expecting(Protocol):
    """What a policy has besides that makes up its mind while earlier choices are still under way."""

    def launched(self, action: int) -> None: ...

    def landed(self, action: int) -> None: ...


class Watch:
    """Hooks of a search, called in the thread that runs it. The default ones do nothing."""

    def proved(self, task: Task, proof: Proof) -> None:
        """``task``, a user's own, has been checked before the search."""

    def asked(self, session: Session, ask: Ask) -> None:
        """``ask`` has been handed out for evaluation."""

    def refused(self, session: Session, request: Request, refusal: Refusal) -> None:
        """``request`` brought no candidate."""

    def told(self, session: Session, node: Node, improved: bool) -> None:
        """``node`` has been added to the tree; ``improved``: it is the new best."""

    def confirming(self, session: Session, node: Node) -> None:
        """The search is over and a finalist is measured once more."""

    def tick(self, session: Session) -> None:
        """Nothing has happened for a moment."""


@dataclass(frozen=True)
class _Draft:
    request: Request
    situation: Situation
    action: int
    future: Future[Proposal | Refusal]


@dataclass(frozen=True)
class _Flight:
    ask: Ask
    situation: Situation
    action: int
    future: Future[Evaluation]


def run(
    session: Session, policy: Chooser, evaluate: Evaluate, *, workers: int = 2, watch: Watch | None = None
) -> str:
    """Search until the budget is spent, the policy stops, or nothing is left to try; returns which.

    A proposer that is lost on the way ends the search too, with its own words; at the very start it raises.
    ``KeyboardInterrupt`` ends the search with ``"interrupted"``: what was told stays, what was in flight is
    abandoned (and asked again if the session is resumed).
    """
    loop = _Loop(session, policy, evaluate, workers, watch or Watch())
    try:
        return loop.run()
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        loop.abandon()


class _Loop:
    def __init__(
        self, session: Session, policy: Chooser, evaluate: Evaluate, workers: int, watch: Watch
    ) -> None:
        self.session, self.policy, self.evaluate, self.watch = session, policy, evaluate, watch
        self.writers = session.proposer.in_flight
        # Whoever asks models waits in a thread, where Ctrl-C does not lose what an answer costs.
        self.apart = self.writers > 1 or session.proposer.stochastic
        self.workers = workers
        # Judged candidates are told in order, so some more have to be at hand for the workers to stay busy.
        self.waiting = workers if self.writers == 1 else 2 * workers
        self.drafts: deque[_Draft] = deque()
        self.flights: deque[_Flight] = deque()
        self.expecting = policy if isinstance(policy, Expecting) else None
        self.state: Any = None
        self.started = False
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="evaluate")
        self.writing = ThreadPoolExecutor(self.writers, thread_name_prefix="propose")

    def run(self) -> str:
        while True:
            while self.room() and self.session.stopped() is None:
                if not self.launch():
                    break
            if self.late():
                self.drop()
            if self.drafts and len(self.flights) < self.seats():
                self.take()
            elif self.flights:
                self.land(self.flights.popleft())
            else:
                return self.session.stopped() or "nothing left to try"

    def room(self) -> bool:
        """Whether one more proposal may be asked for."""
        if self.session.replaying and not self.session.proposer.ordered:
            # What was asked may need anything that was told before.
            return not self.drafts and not self.flights
        if self.writers == 1:
            return not self.drafts and len(self.flights) < self.workers
        # Whoever writes before anything is judged writes drafts only: the more is known, the more are written.
        first = max(2 * self.workers, self.writers // 4)
        return len(self.drafts) < min(self.writers, first + 2 * len(self.session.tree))

    def seats(self) -> int:
        """How many evaluations may be under way. One, until the first is judged: mostly it is what the others then have to
        beat, and each would be confirmed against the baseline, which takes many times as long as to lose."""
        return self.waiting if len(self.session.tree) else 1

    def late(self) -> bool:
        """Whether the time is over: what is still being written would come after it. What is recorded came before."""
        limit = self.session.budget.seconds
        replayed = self.session.replaying or any(draft.request.recorded for draft in self.drafts)
        over = limit is not None and self.session.spent.seconds >= limit and not replayed
        return over or self.session.stop_reason == "seconds"

    def drop(self) -> None:
        """Let go of what is being written; what it has cost is booked."""
        if self.drafts and self.apart:
            self.session.proposer.close()
        while self.drafts:
            draft = self.drafts[0]
            dollars, usage = _cost(draft.future)
            self.drafts.popleft()
            self.session.withdraw(draft.request, dollars, usage)
        self.session.balance()

    def launch(self) -> bool:
        """Ask for one more proposal; False if only a landing can bring new ones."""
        session = self.session
        situation = session.situation()
        legal = situation.mask.copy()
        legal[STOP.id] = False
        if not legal.any():
            return False
        try:
            choice = self.choose(situation)
        except OutOfDollars:
            session.stop_reason = "dollars"
            return False
        if not situation.mask[choice]:
            raise UserError(f"the policy chose {ACTIONS[choice].name}, which its action mask forbids")
        if self.expecting is not None:
            self.expecting.launched(choice)
        request = session.request(choice)
        if isinstance(request, Refusal):
            self.refused(situation, choice, request)
            return choice != STOP.id
        self.write(request, situation, choice)
        return True

    def choose(self, situation: Situation) -> int:
        """The policy's action; a recorded one where there is one, for which nobody is paid again."""
        paying = self.policy if isinstance(self.policy, Paying) else None
        first, self.started = not self.started, True
        if paying is not None and situation.recorded is not None:
            return situation.recorded
        try:
            action, self.state = self.policy.predict(
                situation.observation,
                self.state,
                np.array([first]),
                deterministic=False,
                action_masks=situation.mask,
            )
        finally:
            if paying is not None:
                self.session.book("choices", *paying.bill())
        return int(np.asarray(action).reshape(-1)[0]) if situation.recorded is None else situation.recorded

    def write(self, request: Request, situation: Situation, action: int, first: bool = False) -> None:
        """Have a proposal written; ``first``: it is taken before the others that are being written."""
        future: Future[Proposal | Refusal]
        if self.apart:
            future = self.writing.submit(self.session.propose, request)
        else:
            future = Future()
            try:
                future.set_result(self.session.propose(request))
            except ProposerLost as error:
                future.set_exception(error)
        self.drafts.insert(0 if first else len(self.drafts), _Draft(request, situation, action, future))

    def take(self) -> None:
        """Take a finished proposal to its evaluation; while there is none, land what has been judged. It ends when
        the time is over."""
        ordered = self.session.proposer.ordered
        while True:
            ready = self.drafts[0] if ordered else next((d for d in self.drafts if d.future.done()), None)
            if ready is not None and ready.future.done():
                break
            pending: list[Future[Any]] = [d.future for d in self.drafts]
            if self.flights and not ordered:
                if self.flights[0].future.done():
                    self.land(self.flights.popleft())
                    return
                pending.append(self.flights[0].future)
            wait(pending[:1] if ordered else pending, timeout=0.25, return_when=FIRST_COMPLETED)
            self.watch.tick(self.session)
            if self.late():
                return
        self.drafts.remove(ready)
        try:
            made = ready.future.result()
        except ProposerLost as error:
            self.session.withdraw(ready.request, error.dollars, error.usage)
            if not self.flights and not len(self.session.tree):
                raise
            self.session.stop_reason = str(error)  # what is being judged is still told
            self.drop()
            return
        except BaseException:
            self.session.withdraw(ready.request)
            raise
        ask = self.session.receive(ready.request, made)
        if isinstance(ask, Request):
            self.write(ask, ready.situation, ready.action, first=True)
        elif isinstance(ask, Refusal):
            self.watch.refused(self.session, ready.request, ask)
            self.refused(ready.situation, ready.action, ask)
        else:
            self.watch.asked(self.session, ask)
            future: Future[Evaluation] = Future()
            if ask.known is not None:
                future.set_result(ask.known)
            else:
                future = self.pool.submit(self.evaluate, ask.candidate, ask.rival_candidate)
            self.flights.append(_Flight(ask, ready.situation, ready.action, future))

    def refused(self, situation: Situation, action: int, refusal: Refusal) -> None:
        """Tell the policy that its action brought no candidate."""
        penalty = 0.0 if action == STOP.id else reward.refusal(refusal.kind)
        info = {"refusal": refusal.reason, "kind": refusal.kind}
        after = self.session.situation()
        self.learn(
            Transition(
                situation.observation, action, penalty, after.observation, action == STOP.id, situation.mask,
                info,
            )
        )  # fmt: skip

    def land(self, flight: _Flight) -> None:
        """Wait for the oldest flight and tell the session and the policy."""
        try:
            while not wait([flight.future], timeout=0.25).done:
                self.watch.tick(self.session)
            evaluation = flight.future.result()
        except BaseException:
            self.session.abandon(flight.ask)
            raise
        ask, best = flight.ask, self.session.tree.best
        node = self.session.tell(ask, evaluation)
        improved = self.session.tree.best is node
        step = reward.reward(
            getattr(self.policy, "reward", "parent"),
            evaluation,
            parent_speedup=ask.baseline(best),
            best_speedup=best.speedup if best else 1.0,
            became_best=improved,
            repair=ask.strategy is FIX,
        )
        info = {
            "outcome": evaluation.outcome,
            "candidate": ask.candidate.id,
            "best_gain": reward.best_gain(evaluation, best.speedup if best else 1.0, improved),
            "log_speedup": math.log(node.speedup) if node.speedup else 0.0,
        }
        after = self.session.situation()
        self.learn(
            Transition(
                flight.situation.observation,
                flight.action,
                step,
                after.observation,
                self.session.stopped() is not None,
                flight.situation.mask,
                info,
            )
        )
        self.watch.told(self.session, node, improved)

    def learn(self, transition: Transition) -> None:
        """Tell the policy of a completed step."""
        if self.expecting is not None:
            self.expecting.landed(transition.action)
        self.policy.update(transition)

    def abandon(self) -> None:
        """Let go of what is in flight; evaluations that already run end when the evaluator is closed."""
        while self.flights:
            self.session.abandon(self.flights.popleft().ask)
        self.drop()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.writing.shutdown(wait=False, cancel_futures=True)


def _cost(writing: Future[Proposal | Refusal]) -> tuple[float, Usage]:
    """What a proposal has cost that is let go of; one that is still being written ends first, cancelled."""
    if writing.cancel():
        return 0.0, NOTHING
    error = writing.exception()
    if error is None:
        made = writing.result()
        return made.dollars, made.usage
    return (error.dollars, error.usage) if isinstance(error, ProposerLost) else (0.0, NOTHING)
