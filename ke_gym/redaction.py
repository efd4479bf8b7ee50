"""Keeping keys out of what people and files get to see."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

REDACTED = "[key]"


def shown(url: str, redact: Callable[[str], str] = str) -> str:
    """An address without what may be secret in it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        host += f":{parts.port}" if parts.port else ""
    return redact(parts._replace(netloc=host, query="", fragment="").geturl())


def redactor(key: str, url: str = "") -> Callable[[str], str]:
    """What takes the key, and the login (also as it is sent) and the query in the address, out of a text, in case an
    endpoint echoes them."""
    parts = urlsplit(url)
    password = unquote(parts.password or "")
    login = f"{unquote(parts.username or '')}:{password}"
    sent = base64.b64encode(login.encode()).decode() if password else ""
    secrets = [s for s in (key, parts.password or "", password, sent, parts.query) if len(s) >= 6]

    def redact(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, REDACTED)
        return text

    return redact
