"""The real client over real HTTP, against the served rewriter with every fault it can have."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ke_gym.errors import UserError
from ke_gym.proposers import openai, prices, prompt
from ke_gym.proposers.base import Context, ProposerLost
from ke_gym.proposers.cassette import Cassette
from ke_gym.proposers.endpoint import Completion, Endpoint, Failure, _wait, read
from ke_gym.proposers.llm import LLM
from ke_gym.proposers.prices import FREE, Account, Price, Purse
from ke_gym.redaction import redactor
from ke_gym.strategies import RESTART
from ke_gym.testing.rewriter_endpoint import FAULTS, MODEL, RewriterEndpoint
from tests.proposers.llm import KEY, brief

QUICK = LLM(models=(MODEL,), timeout=300.0, retries=3)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def opened() -> Iterator[list[Endpoint]]:
    made: list[Endpoint] = []
    yield made
    for endpoint in made:
        endpoint.close()


def connect(opened: list[Endpoint], server: RewriterEndpoint, **settings: Any) -> Endpoint:
    endpoint = Endpoint(LLM(**{**QUICK.to_dict(), "base_url": server.url, **settings}))
    opened.append(endpoint)
    return endpoint


def request(model: str = MODEL) -> dict[str, Any]:
    asked = prompt.build(brief(), "cpp", None, RESTART, Context(), edit="rewrite", memory="auto")
    return {"model": model, "messages": asked.messages, "max_tokens": 1000}


def test_a_completion_comes_back_with_its_tokens(opened: list[Endpoint]) -> None:
    with RewriterEndpoint(key=KEY) as server:
        endpoint = connect(opened, server)
        endpoint.greet()
        reply = endpoint.complete("0", request())
    completion, response = reply.result, reply.response
    assert isinstance(completion, Completion) and completion.counted
    assert "def forward(x)" in completion.text and completion.finish == "stop"
    assert completion.prompt_tokens > 1000 and completion.completion_tokens > 100
    assert json.loads(response)["choices"][0]["message"]["content"] == completion.text


@pytest.mark.parametrize("fault", ["429", "500", "half"])
def test_what_passes_is_retried(fault: str, opened: list[Endpoint]) -> None:
    with RewriterEndpoint(faults={fault: 0.5}) as server:
        endpoint = connect(opened, server, retries=6)
        got = [endpoint.complete(str(i), {**request(), "seed": i}) for i in range(4)]
        assert all(isinstance(reply.result, Completion) for reply in got)
        assert server.injected[fault] == server.calls - 4 > 0


@pytest.mark.parametrize(
    ("fault", "kind"), [("429", "rate_limited"), ("500", "unavailable"), ("malformed", "malformed")]
)
def test_what_does_not_pass_is_a_typed_failure(fault: str, kind: str, opened: list[Endpoint]) -> None:
    with RewriterEndpoint(faults={fault: 1.0}) as server:
        endpoint = connect(opened, server, retries=1)
        failure = endpoint.complete("0", request()).result
        assert isinstance(failure, Failure) and failure.kind == kind
        assert server.calls == (1 if fault == "malformed" else 2)


def test_settings_that_a_model_refuses_are_left_out_from_then_on(opened: list[Endpoint]) -> None:
    class Picky(RewriterEndpoint):
        def _serve(self, handler: Any, request: dict[str, Any], fault: str) -> None:
            for name, use in (("max_tokens", "Use 'max_completion_tokens' instead."), ("temperature", "")):
                if name in request:
                    handler._send(400, {"error": {"message": f"Unsupported parameter: '{name}'. {use}"}})
                    return
            super()._serve(handler, request, fault)

    with Picky() as server:
        endpoint = connect(opened, server)
        for step in ("0", "1"):
            reply = endpoint.complete(step, {**request(), "temperature": 0.5})
            assert isinstance(reply.result, Completion)
        assert [("max_tokens" in r, "temperature" in r) for r in server.requests] == [
            (True, True), (False, True), (False, False), (False, False),
        ]  # fmt: skip
        assert server.requests[-1]["max_completion_tokens"] == 1000


def test_a_stalled_call_times_out(opened: list[Endpoint]) -> None:
    with RewriterEndpoint(faults={"stall": 1.0}, stall=600) as server:
        failure = connect(opened, server, timeout=1.0, retries=3).complete("0", request()).result
        # It may be paid for already: another would be paid for again. (On a busy machine none may have been sent yet.)
        assert server.calls <= 1
    assert isinstance(failure, Failure) and failure.kind == "timeout"


class Answers(RewriterEndpoint):
    """Answers the n-th call with the n-th status; 0 breaks the connection, 200 completes."""

    def __init__(self, *statuses: int, headers: dict[str, str] | None = None) -> None:
        super().__init__()
        self.statuses, self.headers = list(statuses), {"Retry-After-Ms": "5", **(headers or {})}

    def _serve(self, handler: Any, request: dict[str, Any], fault: str) -> None:
        status = self.statuses.pop(0)
        if status in (0, 200):
            super()._serve(handler, request, "half" if status == 0 else "")
        else:
            handler._send(status, {"error": {"message": "no"}}, self.headers)


@pytest.mark.parametrize("status", [400, 408, 409, 413, 422])
def test_what_the_client_did_wrong_is_never_retried(status: int, opened: list[Endpoint]) -> None:
    with Answers(status, 200) as server:
        failure = connect(opened, server).complete("0", request()).result
        assert isinstance(failure, Failure) and failure.kind == "rejected" and server.calls == 1


PRICE = Price(2e-6, 8e-6)


@pytest.mark.parametrize(
    ("statuses", "billed"),
    [((429, 500, 503, 200), 0), ((0, 0, 200), 2), ((504, 200), 1), ((0, 0), 2), ((500, 400), 0)],
)
def test_every_attempt_that_may_be_charged_for_is_booked(
    statuses: tuple[int, ...], billed: int, opened: list[Endpoint]
) -> None:
    purse, asked = Purse(), request()
    purse.fund(1.0, 0.0)
    with Answers(*statuses) as server:
        reply = connect(opened, server, retries=len(statuses) - 1).complete("0", asked, PRICE, Account(purse))
        assert server.calls == len(statuses)
    expected = billed * PRICE.worst(asked)
    if statuses[-1] == 200:
        assert isinstance(reply.result, Completion)
        expected += PRICE.of(reply.result.prompt_tokens, reply.result.completion_tokens)
    assert reply.dollars == purse.spent == pytest.approx(expected)


def test_attempts_end_where_the_dollars_do(opened: list[Endpoint]) -> None:
    purse, asked = Purse(), request()
    worst = PRICE.worst(asked)
    purse.fund(2.5 * worst, 0.0)
    with Answers(0, 0, 0, 200) as server:
        reply = connect(opened, server, retries=3).complete("0", asked, PRICE, Account(purse))
        assert server.calls == 2
    assert isinstance(reply.result, Failure) and reply.result.kind == "dollars"
    assert reply.dollars == purse.spent == pytest.approx(2 * worst)


def test_an_endpoint_that_only_fails_is_given_up(opened: list[Endpoint]) -> None:
    with RewriterEndpoint(faults={"500": 1.0}) as server:
        endpoint = connect(opened, server, retries=0)
        with pytest.raises(ProposerLost, match="8 times in a row"):
            for step in range(20):
                endpoint.complete(str(step), request())


def test_a_refused_key_is_said_once_and_not_repeated_anywhere(
    opened: list[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RewriterEndpoint(key="another") as server:
        endpoint = connect(opened, server)
        for call in (endpoint.greet, lambda: endpoint.complete("0", request())):
            with pytest.raises(UserError, match="refused the key") as caught:
                call()
            assert "OPENAI_API_KEY" in str(caught.value) and KEY not in str(caught.value)


def test_an_unknown_model_is_named_with_what_there_is(opened: list[Endpoint]) -> None:
    with (
        RewriterEndpoint() as server,
        pytest.raises(ProposerLost, match=r"no model 'gpt-0'.* offers rewriter"),
    ):
        connect(opened, server).complete("0", request("gpt-0"))


def test_an_endpoint_that_is_not_there_is_said_to_be_unreachable() -> None:
    with RewriterEndpoint() as server:
        gone = server.url
    with pytest.raises(UserError, match=r"cannot be reached.*--proposer rewriter"):
        openai.check(LLM(models=(MODEL,), base_url=gone, retries=0))


def test_bad_settings_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    with RewriterEndpoint() as server, pytest.raises(UserError, match="--model"):
        openai.check(LLM(base_url=server.url))
    with pytest.raises(UserError, match="no http address"):
        openai.check(LLM(models=("m",), base_url="localhost:80"))
    with pytest.raises(UserError, match="cannot be read"):
        openai.check(LLM(models=("m",), replay="/nowhere.jsonl"))
    for bad in (
        {"in_flight": 0},
        {"timeout": float("nan")},
        {"memory": "all"},
        {"edit_mode": "x"},
        {"record": "a", "replay": "b"},
    ):
        with pytest.raises(UserError):
            LLM(**bad)  # type: ignore[arg-type]
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match=r"OPENAI_API_KEY.*rewriter, which needs neither"):
        openai.check(LLM(models=("m",)))


def test_closing_cancels_what_is_in_flight(opened: list[Endpoint]) -> None:
    with RewriterEndpoint(faults={"stall": 1.0}, stall=600) as server:
        endpoint = connect(opened, server, timeout=600)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            accounts = [Account(Purse()) for _ in range(4)]
            waiting = [(a, pool.submit(endpoint.complete, "0", request(), PRICE, a)) for a in accounts]
            while server.calls < 4:
                time.sleep(0.01)
            threading.Thread(target=endpoint.close).start()
            for account, future in waiting:
                got = future.result(timeout=300)
                assert isinstance(got.result, Failure) and got.result.kind == "cancelled"
                # They may be charged: the most that this can be is booked, and said to be so.
                worst = pytest.approx(PRICE.worst(request()))
                assert got.dollars == got.unconfirmed == account.paid == account.unconfirmed == worst
        late = endpoint.complete("0", request(), PRICE)  # never sent
        assert isinstance(late.result, Failure) and late.result.kind == "cancelled" and late.dollars == 0
        assert server.calls == 4


def test_servers_may_leave_out_what_they_please() -> None:
    asked = {"model": "m", "messages": [{"role": "user", "content": "x" * 35}]}
    whole = read(
        '{"choices": [{"message": {"content": [{"type": "text", "text": "ab"}, {"type": "x"}]}}]}', asked
    )
    assert isinstance(whole, Completion) and whole.text == "ab" and not whole.counted
    assert whole.prompt_tokens == 10 and whole.completion_tokens == 1 and whole.finish == "stop"
    refused = read(
        '{"choices": [{"message": {"content": null, "refusal": "no"}, "finish_reason": "stop"}]}', asked
    )
    assert isinstance(refused, Completion) and refused.declined == "no" and refused.text == ""
    for text in (
        "",
        "{",
        "[]",
        "null",
        '{"choices": []}',
        '{"choices": [{}]}',
        '{"choices": [{"message": "hi"}]}',
    ):
        failure = read(text, asked)
        assert isinstance(failure, Failure) and failure.kind == "malformed"


def test_a_cassette_answers_byte_for_byte(tmp_path: Path, opened: list[Endpoint]) -> None:
    tape = str(tmp_path / "talk.jsonl")
    with RewriterEndpoint() as server:
        recorder = connect(opened, server, record=tape)
        first = [recorder.complete(str(i), {**request(), "seed": i}) for i in range(3)]
    assert KEY not in Path(tape).read_text()
    player = Endpoint(LLM(replay=tape))
    assert openai.named(LLM(replay=tape), player) == (MODEL,)
    again = [player.complete(str(i), {**request(), "seed": i}) for i in (2, 0, 1)]
    assert [again[1], again[2], again[0]] == first
    assert player.cassette is not None and player.cassette.diverged == 0
    with pytest.raises(ProposerLost, match="no answer for step 0"):
        player.complete("0", request())
    other = Endpoint(LLM(replay=tape))
    with pytest.warns(UserWarning) as told:
        assert other.complete("1", request()) == first[1]  # another prompt: what was said at this step
        assert other.complete("2", request()) == first[2]
    assert other.cassette is not None and other.cassette.diverged == 2
    (said,) = told
    assert str(said.message).startswith(
        f"at step 1 the search asks otherwise than the one recorded in {tape}"
    )


def test_tokens_that_nobody_counted_are_said_to_be_estimates(tmp_path: Path) -> None:
    tape = tmp_path / "talk.jsonl"
    recorder = Cassette(tape, replay=False)
    for step in ("0", "1"):
        body = json.dumps(request(), ensure_ascii=False, sort_keys=True)
        recorder.keep(step, body, '{"choices": [{"message": {"content": "no"}}]}')
    player = Endpoint(LLM(replay=str(tape)))
    with pytest.warns(UserWarning, match="tokens and dollars are estimates") as told:
        replies = [player.complete(step, request(), PRICE) for step in ("0", "1")]
    assert len(told) == 1 and all(reply.dollars > 0 for reply in replies)


def test_a_cassette_is_not_overwritten_and_must_be_one(tmp_path: Path) -> None:
    tape = tmp_path / "talk.jsonl"
    tape.write_text('{"cassette": 99}\n')
    with pytest.raises(UserError, match="another version"):
        Endpoint(LLM(replay=str(tape)))
    with RewriterEndpoint() as server, pytest.raises(UserError, match="exists already"):
        openai.check(LLM(models=(MODEL,), base_url=server.url, record=str(tape)))
    tape.write_text("hello\n")
    with pytest.raises(UserError, match="no cassette"):
        Endpoint(LLM(replay=str(tape)))


def test_faults_are_checked() -> None:
    assert len(set(FAULTS)) == len(FAULTS)
    for faults in ({"fire": 0.1}, {"429": 1.5}, {"429": 0.6, "500": 0.6}):
        with pytest.raises(UserError):
            RewriterEndpoint(faults=faults)


class Lists(RewriterEndpoint):
    """Answers everything with the same bytes; ``drip`` seconds apart."""

    def __init__(self, answer: str, kind: str = "application/json", drip: float = 0.0) -> None:
        super().__init__()
        self.answer, self.kind, self.drip = answer.encode(), kind, drip

    def __enter__(self) -> Lists:
        super().__enter__()
        outer = self

        def get(handler: Any) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", outer.kind)
            handler.send_header("Content-Length", str(len(outer.answer)))
            handler.end_headers()
            with contextlib.suppress(OSError):
                # Byte by byte, a long answer takes more than a greeting's time on a loaded machine.
                if not outer.drip:
                    handler.wfile.write(outer.answer)
                    return
                for byte in outer.answer:
                    handler.wfile.write(bytes([byte]))
                    time.sleep(outer.drip)

        self._server.RequestHandlerClass.do_GET = get  # type: ignore[attr-defined]
        return self


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("<html>welcome</html>", "text/html"),
        ("[]", "application/json"),
        ('{"data": [1, 2]}', "application/json"),
        ('{"data": {"id": 1}}', "application/json"),
        ("[" * 100_000, "application/json"),
        ("{", "application/json"),
    ],
)
def test_a_list_of_models_that_is_none_does_no_harm(answer: str, kind: str, opened: list[Endpoint]) -> None:
    with Lists(answer, kind) as server:
        connect(opened, server).greet()


def test_a_greeting_that_drips_is_not_awaited(opened: list[Endpoint]) -> None:
    with (
        Lists('{"data": []}' * 100, drip=0.05) as server,
        pytest.raises(UserError, match=r"cannot be reached \(no answer within 0.5 s\)"),
    ):
        connect(opened, server, timeout=0.5).greet()


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1:8000/v1",
        "http://localhost:abc/v1",
        "http://localhost:99999/v1",
        "http://local\x07host/v1",
        "http://me:planted-pw@[::1:8000/v1?planted",
    ],
)
def test_a_malformed_address_is_a_sentence_without_its_secrets(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no http address") as caught:
        openai.check(LLM(models=(MODEL,), base_url=url))
    assert "planted" not in str(caught.value)
    assert prices.find({}, "m", url) in (None, FREE)
    assert redactor("", url)("see planted-pw") == ("see [key]" if "planted" in url else "see planted-pw")


@pytest.mark.parametrize("key", ["sk-plänted-0a1b", "sk planted-0a1b", "sk-planted\n-0a1b", "sk-\x07planted"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with RewriterEndpoint() as server, pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        Endpoint(LLM(models=(MODEL,), base_url=server.url))
    assert "0a1b" not in str(caught.value) and "nted" not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_key_is_taken_without_its_end_of_line(
    end: str, monkeypatch: pytest.MonkeyPatch, opened: list[Endpoint]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + end)
    with RewriterEndpoint(key=KEY) as server:
        endpoint = connect(opened, server)
        endpoint.greet()
        assert isinstance(endpoint.complete("0", request()).result, Completion)


def test_a_key_across_the_end_of_a_message_is_not_cut_in_half(opened: list[Endpoint]) -> None:
    class Echo(RewriterEndpoint):
        def _serve(self, handler: Any, request: dict[str, Any], fault: str) -> None:
            handler._send(400, {"error": {"message": "x" * 290 + KEY}})

    with Echo() as server:
        failure = connect(opened, server).complete("0", request()).result
    assert isinstance(failure, Failure) and KEY[:8] not in failure.reason


def test_a_login_is_not_written_down_and_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, opened: list[Endpoint]
) -> None:
    with RewriterEndpoint() as server:
        login = server.url.replace("http://", "http://user:planted-pw@")
        written = LLM(models=(MODEL,), base_url=login).to_dict()
        assert "planted" not in json.dumps(written) and written["base_url"] == server.url
        assert Endpoint(LLM.from_dict(written)).url == server.url
        monkeypatch.setenv("OPENAI_BASE_URL", login)
        assert Endpoint(LLM.from_dict(written)).url == login
        assert Endpoint(LLM(models=(MODEL,), base_url="http://localhost:1/v1")).url == "http://localhost:1/v1"
        endpoint = Endpoint(LLM.from_dict(written))
        opened.append(endpoint)
        assert isinstance(endpoint.complete("0", request()).result, Completion)


def said(content: str = '"no"', usage: str = "null") -> str:
    return f'{{"choices": [{{"message": {{"content": {content}}}}}], "usage": {usage}}}'


ASKED = {"model": "m", "messages": [{"role": "user", "content": "x" * 35}]}


@pytest.mark.parametrize(
    ("prompt_tokens", "answer_tokens", "expected"),
    [("0", "0", (10, 1)), ("7", "0", (7, 1)), ("9" * 401, "3", (10, 3)), ("7", "-1", (7, 1))],
)
def test_counts_that_cannot_be_are_estimated(
    prompt_tokens: str, answer_tokens: str, expected: tuple[int, int]
) -> None:
    usage = f'{{"prompt_tokens": {prompt_tokens}, "completion_tokens": {answer_tokens}}}'
    got = read(said(usage=usage), ASKED)
    assert isinstance(got, Completion) and not got.counted
    assert (got.prompt_tokens, got.completion_tokens) == expected
    exact = read(said('""', '{"prompt_tokens": 7, "completion_tokens": 0}'), ASKED)
    assert isinstance(exact, Completion) and exact.counted


def test_odd_answers_can_be_written_down() -> None:
    got = read(said(r'"def f(): \ud83d"'), ASKED)
    assert isinstance(got, Completion) and got.text == "def f(): ?"
    nested = read('{"choices": ' + "[" * 200_000, ASKED)
    assert isinstance(nested, Failure) and nested.kind == "malformed"


def test_nothing_more_is_asked_where_no_limit_holds(opened: list[Endpoint]) -> None:
    class Talkative(RewriterEndpoint):
        def _serve(self, handler: Any, request: dict[str, Any], fault: str) -> None:
            used = {"prompt_tokens": 10, "completion_tokens": 10**6}
            handler._send(200, {"choices": [{"message": {"content": "no"}}], "usage": used})

    purse, asked = Purse(), request()
    purse.fund(1000.0, 0.0)
    with Talkative() as server:
        endpoint = connect(opened, server)
        first = endpoint.complete("0", asked, PRICE, Account(purse))
        assert isinstance(first.result, Completion) and purse.spent == first.dollars > 7
        with pytest.warns(UserWarning, match="does not keep to max_tokens"):
            second = endpoint.complete("1", asked, PRICE, Account(purse)).result
        assert isinstance(second, Failure) and second.kind == "dollars" and "max_tokens" in second.reason
        assert server.calls == 1
        unlimited = Purse()
        for step in ("0", "1"):
            got = endpoint.complete(step, asked, PRICE, Account(unlimited)).result
            assert isinstance(got, Completion)


def test_the_worst_price_holds_for_any_script() -> None:
    asked = {"messages": [{"role": "user", "content": "\U00013000" * 100}], "max_tokens": 0}
    assert Price(1.0, 0.0).worst(asked) >= 400


@pytest.mark.parametrize(("header", "seconds"), [("61", 60.0), ("3", 3.0), ("-1", 0.0), ("soon", 0.0)])
def test_a_server_may_ask_to_wait_a_minute(header: str, seconds: float) -> None:
    assert _wait(SimpleNamespace(response=SimpleNamespace(headers={"retry-after": header}))) == seconds
