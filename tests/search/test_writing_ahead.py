"""Searches whose proposals take their time and are written side by side."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest

from ke_gym import policies
from ke_gym.candidate import Candidate
from ke_gym.proposers.base import Context, Proposal, ProposerLost, Refusal
from ke_gym.search.budget import Budget
from ke_gym.search.run import Watch, run
from ke_gym.search.session import Ask, Request, Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Node
from ke_gym.strategies import RESTART, Strategy
from tests.search.fakes import SETTING, FakeProposer, Judge


class Slow(FakeProposer):
    """Takes up to ``seconds`` per proposal; about one in eight of its answers is none."""

    name = "slow"
    stochastic = True

    def __init__(
        self, seconds: float = 0.0, in_flight: int = 4, ordered: bool = True, last: int = 10_000
    ) -> None:
        super().__init__()
        self.seconds, self._in_flight, self._ordered, self.last = seconds, in_flight, ordered, last
        self.most = self._now = 0
        self.closed = False
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def ordered(self) -> bool:
        return self._ordered

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        luck = hashlib.sha256(f"{parent and parent.id} {strategy.name} {draw}".encode()).digest()
        time.sleep(self.seconds * luck[0] / 255)
        try:
            if context.number >= self.last:
                raise ProposerLost("it is gone")
            if luck[1] < 32:
                return Refusal("only words", 0.02, "prose")
            with self._lock:
                return super().propose(parent, strategy, draw, context)
        finally:
            with self._lock:
                self._now -= 1

    def close(self) -> None:
        self.closed = True


def search(
    store: Store, proposer: Slow, budget: int = 50, jitter: float = 0.0, watch: Watch | None = None
) -> tuple[Session, str]:
    policy = policies.make("epsilon_greedy", 3)
    session = Session(store, "s", SETTING, proposer, budget=Budget(budget), parent_rule=policy.parent_rule)
    return session, run(session, policy, Judge(jitter), watch=watch)


def trace(session: Session) -> list[tuple[int, int | None, str, int, str]]:
    return [(n.number, n.parent, n.strategy, n.draw, n.candidate.id) for n in session.tree]


def test_in_order_a_search_repeats_exactly_however_long_anything_takes(tmp_path: Path) -> None:
    traces = []
    for number, (seconds, jitter) in enumerate(((0.0, 0.0), (0.01, 0.0), (0.002, 0.01))):
        with Store(tmp_path / f"{number}.db") as store:
            session, stopped = search(store, Slow(seconds), jitter=jitter)
            assert stopped == "evaluations" and len(session.tree) + session.vain == 50 and session.vain > 0
            traces.append(trace(session))
    assert traces[0] == traces[1] == traces[2]


def test_as_they_come_proposals_overlap_and_none_is_lost(tmp_path: Path) -> None:
    proposer = Slow(0.02, in_flight=6, ordered=False)
    with Store(tmp_path / "s.db") as store:
        session, _ = search(store, proposer, jitter=0.005)
        assert len(session.tree) + session.vain == 50
        assert 2 <= proposer.most <= 6
        records = store.nodes("s")
        assert [record.number for record in records] == list(range(len(records)))
        kinds = {record.kind for record in records if record.candidate is None}
        assert kinds and kinds <= {"prose", "duplicate"}
        assert session.spent.dollars == pytest.approx(sum(record.dollars for record in records))


class StopAfter(Watch):
    def __init__(self, count: int) -> None:
        self.count = count

    def told(self, session: Session, node: Node, improved: bool) -> None:
        self.count -= 1
        if self.count == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("ordered", [True, False])
def test_an_interrupted_search_keeps_what_was_told_and_goes_on(tmp_path: Path, ordered: bool) -> None:
    with Store(tmp_path / "s.db") as store:
        first = Slow(0.003, ordered=ordered)
        part, stopped = search(store, first, watch=StopAfter(15))
        assert stopped == "interrupted" and first.closed
        recorded = len(store.nodes("s"))
        again = Slow(0.003, ordered=ordered)
        whole, stopped = search(store, again)
        assert stopped == "evaluations" and len(whole.tree) + whole.vain == 50
        assert trace(whole)[:15] == trace(part)
        assert again.calls <= again.draws * (len(store.nodes("s")) - recorded)


def test_a_proposer_that_is_lost_ends_the_search_but_not_what_is_being_judged(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        session, stopped = search(store, Slow(0.002, last=20), jitter=0.01)
        assert stopped == "it is gone" and 5 < len(session.tree) <= 20
        assert all(record.evaluation for record in store.nodes("s") if record.candidate is not None)
    with Store(tmp_path / "none.db") as store, pytest.raises(ProposerLost):
        search(store, Slow(last=0))


def test_a_request_becomes_an_ask_in_three_steps(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        session = Session(store, "s", SETTING, Slow(), budget=Budget(3))
        requests = [session.request(RESTART.id) for _ in range(3)]
        assert session.stopped() == "evaluations"  # what is being written counts
        made = []
        for request in reversed(requests):
            assert isinstance(request, Request)
            made.append(session.receive(request, session.propose(request)))
        numbers = [ask.number for ask in made if isinstance(ask, Ask)]
        assert numbers and numbers == sorted(numbers)  # by receipt, whatever was asked for first
        assert session.stopped() == "evaluations"
        other = Session(store, "t", SETTING, Slow(), budget=Budget(1))
        forgotten = other.request(RESTART.id)
        assert isinstance(forgotten, Request) and other.stopped() == "evaluations"
        other.withdraw(forgotten)
        assert other.stopped() is None and not store.nodes("t")
