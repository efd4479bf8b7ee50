"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message is one clear sentence (what, where, what to do).

    Scripts print it without a traceback and exit with code 2.
    """
