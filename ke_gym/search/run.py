"""The search loop: a policy asks, a pool of threads evaluates, the session is told.

Evaluations run side by side, but are told in the order they were asked: a slow one delays its followers a
little, and in return a search repeats exactly however the machine schedules them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers.base import Refusal
from ke_gym.search import reward
from ke_gym.search.observation import Observation
from ke_gym.search.session import Ask, Session, Situation
from ke_gym.search.tree import Node
from ke_gym.strategies import ACTIONS, FIX, STOP

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


class Watch:
    """Hooks of a search, called in the thread that runs it. The default ones do nothing."""

    def asked(self, session: Session, ask: Ask) -> None:
        """``ask`` has been handed out for evaluation."""

    def told(self, session: Session, node: Node, improved: bool) -> None:
        """``node`` has been added to the tree; ``improved``: it is the new best."""

    def confirming(self, session: Session, node: Node) -> None:
        """The search is over and a finalist is measured once more."""

    def tick(self, session: Session) -> None:
        """Nothing has happened for a moment."""


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
        self.workers = workers
        self.flights: deque[_Flight] = deque()
        self.state: Any = None
        self.started = False
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="evaluate")

    def run(self) -> str:
        while True:
            while len(self.flights) < self.workers and self.session.stopped() is None:
                if not self.launch():
                    break
            if not self.flights:
                return self.session.stopped() or "nothing left to try"
            self.land(self.flights.popleft())

    def launch(self) -> bool:
        """Ask for one more candidate; False if only a landing can bring new ones."""
        session = self.session
        situation = session.situation()
        legal = situation.mask.copy()
        legal[STOP.id] = False
        if not legal.any():
            return False
        action, self.state = self.policy.predict(
            situation.observation,
            self.state,
            np.array([not self.started]),
            deterministic=False,
            action_masks=situation.mask,
        )
        self.started = True
        choice = int(np.asarray(action).reshape(-1)[0]) if situation.recorded is None else situation.recorded
        if not situation.mask[choice]:
            raise UserError(f"the policy chose {ACTIONS[choice].name}, which its action mask forbids")
        ask = session.ask(choice)
        if isinstance(ask, Refusal):
            after = session.situation()
            penalty = 0.0 if choice == STOP.id else reward.DUPLICATE_PENALTY
            self.policy.update(
                Transition(
                    situation.observation,
                    choice,
                    penalty,
                    after.observation,
                    choice == STOP.id,
                    situation.mask,
                    {"refusal": ask.reason},
                )
            )
            return choice != STOP.id
        self.watch.asked(session, ask)
        if ask.known is not None:
            future: Future[Evaluation] = Future()
            future.set_result(ask.known)
        else:
            future = self.pool.submit(self.evaluate, ask.candidate, ask.rival_candidate)
        self.flights.append(_Flight(ask, situation, choice, future))
        return True

    def land(self, flight: _Flight) -> None:
        """Wait for the oldest flight and tell the session and the policy."""
        while True:
            try:
                evaluation = flight.future.result(timeout=0.25)
                break
            except TimeoutError:
                if flight.future.done():
                    raise
                self.watch.tick(self.session)
            except BaseException:
                self.session.abandon(flight.ask)
                raise
        ask, best = flight.ask, self.session.tree.best
        node = self.session.tell(ask, evaluation)
        improved = self.session.tree.best is node
        baseline = ask.parent.speedup if ask.parent and ask.parent.correct else 1.0
        step = reward.parent_gain(evaluation, baseline, repair=ask.strategy is FIX)
        info = {
            "outcome": evaluation.outcome,
            "candidate": ask.candidate.id,
            "best_gain": reward.best_gain(evaluation, best.speedup if best else 1.0, improved),
            "log_speedup": math.log(node.speedup) if node.speedup else 0.0,
        }
        after = self.session.situation()
        self.policy.update(
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

    def abandon(self) -> None:
        """Let go of what is in flight; evaluations that already run end when the evaluator is closed."""
        while self.flights:
            self.session.abandon(self.flights.popleft().ask)
        self.pool.shutdown(wait=False, cancel_futures=True)
