"""Parsing Python from several threads."""

from __future__ import annotations

import ast
import threading

_lock = threading.Lock()
_PATIENCE = 50


def parse(source: str) -> ast.Module:
    """``ast.parse``, one thread at a time.

    Python up to 3.11.7 and 3.12.1 keeps the parser's recursion depth per interpreter and raises ``SystemError`` when
    two threads parse at once (python/cpython#106905). Callers elsewhere do not hold this lock, hence the repeats.
    """
    with _lock:
        for _ in range(_PATIENCE):
            try:
                return ast.parse(source)
            except SystemError:
                continue
        return ast.parse(source)
