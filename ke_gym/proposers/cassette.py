"""A cassette: a conversation with an endpoint, byte for byte, in one JSON-lines file.

Each line holds the ``step`` of the search, the ``request`` and the ``response`` as they went over the wire
(without headers, so without a key). Replayed, a request is answered by the recording of the same request; where
the search has taken another turn (times differ from run to run, and prompts quote them), by that of the same
step.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ke_gym.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Exchange:
    """One recorded request and its response."""

    step: str
    request: str
    response: str


class Cassette:
    """A recording at ``path``; replayed from if ``replay``, else written. Thread-safe.

    ``diverged`` counts the replayed answers that were given to another request than the recorded one; ``model``
    is whom the first request of a replayed cassette went to, ``left`` what has not been given yet. The first such answer
    brings a warning.
    """

    def __init__(self, path: str | Path, replay: bool, redact: Callable[[str], str] = str) -> None:
        self.path, self.replay, self.redact = Path(path), replay, redact
        self.diverged = 0
        self.model = ""
        self._lock = threading.Lock()
        self.left: list[Exchange] = []
        if replay:
            self._load()
        else:
            self.path.write_text(json.dumps({"cassette": FORMAT}) + "\n")

    def _load(self) -> None:
        try:
            first, *lines = self.path.read_text().rstrip("\n").split("\n")
            if json.loads(first).get("cassette") != FORMAT:
                raise UserError(f"{self.path} is a cassette of another version; record it anew")
            for line in lines:
                entry = json.loads(line)
                self.left.append(Exchange(entry["step"], entry["request"], entry["response"]))
            if self.left:
                self.model = json.loads(self.left[0].request)["model"]
        except OSError as error:
            raise UserError(f"the cassette {self.path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is no cassette: {error}") from error

    def answer(self, step: str, request: str) -> str:
        """The recorded response; ``UserError`` where there is none. Each recording answers once."""

        def fit(exchange: Exchange) -> int:
            # Equal requests are common (drafts asked for side by side), so the step counts too.
            return 2 * (exchange.request == request) + (exchange.step == step)

        with self._lock:
            best = max(self.left, key=fit, default=None)
            if best is None or fit(best) == 0:
                raise UserError(
                    f"the cassette {self.path} has no answer for step {step}: the search goes on beyond what was"
                    " recorded; give it the budget it was recorded with"
                )
            self.left.remove(best)
            if best.request != request:
                self.diverged += 1
                if self.diverged == 1:
                    warnings.warn(
                        f"at step {step} the search asks otherwise than the one recorded in {self.path}: this answer, and "
                        "maybe others, was given to another request",
                        stacklevel=2,
                    )
            return best.response

    def keep(self, step: str, request: str, response: str) -> None:
        """Record one exchange."""
        entry = {"step": step, "request": self.redact(request), "response": self.redact(response)}
        with self._lock, self.path.open("a") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
