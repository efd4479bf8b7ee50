"""The LLM-chooses policy against a real HTTP server."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest

from ke_gym import policies
from ke_gym.errors import UserError
from ke_gym.policies import Transition
from ke_gym.policies.features import LAYOUT
from ke_gym.policies.llm_chooser import LLMChooser, parse
from ke_gym.proposers import prices
from ke_gym.proposers.prices import Price
from ke_gym.strategies import get
from tests.policies.endpoint import Answer, Endpoint

ALL = np.ones(25, dtype=bool)
ZERO = {name: np.zeros(size, dtype=np.float32) for name, size in LAYOUT.items()}


def fixed(text: str, status: int = 200) -> Answer:
    return lambda request: (status, text)


def choose(answer: Answer, monkeypatch: pytest.MonkeyPatch, mask: np.ndarray = ALL) -> tuple[int, Any, Any]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint(answer) as endpoint:
        policy = LLMChooser(url=endpoint.url, model="m", timeout=10, retries=0)
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


def test_passing_faults_are_retried_and_choices_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = iter([500, 200])
    monkeypatch.setattr(prices, "find", lambda *_: Price(0.0, 1.0))
    with Endpoint(lambda request: (next(statuses), '{"strategy": "fuse"}')) as endpoint:
        policy = LLMChooser(url=endpoint.url, model="m", timeout=10, retries=1)
        action, _ = policy.predict(ZERO, action_masks=ALL)
    assert action == get("fuse").id and not policy.fallbacks and len(endpoint.requests) == 2
    assert copy.deepcopy(policy).dollars == policy.dollars
    assert policy.dollars == prices.tokens('{"strategy": "fuse"}') == policy.state_dict()["dollars"]
