"""Whole searches through the real client over real HTTP; only the judge is a fake, so that they take seconds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ke_gym import policies
from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers import prices
from ke_gym.proposers.base import ANSWER_KINDS, ENDPOINT_KINDS, Context, Proposal, Proposer, Refusal
from ke_gym.proposers.llm import LLM
from ke_gym.proposers.mixed import Mixed
from ke_gym.proposers.openai import OpenAI
from ke_gym.proposers.rewriter import Rewriter
from ke_gym.proposers.warm import WarmStart
from ke_gym.report.models import asked as asked_rows
from ke_gym.search.budget import Budget
from ke_gym.search.run import Watch, run
from ke_gym.search.session import Ask, Request, Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Node
from ke_gym.strategies import RESTART, get
from ke_gym.testing.rewriter_endpoint import ANSWER_FAULTS, FAULTS, MODEL, RewriterEndpoint
from tests.proposers.llm import KEY, brief
from tests.search.fakes import SETTING, Judge

KERNEL = "import torch\n\n\ndef forward(x):\n    return torch.softmax(x, dim=-1)\n"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.db")


def proposer(server: RewriterEndpoint | None, transcripts: Path | None = None, **settings: Any) -> OpenAI:
    chosen = {"models": (MODEL,), "timeout": 300.0, "in_flight": 4, "base_url": server.url if server else ""}
    return OpenAI(brief(), "cpp", LLM(**{**chosen, **settings}), transcripts)


def search(
    store: Store,
    made: Proposer,
    budget: Budget,
    name: str = "s",
    watch: Watch | None = None,
    judge: Any = None,
) -> tuple[Session, str]:
    policy = policies.make("epsilon_greedy", 3)
    session = Session(store, name, SETTING, made, budget=budget, parent_rule=policy.parent_rule)
    return session, run(session, policy, judge or Judge(), watch=watch)


class Refusals(Watch):
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def refused(self, session: Session, request: Any, refusal: Refusal) -> None:
        self.kinds.append(refusal.kind)


class EveryFault(RewriterEndpoint):
    """Every other one of the first calls has a fault, until there was one of each; those of later calls are drawn."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.due = iter([kind for fault in FAULTS for kind in ("", fault)])

    def fault(self, body: bytes) -> str:
        kind = next(self.due, None)
        if kind is None:
            return super().fault(body)
        with self._lock:
            self.calls += 1
            if kind:
                self.injected[kind] = self.injected.get(kind, 0) + 1
        return kind


def test_a_search_over_http_with_every_fault_comes_to_its_end(store: Store, tmp_path: Path) -> None:
    faults = dict.fromkeys(FAULTS, 0.05) | {"stall": 0.0}  # one is enough to wait for
    watch = Refusals()
    Rewriter(brief().task).propose(None, RESTART, 0, Context())  # what a first answer takes is no stall
    with EveryFault(key=KEY, faults=faults, stall=600, seed=1) as server:
        made = proposer(server, tmp_path / "talks", timeout=15.0)
        session, stopped = search(store, made, Budget(60), watch=watch)
        made.close()
        assert server.calls > 60 and set(server.injected) == set(FAULTS)
    assert stopped == "evaluations"
    assert len(session.tree) + session.vain == 60 and session.tree.best is not None
    assert set(watch.kinds) <= {*ANSWER_KINDS, *ENDPOINT_KINDS, "duplicate"}
    assert {"truncated", "prose", "empty", "declined"} <= set(watch.kinds)
    # What was recorded is what happened, and what it took.
    records = store.nodes("s")
    assert [r.kind for r in records if r.candidate is None] == watch.kinds
    assert all(r.usage.model == MODEL and r.usage.calls for r in records)
    assert session.usage.prompt_tokens == sum(r.usage.prompt_tokens for r in records) > 60_000
    talks = sorted((tmp_path / "talks").glob("*.md"))
    assert len(talks) == len(records)
    assert any("This answer cannot be used" in talk.read_text() for talk in talks)


def test_the_key_is_nowhere_but_in_the_environment(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Echo(RewriterEndpoint):
        """A server that shows the key wherever it can."""

        def complete(self, request: dict[str, Any], fault: str = "") -> dict[str, Any]:
            data = super().complete(request, fault)
            message = data["choices"][0]["message"]
            message["content"] = message["content"].replace("Applied", f"Your key is {KEY}. Applied")
            return data

    monkeypatch.setenv("OPENAI_LOG", "debug")
    with Echo(key=KEY, faults={"prose": 0.2}) as server:
        made = proposer(server, tmp_path / "talks", record=str(tmp_path / "talk.jsonl"))
        session, _ = search(store, made, Budget(8))
        made.close()
    store.close()
    assert len(session.tree) > 0
    seen = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"store.db", "talk.jsonl"} <= {path.name for path in seen} and len(seen) > 8
    for path in seen:
        assert KEY.encode() not in path.read_bytes(), path
    assert any("[key]" in path.read_text() for path in seen if path.suffix == ".md")
    out, err = capfd.readouterr()
    assert KEY not in out + err
    assert KEY not in repr(vars(made)) and KEY not in repr(made.settings)


def test_a_budget_in_dollars_is_never_exceeded(store: Store, tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text(f'{{"{MODEL}": [2.0, 8.0]}}')
    with RewriterEndpoint() as server:
        made = proposer(server, prices=str(prices), max_tokens=4000, in_flight=8)
        session, stopped = search(store, made, Budget(500, dollars=0.35))
        assert stopped == "dollars"
        assert 0.25 < session.spent.dollars <= 0.35  # what is left pays for no answer at its worst price
        assert session.spent.dollars == pytest.approx(made.purse.spent)
        assert session.spent.dollars == pytest.approx(sum(r.dollars for r in store.nodes("s")))
        # A larger budget continues where the smaller one ended.
        more, stopped = search(store, made, Budget(500, dollars=0.5))
        assert stopped == "dollars" and session.spent.dollars < more.spent.dollars <= 0.5
        assert len(more.tree) > len(session.tree)
        with pytest.raises(UserError, match=r"may cost \$0\.0320"):
            search(store, made, Budget(dollars=0.01), name="poor")
        made.close()


def test_dollars_need_a_price(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = OpenAI(brief(), "cpp", LLM(models=("unheard-of",), base_url="https://api.example.com/v1"))
    with pytest.raises(UserError, match="--prices FILE"):
        search(store, made, Budget(dollars=1.0))
    made.close()


def test_a_recorded_search_repeats_without_the_endpoint(tmp_path: Path) -> None:
    tape = str(tmp_path / "talk.jsonl")

    def trace(session: Session) -> list[tuple[int | None, str, str]]:
        return [(node.parent, node.strategy, node.candidate.id) for node in session.tree]

    with Store(tmp_path / "a.db") as store, RewriterEndpoint(faults={"prose": 0.1}) as server:
        made = proposer(server, record=tape)
        recorded = trace(search(store, made, Budget(20), judge=Judge(0.003))[0])
        made.close()
    with Store(tmp_path / "b.db") as store:
        made = proposer(None, replay=tape)
        repeated = trace(search(store, made, Budget(20), judge=Judge(0.01))[0])
        assert made.endpoint.cassette is not None and made.endpoint.cassette.diverged == 0
    assert repeated == recorded


class StopAfter(Watch):
    def __init__(self, count: int) -> None:
        self.count = count

    def told(self, session: Session, node: Node, improved: bool) -> None:
        self.count -= 1
        if self.count == 0:
            raise KeyboardInterrupt


def test_an_interrupted_search_goes_on_without_asking_again(store: Store) -> None:
    with RewriterEndpoint(faults={"prose": 0.1}, seed=2) as server:
        made = proposer(server)
        part, stopped = search(store, made, Budget(30), watch=StopAfter(12))
        assert stopped == "interrupted" and len(part.tree) == 12
        calls, known = server.calls, [node.candidate.id for node in part.tree]
        made = proposer(server)
        whole, stopped = search(store, made, Budget(30))
        made.close()
        assert stopped == "evaluations" and len(whole.tree) + whole.vain == 30
        assert {node.candidate.id for node in whole.tree} >= set(known)
        recorded = len(store.nodes("s"))
        assert server.calls - calls <= 2 * (recorded - 12)


class StopStalled(Watch):
    """From the fourth node on the endpoint stalls; Ctrl-C comes when two calls hang."""

    def __init__(self, server: RewriterEndpoint) -> None:
        self.server = server

    def told(self, session: Session, node: Node, improved: bool) -> None:
        if len(session.tree) == 4:
            self.server.faults = {"stall": 1.0}

    def tick(self, session: Session) -> None:
        if self.server.injected.get("stall", 0) >= min(2, session.proposer.in_flight):
            raise KeyboardInterrupt


class Till(RewriterEndpoint):
    """Knows what it may charge: for answers their tokens, for the others the prompt and the longest answer."""

    price = prices.Price(2e-6, 8e-6)
    charged = 0.0

    def complete(self, request: dict[str, Any], fault: str = "") -> dict[str, Any]:
        data = super().complete(request, fault)
        used = data["usage"]
        with self._lock:
            self.charged += self.price.of(used["prompt_tokens"], used["completion_tokens"])
            self.charged -= self.price.worst(request)
        return data

    @property
    def bill(self) -> float:
        return self.charged + sum(self.price.worst(request) for request in self.requests)


def booked(store: Store, name: str = "s") -> float:
    return sum(r.dollars for r in (*store.nodes(name), *store.expenses(name)))


@pytest.fixture
def priced(tmp_path: Path) -> str:
    (tmp_path / "prices.json").write_text(f'{{"{MODEL}": [2.0, 8.0]}}')
    return str(tmp_path / "prices.json")


@pytest.mark.parametrize("in_flight", [1, 4])
def test_ctrl_c_books_what_is_in_flight_and_dollars_stay_hard_on_resume(
    store: Store, priced: str, in_flight: int
) -> None:
    with Till(stall=600) as server:
        asked = {"prices": priced, "max_tokens": 4000, "in_flight": in_flight, "timeout": 600.0}
        made = proposer(server, **asked)
        part, stopped = search(store, made, Budget(500, dollars=2.0), watch=StopStalled(server))
        assert stopped == "interrupted" and len(part.tree) >= 4
        assert part.spent.dollars == pytest.approx(part.purse.spent) == pytest.approx(booked(store))
        # Not less than what may be charged; more where an answer was cut off that the server counts.
        assert part.spent.dollars >= server.bill - 1e-9
        unused = [e for e in store.expenses("s") if e.purpose == "unused"]
        stalled = server.injected["stall"]
        assert stalled and sum(e.usage.unconfirmed > 0 for e in unused) >= stalled
        assert part.usage.unconfirmed == pytest.approx(sum(e.usage.unconfirmed for e in unused))
        assert part.usage.unconfirmed >= stalled * 4000 * 8e-6
        rows = asked_rows(part)
        assert sum(row.dollars for row in rows) == pytest.approx(part.spent.dollars)
        assert "still being written at the end" in {row.refused for row in rows}

        server.faults = {}
        made = proposer(server, **asked)
        # How many answers came before the interrupt is chance: what is left pays for some more in any case.
        limit = part.spent.dollars + 0.2
        whole, stopped = search(store, made, Budget(500, dollars=limit))
        made.close()
        assert stopped == "dollars" and len(whole.tree) > len(part.tree)
        assert part.spent.dollars < whole.spent.dollars <= limit
        assert server.bill - 1e-9 <= whole.spent.dollars == pytest.approx(booked(store))


class TimeIsUp(Watch):
    """The time is over as soon as every call that was sent has arrived."""

    def __init__(self, server: RewriterEndpoint) -> None:
        self.server = server

    def tick(self, session: Session) -> None:
        if 0 < self.server.injected.get("stall", 0) == len(session._writing):
            session.budget = Budget(50, seconds=1e-3, dollars=5.0)


def test_calls_in_flight_when_the_time_is_over_are_booked(store: Store, priced: str) -> None:
    with Till(stall=600, faults={"stall": 1.0}) as server:
        made = proposer(server, prices=priced, timeout=600.0)
        session, stopped = search(store, made, Budget(50, dollars=5.0), watch=TimeIsUp(server))
        assert stopped == "seconds" and not len(session.tree) and server.injected["stall"]
        assert session.spent.dollars == pytest.approx(server.bill) == pytest.approx(booked(store))
        assert session.usage.unconfirmed == pytest.approx(session.spent.dollars)


def test_what_a_lost_endpoint_was_paid_is_booked(store: Store, priced: str) -> None:
    with Till(faults={"half": 1.0}) as server:
        made = proposer(server, prices=priced, retries=0, in_flight=2)
        with pytest.raises(UserError, match="times in a row"):
            search(store, made, Budget(100, dollars=50.0))
        made.close()
    assert booked(store) == pytest.approx(made.purse.spent) and booked(store) > 8 * 16_000 * 8e-6


def test_rewriter_and_model_share_a_search(store: Store) -> None:
    with RewriterEndpoint() as server:
        mixed = Mixed([Rewriter(brief().task), proposer(server)])
        assert mixed.name == "rewriter,openai" and mixed.stochastic and mixed.in_flight == 4
        session, _ = search(store, mixed, Budget(30))
        by = {node.number: node.candidate.proposer for node in session.tree}
        assert set(by.values()) == {"rewriter", "openai"}
        # Each works on what the other wrote.
        for name, other in (("rewriter", "openai"), ("openai", "rewriter")):
            parent = next(node.candidate for node in session.tree if node.candidate.proposer == name)
            vectorize = get("vectorize")
            assert mixed.mask(parent)[vectorize.id]
            made = [mixed.propose(parent, vectorize, 0, Context(number=100 + n)) for n in range(8)]
            assert other in {m.candidate.proposer for m in made if isinstance(m, Proposal)}
        mixed.close()


def test_a_lost_endpoint_ends_the_search_with_what_it_has(store: Store) -> None:
    server = RewriterEndpoint()
    made = proposer(server, retries=0, in_flight=2)
    down = threading.Event()

    class Unplug(Watch):
        def told(self, session: Session, node: Node, improved: bool) -> None:
            if len(session.tree) == 6:
                server.faults = {"500": 1.0}
                down.set()

    with server:
        session, stopped = search(store, made, Budget(100), watch=Unplug())
    made.close()
    assert down.is_set() and "times in a row" in stopped and len(session.tree) >= 6


def test_several_models_are_asked_and_learned_from(store: Store) -> None:
    names = (MODEL, MODEL + "-large")
    with RewriterEndpoint(models=names) as server:
        made = proposer(server, models=names)
        session, _ = search(store, made, Budget(16))
        made.close()
    asked = {record.usage.model for record in store.nodes("s")}
    assert asked == set(names) and len(session.tree) > 0


def test_no_request_stays_pending_however_it_ends(store: Store, tmp_path: Path) -> None:
    """Duplicates, refusals, the rewriter's proposals, warm starts, requests withdrawn and requests replayed."""
    names, kept = (MODEL, MODEL + "-large"), Candidate(KERNEL, strategy=RESTART.name, proposer="warm")
    faults = dict.fromkeys(ANSWER_FAULTS, 0.05)
    with RewriterEndpoint(models=names, faults=faults) as server:
        for attempt in range(2):
            llm = proposer(server, models=names)
            made = WarmStart(Mixed([Rewriter(brief().task), llm]), [kept], 1.0)
            watch = StopAfter(4) if attempt == 0 else None
            session, stopped = search(store, made, Budget(24), watch=watch)
            assert stopped == ("evaluations" if attempt else "interrupted") and llm.tiers.pending == 0
            request = session.request(RESTART.id)
            assert isinstance(request, Request) and llm.tiers.pending == 1
            session.withdraw(request)
            session.withdraw(request)
            assert llm.tiers.pending == 0
            made.close()
    assert session.refusals and session.usage.calls
    assert {"warm", "rewriter"} <= {node.candidate.proposer for node in session.tree}


# One proposal at a time -----------------------------------------------------------------------------------


def answer(
    text: str, parent: Candidate | None = None, strategy: str = "vectorize"
) -> tuple[Any, list[dict[str, Any]]]:
    """What the proposer makes of an answer (the same one, if it asks again), and the requests it sent."""

    class Fixed(RewriterEndpoint):
        def complete(self, request: dict[str, Any], fault: str = "") -> dict[str, Any]:
            data = super().complete(request, fault)
            data["choices"][0]["message"]["content"] = text
            return data

    with Fixed() as server:
        made = proposer(server)
        chosen = RESTART if parent is None else get(strategy)
        got = made.propose(parent, chosen, 0, Context())
        made.close()
        return got, server.requests


def test_flaws_that_can_be_mended_are_asked_about_once() -> None:
    got, requests = answer("```python\nimport os\ndef forward(x): return x\n```")
    assert isinstance(got, Refusal) and got.kind == "contract" and got.usage.calls == 2
    told = requests[1]["messages"]
    assert [m["role"] for m in told] == ["system", "user", "assistant", "user"]
    assert "may not import 'os'" in told[-1]["content"]
    got, requests = answer("<<<<<<< SEARCH\nnowhere\n=======\nx\n>>>>>>> REPLACE", Candidate(KERNEL))
    assert isinstance(got, Refusal) and got.kind == "edit" and len(requests) == 2
    got, requests = answer("I would rather not write code.")
    assert isinstance(got, Refusal) and got.kind == "prose" and len(requests) == 1 and got.attempt


def test_edits_make_the_child_of_what_was_shown() -> None:
    text = "<<<<<<< SEARCH\n    return torch.softmax(x, dim=-1)\n=======\n    return x.softmax(-1)\n>>>>>>> REPLACE"
    parent = Candidate(KERNEL)
    got, requests = answer(text, parent)
    assert isinstance(got, Proposal)
    assert got.candidate.source == KERNEL.replace("torch.softmax(x, dim=-1)", "x.softmax(-1)")
    assert (got.candidate.parent, got.candidate.strategy, got.candidate.proposer) == (
        parent.id,
        "vectorize",
        "openai",
    )
    assert (
        "SEARCH" in requests[0]["messages"][0]["content"]
        and KERNEL.strip() in requests[0]["messages"][1]["content"]
    )


def test_lower_precision_is_masked_where_the_task_forbids_it() -> None:
    made = OpenAI(brief(), "cpp", LLM(models=("m",), base_url="http://localhost:1/v1"))
    mask = made.mask(Candidate(KERNEL))
    made.close()
    assert not mask[get("precision_math").id] and np.count_nonzero(mask) == 21


def test_an_evaluation_that_is_known_is_not_made_again(store: Store) -> None:
    """Two searches that find the same kernel share its evaluation."""
    with RewriterEndpoint() as server:
        made, judge = proposer(server), Judge()
        session = Session(store, "one", SETTING, made, budget=Budget(5))
        ask = session.ask(RESTART.id)
        assert isinstance(ask, Ask) and ask.usage.calls == 1
        session.tell(ask, judge(ask.candidate, None))
        made.close()
    with RewriterEndpoint() as server:
        made = proposer(server)
        other = Session(store, "two", SETTING, made, budget=Budget(5))
        again = other.ask(RESTART.id)
        made.close()
    assert isinstance(again, Ask) and isinstance(again.known, Evaluation)
