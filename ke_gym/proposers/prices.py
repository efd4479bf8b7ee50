"""What tokens cost, and a purse that is never overdrawn."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ke_gym.errors import UserError
from ke_gym.redaction import split

CHARACTERS_PER_TOKEN = 3.5
"""Of code and technical English; a little on the low side, so that estimates err upwards."""
_FRAME = 16  # tokens that a message takes besides its text
_TABLE = Path(__file__).with_name("prices.json")
# What providers append to a model's name without changing its price.
_SUFFIX = re.compile(r"^(-\d{4}-\d{2}-\d{2}|-\d{8}|-\d{3,4}|-latest|@\w+|:\w+)$")


def tokens(text: str) -> int:
    """About how many tokens a text has."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def charged(text: str) -> int:
    """As ``tokens``, for bills: other scripts than Latin take more of them per character."""
    return math.ceil(_bytes(text) / CHARACTERS_PER_TOKEN)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


@dataclass(frozen=True)
class Price:
    """Dollars per token of prompt and answer."""

    prompt: float
    answer: float

    def of(self, prompt_tokens: float, answer_tokens: float) -> float:
        return self.prompt * prompt_tokens + self.answer * answer_tokens

    def worst(self, request: dict[str, Any]) -> float:
        """The most that a chat completion may cost: its ``messages``, no token of which is less than a byte, and
        ``max_tokens`` of answer."""
        sent = sum(_bytes(message["content"]) + _FRAME for message in request["messages"])
        return self.of(sent, request["max_tokens"])


FREE = Price(0.0, 0.0)


def load(path: str | Path = "") -> dict[str, Price]:
    """The built-in table, overruled by the file at ``path``; ``UserError`` names what is wrong with it."""
    table = _read(_TABLE)
    if path:
        table.update(_read(Path(path)))
    return table


def _read(path: Path) -> dict[str, Price]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the price table {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f'the price table {path} is no JSON object of the form {{"model": [in, out]}}')
    table = {}
    for model, price in data.items():
        if model == "about":
            continue
        numbers = isinstance(price, list) and len(price) == 2
        if not numbers or not all(type(p) in (int, float) and 0 <= p < math.inf for p in price):
            raise UserError(
                f"the price table {path} gives {model!r} {price!r} instead of two numbers: dollars per million"
                " tokens of prompt and answer"
            )
        table[model] = Price(price[0] / 1e6, price[1] / 1e6)
    return table


def find(table: dict[str, Price], model: str, base_url: str) -> Price | None:
    """The price of a model: by its name, without a provider's prefix or a version's suffix; free on this
    machine's own network; else None, which means unknown."""
    for name in (model, model.rpartition("/")[2]):
        if name in table:
            return table[name]
        known = [stem for stem in table if name.startswith(stem) and _SUFFIX.match(name[len(stem) :])]
        if known:
            return table[max(known, key=len)]
    return FREE if local(base_url) else None


def local(url: str) -> bool:
    """Whether the host is this machine or on a private network."""
    host = split(url).hostname or ""
    if host == "localhost" or host.endswith((".local", ".localhost", ".internal")):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private


class Purse:
    """A limit in dollars that holds with many calls in flight: each is paid in advance at its worst price.

    ``overrun`` says that a call cost more than that: then nothing can be promised, and a limit pays for no other."""

    def __init__(self) -> None:
        self.limit: float | None = None
        self.spent = 0.0
        self.overrun = ""
        self._reserved = 0.0
        self._changed = threading.Condition()
        self._closed = False

    def fund(self, limit: float | None, spent: float) -> None:
        """A new session's money."""
        with self._changed:
            self.limit, self.spent, self._reserved, self.overrun = limit, spent, 0.0, ""

    @property
    def left(self) -> float | None:
        """What may still be spent; None: any sum."""
        return None if self.limit is None else self.limit - self.spent

    def reserve(self, most: float) -> bool:
        """Set ``most`` dollars aside; False, and nothing happens, if there is less.

        Where only the calls in flight stand in the way, it waits for them: most cost less than their worst.
        """
        with self._changed:
            while (
                self.limit is not None
                and not self.overrun
                and self.spent + self._reserved + most > self.limit
            ):
                if self.spent + most > self.limit or self._reserved <= 1e-12 or self._closed:
                    return False
                self._changed.wait()
            if self.limit is not None and self.overrun:
                return False
            self._reserved += most
            return True

    def settle(self, reserved: float, paid: float) -> None:
        """A call is over: it cost ``paid``."""
        with self._changed:
            self._reserved -= reserved
            self.spent += paid
            if paid > reserved * (1 + 1e-9) and not self.overrun:
                self.overrun = (
                    f"an answer cost ${paid:.4f}, more than the ${reserved:.4f} it may cost at most: the endpoint does"
                    " not keep to max_tokens, so that no limit in dollars holds"
                )
            self._changed.notify_all()

    def close(self) -> None:
        """Let go whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Account:
    """What one payer takes from a purse: ``paid`` in all, of which ``unconfirmed`` is the most that calls without an
    answer may be charged. It tells so even where a call ended by an exception. For one thread."""

    def __init__(self, purse: Purse) -> None:
        self.purse = purse
        self.paid = self.unconfirmed = 0.0

    def reserve(self, most: float) -> bool:
        """As ``Purse.reserve``."""
        return self.purse.reserve(most)

    def settle(self, reserved: float, paid: float, confirmed: bool = True) -> None:
        """As ``Purse.settle``; not ``confirmed``: ``paid`` is an upper bound."""
        self.purse.settle(reserved, paid)
        self.paid += paid
        self.unconfirmed += 0.0 if confirmed else paid
