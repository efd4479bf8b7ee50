"""The LLM-chooses policy against a real HTTP server."""

from __future__ import annotations

import copy
import logging
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ke_gym import policies
from ke_gym.errors import UserError
from ke_gym.policies import Transition
from ke_gym.policies.features import LAYOUT
from ke_gym.policies.llm_chooser import LLMChooser, parse
from ke_gym.proposers import prices
from ke_gym.proposers.base import Proposal, Refusal
from ke_gym.proposers.prices import Price
from ke_gym.report.models import asked
from ke_gym.search.budget import Budget
from ke_gym.search.run import run
from ke_gym.search.session import Session
from ke_gym.search.store import Store
from ke_gym.strategies import get
from tests.policies.endpoint import Answer, Endpoint, first_strategy
from tests.search.fakes import SETTING, FakeProposer, Judge

ALL = np.ones(25, dtype=bool)
ZERO = {name: np.zeros(size, dtype=np.float32) for name, size in LAYOUT.items()}


def fixed(text: str, status: int = 200) -> Answer:
    return lambda request: (status, text)


def choose(answer: Answer, monkeypatch: pytest.MonkeyPatch, mask: np.ndarray = ALL) -> tuple[int, Any, Any]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint(answer) as endpoint:
        policy = LLMChooser(url=endpoint.url, model="m", timeout=300, retries=0)
        policy.update(Transition(ZERO, 8, 0.25, ZERO, False, ALL, {"outcome": "correct"}))
        return int(policy.predict(ZERO, action_masks=mask)[0]), policy, endpoint


def test_the_model_sees_legal_strategies_and_history_and_its_choice_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = np.zeros(25, dtype=bool)
    mask[[3, 8, 24]] = True
    action, policy, endpoint = choose(fixed('{"strategy": "fuse"}'), monkeypatch, mask)
    assert action == get("fuse").id and not policy.fallbacks
    (request,) = endpoint.requests
    assert endpoint.keys == ["Bearer secret"] and request["model"] == "m"
    prompt = request["messages"][1]["content"]
    assert get("vectorize").prompt("cpp") in prompt and get("fuse").prompt("cpp") in prompt
    assert "tile_block" not in prompt and "STOP" not in prompt
    assert "fuse: correct, gain +0.250" in prompt


@pytest.mark.parametrize(
    "answer",
    [
        fixed("no idea"),
        fixed('{"strategy": "melt"}'),
        fixed("fuse or vectorize"),
        fixed("overloaded", status=503),
    ],
)
def test_what_is_no_choice_is_replaced_loudly(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        action, policy, _ = choose(answer, monkeypatch)
    assert 0 <= action < 24
    assert len(policy.fallbacks) == 1 and policy.fallbacks[0].startswith("step 2: ")
    assert policy.fallbacks[0] in caplog.text
    assert policy.state_dict()["fallbacks"] == policy.fallbacks


def test_a_lost_endpoint_and_a_missing_one_are_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    with Endpoint() as endpoint:
        url = endpoint.url
    with pytest.raises(UserError, match="cannot be reached"):
        LLMChooser(url=url, model="m").predict(ZERO, action_masks=ALL)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-planted")
    with (
        Endpoint(fixed("you sent secret-planted", status=401)) as endpoint,
        pytest.raises(UserError, match="refused the key") as caught,
    ):
        LLMChooser(url=endpoint.url, model="m").predict(ZERO, action_masks=ALL)
    assert "planted" not in str(caught.value)
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        policies.make("llm_chooser").predict(ZERO, action_masks=ALL)


def test_answers_are_parsed_strictly() -> None:
    legal = np.array([3, 8])
    assert parse('Sure: {"strategy": "vectorize"}, because fuse would not help', legal) == 3
    assert parse("I would vectorize: `vectorize`.", legal) == 3
    with pytest.raises(ValueError, match="names 0 strategies"):
        parse("vectorization", legal)
    with pytest.raises(ValueError, match="'tile_block', which is not legal"):
        parse("tile_block", legal)


class Free(FakeProposer):
    def propose(self, *asked: Any) -> Proposal | Refusal:
        return replace(super().propose(*asked), dollars=0.0)


def search(store: Store, policy: LLMChooser, dollars: float, table: str) -> tuple[Session, str]:
    session = Session(store, "s", SETTING, Free(), budget=Budget(200, dollars=dollars))
    policy.fund(session.purse, table)
    return session, run(session, policy, Judge())


@pytest.fixture
def table(tmp_path: Path) -> str:
    (tmp_path / "prices.json").write_text('{"m": [1.0, 10.0]}')
    return str(tmp_path / "prices.json")


def test_choices_are_paid_from_the_searchs_dollars_and_only_once(tmp_path: Path, table: str) -> None:
    with Endpoint() as endpoint, Store(tmp_path / "store.db") as store:
        policy = LLMChooser(url=endpoint.url, model="m", timeout=300)
        session, stopped = search(store, policy, 0.06, table)
        assert stopped == "dollars" and 0.01 < session.spent.dollars <= 0.06 and len(session.tree) > 2
        assert session.spent.dollars == pytest.approx(policy.dollars)
        expenses = store.expenses("s")
        assert {e.purpose for e in expenses} == {"choices"} and session.usage.calls == len(endpoint.requests)
        assert sum(e.dollars for e in expenses) == pytest.approx(policy.dollars)
        (row,) = asked(session)
        assert row.model == "m" and row.dollars == pytest.approx(policy.dollars)
        # What is recorded is not asked again.
        before = len(endpoint.requests)
        again = LLMChooser(url=endpoint.url, model="m", timeout=300)
        more, stopped = search(store, again, 0.08, table)
        assert stopped == "dollars" and more.spent.dollars <= 0.08 and len(more.tree) > len(session.tree)
        assert more.usage.calls == len(endpoint.requests) > before
        assert more.spent.dollars == pytest.approx(policy.dollars + again.dollars)


def test_ctrl_c_while_the_model_chooses_is_booked_at_its_worst(tmp_path: Path, table: str) -> None:
    over, before = threading.Event(), signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(request: dict[str, Any]) -> tuple[int, str]:
        if len(endpoint.requests) == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            over.wait(300)  # it never answers in time
        return first_strategy(request)

    with Endpoint(interrupted) as endpoint, Store(tmp_path / "store.db") as store:
        policy = LLMChooser(url=endpoint.url, model="m", timeout=300)
        try:
            session, stopped = search(store, policy, 1.0, table)
        finally:
            over.set()
            signal.signal(signal.SIGINT, before)  # whatever the tests were started with
        worst = Price(1e-6, 10e-6).worst(endpoint.requests[2])
        assert stopped == "interrupted" and session.usage.calls == 3
        assert session.usage.unconfirmed == pytest.approx(worst)
        assert store.expenses("s")[-1].dollars == pytest.approx(worst)
        assert session.spent.dollars == pytest.approx(policy.dollars) == pytest.approx(session.purse.spent)


def test_dollars_need_a_price_and_have_to_pay_for_a_choice(
    tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Store(tmp_path / "store.db") as store, Endpoint() as endpoint:
        with pytest.raises(UserError, match=r"one choice by m may cost \$0.0400"):
            search(store, LLMChooser(url=endpoint.url, model="m"), 0.03, table)
        far = LLMChooser(url="https://api.example.com/v1", model="unheard-of")
        with pytest.raises(UserError, match="--prices FILE"):
            search(store, far, 1.0, table)
        assert not endpoint.requests


def test_passing_faults_are_retried_and_choices_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = iter([500, 200])
    monkeypatch.setattr(prices, "find", lambda *_: Price(0.0, 1.0))
    with Endpoint(lambda request: (next(statuses), '{"strategy": "fuse"}')) as endpoint:
        policy = LLMChooser(url=endpoint.url, model="m", timeout=300, retries=1)
        action, _ = policy.predict(ZERO, action_masks=ALL)
    assert action == get("fuse").id and not policy.fallbacks and len(endpoint.requests) == 2
    assert copy.deepcopy(policy).dollars == policy.dollars
    assert policy.dollars == prices.tokens('{"strategy": "fuse"}') == policy.state_dict()["dollars"]
