"""An OpenAI-compatible endpoint, asked through the official client: many calls in flight from plain threads.

The client lives on an event loop in a thread of its own; ``complete`` may be called from any other. Rate limits,
server errors and broken connections are retried here (the client's own retries could not be paid for one by one)
with growing pauses, as long as ``Retry-After`` says; timeouts and other refusals never. What goes wrong is a typed
``Failure``; what can't get better raises ``ProposerLost``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import difflib
import json
import os
import random
import threading
import warnings
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from ke_gym.errors import UserError
from ke_gym.proposers import prices
from ke_gym.proposers.base import Kind, ProposerLost
from ke_gym.proposers.cassette import Cassette
from ke_gym.proposers.llm import LLM
from ke_gym.proposers.prices import FREE, Account, Price, Purse
from ke_gym.redaction import address, encodable, redactor, sendable, shown, without_login

PATIENCE = 8
"""Calls in a row that the endpoint may fail before it is given up."""
_REMEMBERED = 300  # characters of an error message
_PAUSES = (0.5, 8.0)  # seconds before the first retry, doubled for each one after, and the most
_LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
_GREETING = 20.0  # seconds for the list of models
_MOST_TOKENS = 10**9
_GATEWAYS = (502, 504, 524)  # what waited for the model gave up, which the model need not know

T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """One answer: its text, why it ended (``stop``, ``length``, ``content_filter``, …), the words of a refusal,
    and tokens (``counted`` False: the endpoint named none, they are estimates)."""

    text: str
    finish: str
    declined: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    counted: bool = True


@dataclass(frozen=True)
class Failure:
    """No answer, and why. ``billed``: the endpoint may charge for it nevertheless; ``again``: seconds after which
    it may be asked again (None: asking again is of no use, 0: as it pleases you)."""

    kind: Kind
    reason: str
    billed: bool = False
    again: float | None = None


@dataclass(frozen=True)
class Reply:
    """What a call came to: the result, the response as it came ("" where there was none), and what all attempts
    cost, or (``unconfirmed`` dollars of these, an upper bound) may have cost without an answer."""

    result: Completion | Failure
    response: str = ""
    dollars: float = 0.0
    unconfirmed: float = 0.0


def read(response: str, request: dict[str, Any]) -> Completion | Failure:
    """The completion in a response's bytes; servers leave out what they please."""
    try:
        data = json.loads(response)
        choice = data["choices"][0]
        message = choice["message"]
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        text, declined = encodable(str(content or "")), encodable(str(message.get("refusal") or ""))
        finish = encodable(str(choice.get("finish_reason") or "stop"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        reason = f"the response is no chat completion ({type(error).__name__}: {error})"
        return Failure("malformed", reason, billed=True)
    model = encodable(str(data.get("model") or request["model"]))
    used = data.get("usage")
    asked, answered = (
        _count(used.get(name)) if isinstance(used, dict) else None
        for name in ("prompt_tokens", "completion_tokens")
    )
    if not asked:
        asked = None  # no prompt is empty
    if not answered and text:
        answered = None
    counted = asked is not None and answered is not None
    if asked is None:
        asked = prices.charged("".join(m["content"] for m in request["messages"]))
    if answered is None:
        answered = prices.charged(text + declined)
    return Completion(text, finish, declined, model, asked, answered, counted)


def _count(value: Any) -> int | None:
    """A number of tokens, if it can be one."""
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None


class Endpoint:
    """The endpoint of ``settings`` (or of ``OPENAI_BASE_URL``); raises ``UserError`` where there is no key, or
    the client is not installed."""

    def __init__(self, settings: LLM) -> None:
        self.settings = settings
        self.url = chosen(settings.base_url)
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.redact = redactor(self._key, self.url)
        """Text without the key, in case an endpoint echoes it."""
        self._failed = 0
        self._answered = False
        self._estimated = False
        self._refused: set[str] = set()
        self._lock = threading.Lock()
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self.cassette: Cassette | None = None
        if settings.replay:
            self.cassette = Cassette(settings.replay, replay=True)
            return
        self._open()
        if settings.record:
            self.cassette = Cassette(settings.record, replay=False, redact=self.redact)

    def _open(self) -> None:
        address(self.url)
        sendable(self._key)
        if not self._key and not prices.local(self.url):
            raise UserError(
                "the proposer openai needs a key: set OPENAI_API_KEY (and OPENAI_BASE_URL for another endpoint than"
                " api.openai.com), or use --proposer rewriter, which needs neither"
            )
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "the proposer openai needs the openai package: pip install 'ke-gym[llm]'"
            ) from error
        self._openai = openai
        try:
            # Servers on one's own machine often want no key, but the client does.
            self._client = openai.AsyncOpenAI(
                api_key=self._key or "none",
                base_url=self.url,
                timeout=self.settings.timeout,
                max_retries=0,
            )
        except Exception as error:  # whatever the HTTP library says of an address
            raise UserError(
                f"the address {self.shown} is refused by the openai client ({self._cause(error)}); check"
                " OPENAI_BASE_URL"
            ) from None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    @property
    def shown(self) -> str:
        """The address without what may be secret in it."""
        return shown(self.url, self.redact)

    # Calls ------------------------------------------------------------------------------------------------

    def greet(self) -> None:
        """Find out whether the endpoint is there and takes the key; ``UserError`` if not."""
        if self._client is None:
            return
        openai = self._openai
        try:
            self._run(self._models())
        except openai.AuthenticationError as error:
            raise self._lost(error) from None
        except (openai.APIConnectionError, TimeoutError) as error:
            raise UserError(self._unreachable(error)) from None
        except (openai.OpenAIError, ValueError):
            pass  # not every server lists its models

    async def _models(self) -> list[str]:
        patience = min(self.settings.timeout, _GREETING)
        client = self._client.with_options(max_retries=1, timeout=patience)
        try:
            async with asyncio.timeout(patience):
                raw = await client.models.with_raw_response.list()
            data = json.loads(raw.text)
        except TimeoutError:
            raise TimeoutError(f"no answer within {patience:g} s") from None
        except (ValueError, RecursionError):
            return []  # a page, or nothing that is known
        listed = data.get("data") if isinstance(data, dict) else None
        named = [m.get("id") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        return [encodable(self.redact(name)) for name in named if isinstance(name, str)]

    def complete(
        self, step: str, request: dict[str, Any], price: Price = FREE, account: Account | None = None
    ) -> Reply:
        """Ask, again if that may help, and wait.

        Each attempt is paid from ``account`` in advance, at the worst that ``price`` makes of it; one that may be
        charged for without an answer stays booked so: the prompt's tokens and the longest answer it permits. So does
        one that ``close`` cancels or Ctrl-C cuts short once it is on its way. Raises ``ProposerLost`` for what no
        further call can mend.
        """
        body = json.dumps(request, ensure_ascii=False, sort_keys=True)
        account, worst = account or Account(Purse()), price.worst(request)
        paid_before, unconfirmed_before, pause = account.paid, account.unconfirmed, 0.0
        response = ""
        for attempt in range(self.settings.retries + 1):
            if not account.reserve(worst):
                why = account.purse.overrun or "the dollars that are left do not pay for another answer"
                if account.purse.overrun:
                    warnings.warn(why, stacklevel=2)
                result: Completion | Failure = Failure("dollars", why)
                break
            sent = threading.Event()
            paid: float | None = None  # not known
            try:
                result, response = self._once(step, request, body, pause, sent)
                if isinstance(result, Completion):
                    paid = price.of(result.prompt_tokens, result.completion_tokens)
                    self._warn(result)
                elif not result.billed:
                    paid = 0.0
            except concurrent.futures.CancelledError:
                result, response = Failure("cancelled", "the search ended before an answer came"), ""
            except ProposerLost:
                paid = 0.0
                raise
            finally:
                if paid is None and not sent.is_set():
                    paid = 0.0
                account.settle(worst, worst if paid is None else paid, confirmed=paid is not None)
            if isinstance(result, Completion) or result.again is None or attempt == self.settings.retries:
                break
            pause = result.again or min(_PAUSES[0] * 2**attempt, _PAUSES[1]) * random.uniform(0.75, 1.0)
        if isinstance(result, Failure):
            if result.kind not in ("dollars", "cancelled"):
                self._count(result)
        elif self._client is not None:
            self._failed, self._answered = 0, True
            if self.cassette is not None:
                self.cassette.keep(step, body, response)
        return Reply(result, response, account.paid - paid_before, account.unconfirmed - unconfirmed_before)

    def _once(
        self, step: str, request: dict[str, Any], body: str, pause: float, sent: threading.Event
    ) -> tuple[Completion | Failure, str]:
        """One attempt, ``pause`` seconds from now; ``sent`` is set when it is on its way."""
        if self._client is None:
            assert self.cassette is not None
            try:
                response = self.cassette.answer(step, body)
            except UserError as error:
                raise ProposerLost(str(error)) from error
            return read(response, request), response
        got = self._run(self._ask(request, sent, pause))
        if isinstance(got, Failure):
            return got, ""
        response = self.redact(got)
        return read(response, request), response

    def _warn(self, completion: Completion) -> None:
        """Say once if costs are estimates."""
        with self._lock:
            first = not completion.counted and not self._estimated
            self._estimated |= first
        if first:
            warnings.warn(
                "the endpoint does not say how many tokens its answers take: tokens and dollars are estimates",
                stacklevel=2,
            )

    def _count(self, failure: Failure) -> None:
        """Give an endpoint up that fails again and again."""
        with self._lock:
            self._failed += 1
            if self._failed >= PATIENCE:
                raise ProposerLost(
                    f"the endpoint {self.shown} failed {self._failed} times in a row, the last time because"
                    f" {failure.reason}"
                )

    async def _ask(self, request: dict[str, Any], sent: threading.Event, pause: float = 0.0) -> str | Failure:
        openai = self._openai
        await asyncio.sleep(pause)
        sent.set()
        spoken = self._spoken(request)
        try:
            # The client's timeout is for each piece of an answer, and a server can drip.
            async with asyncio.timeout(self.settings.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(**spoken)
                return str(raw.text)
        except (openai.APITimeoutError, TimeoutError):
            return Failure("timeout", f"no answer came within {self.settings.timeout:g} s", billed=True)
        except openai.APIConnectionError as error:
            # By its name: which HTTP library raises it depends on the client's version.
            reached = type(error.__cause__).__name__ != "ConnectError"
            if not self._answered and not reached:
                raise ProposerLost(self._unreachable(error)) from None
            return Failure("unavailable", f"the connection broke ({self._cause(error)})", reached, 0.0)
        except openai.RateLimitError as error:
            if getattr(error, "code", None) == "insufficient_quota":
                raise self._lost(error) from None
            return Failure("rate_limited", "the rate limit held through all retries", again=_wait(error))
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise await self._explained(error, request) from None
        except openai.APIStatusError as error:
            return await self._status(error, request, spoken, sent)
        except (openai.OpenAIError, ValueError) as error:
            reason = f"the response cannot be read ({self._cause(error)})"
            return Failure("malformed", reason, billed=True)

    async def _status(
        self, error: Any, request: dict[str, Any], spoken: dict[str, Any], sent: threading.Event
    ) -> str | Failure:
        said, status = self._said(error), error.status_code
        if status >= 500:
            reason = f"the server answered {status}: {said}"
            return Failure("unavailable", reason, status in _GATEWAYS, _wait(error))
        # Newer models refuse settings that older servers need; one refusal is enough to learn it.
        for setting, hint in (("max_tokens", "max_completion_tokens"), ("temperature", "temperature")):
            if hint in said and setting in spoken:
                self._refused.add(setting)
                return await self._ask(request, sent)
        return Failure("rejected", f"the server answered {status}: {said}")

    def _spoken(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request without the settings that this endpoint refuses."""
        spoken = {key: value for key, value in request.items() if key not in self._refused}
        if "max_tokens" in self._refused:
            spoken["max_completion_tokens"] = request["max_tokens"]
        return spoken

    async def _explained(self, error: Any, request: dict[str, Any]) -> ProposerLost:
        """What a 401, 403 or 404 means to the user."""
        if error.status_code != 404:
            return self._lost(error)
        try:
            known = await self._models()
        except (self._openai.OpenAIError, ValueError, TimeoutError):
            known = []
        if not known:
            return ProposerLost(
                f"{self.shown} knows no model {request['model']!r}, or is no OpenAI-compatible address (it answered"
                f" 404: {self._said(error)}); check --model and OPENAI_BASE_URL"
            )
        near = difflib.get_close_matches(request["model"], known, n=3, cutoff=0.0)
        return ProposerLost(f"{self.shown} knows no model {request['model']!r}; it offers {', '.join(near)}")

    def _lost(self, error: Any) -> ProposerLost:
        said = self._said(error)
        if error.status_code in (401, 403):
            hint = "check OPENAI_API_KEY" if self._key else "set OPENAI_API_KEY"
            return ProposerLost(f"{self.shown} refused the key ({error.status_code}: {said}); {hint}")
        return ProposerLost(f"{self.shown} gives no more answers ({error.status_code}: {said})")

    def _unreachable(self, error: Exception) -> str:
        return (
            f"the endpoint {self.shown} cannot be reached ({self._cause(error)}); check OPENAI_BASE_URL and that the"
            " server runs, or use --proposer rewriter, which needs none"
        )

    def _said(self, error: Any) -> str:
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        return encodable(self.redact(" ".join(str(said or error.message).split()))[:_REMEMBERED])

    def _cause(self, error: BaseException) -> str:
        cause = error.__cause__ or error
        return encodable(self.redact(str(cause) or type(cause).__name__)[:_REMEMBERED])

    # The loop in the other thread -------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed or self._loop is None:
                work.close()
                raise concurrent.futures.CancelledError
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._tasks.add(future)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
        finally:
            with self._lock:
                self._tasks.discard(future)

    def close(self) -> None:
        """Cancel what is in flight and let the connections go; harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            pending = list(self._tasks)
        for future in pending:
            future.cancel()
        if self._loop is None:
            return
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()


def chosen(base_url: str) -> str:
    """The address to ask: the given one, with the login that ``OPENAI_BASE_URL`` has for it, else that one."""
    known = os.environ.get("OPENAI_BASE_URL", "").strip()
    base_url = base_url.strip()
    if base_url and base_url != without_login(known):
        return base_url
    return known or "https://api.openai.com/v1"


def _wait(error: Any) -> float:
    """The seconds to wait that a response asks for, at most a minute; 0 if it asks for none."""
    headers = error.response.headers
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            seconds = float(headers[name]) * scale
            return min(seconds, _LONGEST_WAIT) if seconds > 0 else 0.0
    return 0.0
