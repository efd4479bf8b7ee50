"""Keeping keys out of what people and files get to see, and refusing those that could not be sent."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from urllib.parse import SplitResult, unquote, urlsplit

from ke_gym.errors import UserError

REDACTED = "[key]"


def sendable(key: str) -> str:
    """A key as it is sent; ``UserError`` for one that no header can hold."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            "OPENAI_API_KEY holds blanks or characters other than printable ASCII, which no key does; copy it anew"
        )
    return key


def address(url: str) -> str:
    """An http address as it is asked; ``UserError`` if it is none."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise UserError(
            f"OPENAI_BASE_URL is {shown(url)!r}, which is no http address; give one like http://localhost:8000/v1"
        )
    return url


def split(url: str) -> SplitResult:
    """The parts of an address; of a malformed one, its login and the rest as path."""
    try:
        return urlsplit(url)
    except ValueError:
        scheme, _, rest = url.rpartition("://")
        login, at, rest = rest.rpartition("@")
        path, _, query = rest.partition("?")
        return SplitResult(scheme, login + at, path, query, "")


def without_login(url: str) -> str:
    """An address without the name and the password in it."""
    parts = split(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else url


def shown(url: str, redact: Callable[[str], str] = str) -> str:
    """An address without what may be secret in it."""
    parts = split(url)
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        host += f":{parts.port}" if parts.port else ""
    return redact(parts._replace(netloc=host, query="", fragment="").geturl())


def redactor(key: str, url: str = "") -> Callable[[str], str]:
    """What takes the key, and the login (also as it is sent) and the query in the address, out of a text, in case an
    endpoint echoes them."""
    parts = split(url)
    password = unquote(parts.password or "")
    login = f"{unquote(parts.username or '')}:{password}"
    sent = base64.b64encode(login.encode()).decode() if password else ""
    secrets = [s for s in (key, parts.password or "", password, sent, parts.query) if len(s) >= 6]

    def redact(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, REDACTED)
        return text

    return redact


def encodable(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates, which JSON may spell, are replaced."""
    return text.encode("utf-8", "replace").decode()
