"""A cassette: a conversation with an endpoint, byte for byte, in one JSON-lines file.

Each line holds the ``step`` of the search, the ``request`` and the ``response`` as they went over the wire
(without headers, so without a key). Replayed, a request is answered by the recording of the same request; where
the search has taken another turn (times differ from run to run, and prompts quote them), by that of the same
step.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from ke_gym.errors import UserError

FORMAT = 1


class Cassette:
    """A recording at ``path``; replayed from if ``replay``, else written. Thread-safe.

    ``diverged`` counts the replayed answers that were given to another request than the recorded one; ``model``
    is whom the first request of a replayed cassette went to.
    """

    def __init__(self, path: str | Path, replay: bool, redact: Callable[[str], str] = str) -> None:
        self.path, self.replay, self.redact = Path(path), replay, redact
        self.diverged = 0
        self.model = ""
        self._lock = threading.Lock()
        self._by_request: dict[str, list[tuple[str, str]]] = {}
        self._by_step: dict[str, list[tuple[str, str]]] = {}
        if replay:
            self._load()
        else:
            self.path.write_text(json.dumps({"cassette": FORMAT}) + "\n")

    def _load(self) -> None:
        try:
            first, *lines = self.path.read_text().splitlines()
            if json.loads(first).get("cassette") != FORMAT:
                raise UserError(f"{self.path} is a cassette of another version; record it anew")
            for line in lines:
                entry = json.loads(line)
                pair = (entry["request"], entry["response"])
                self.model = self.model or json.loads(entry["request"])["model"]
                self._by_request.setdefault(entry["request"], []).append(pair)
                self._by_step.setdefault(entry["step"], []).append(pair)
        except OSError as error:
            raise UserError(f"the cassette {self.path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is no cassette: {error}") from error

    def answer(self, step: str, request: str) -> str:
        """The recorded response; ``UserError`` where there is none."""
        with self._lock:
            pairs = self._by_request.get(request)
            if not pairs:
                pairs = self._by_step.get(step)
                if not pairs:
                    raise UserError(
                        f"the cassette {self.path} has no answer for step {step}: the search goes on beyond what"
                        " was recorded; give it the budget it was recorded with"
                    )
                self.diverged += 1
            pair = pairs[0]
            # Each recording answers once; equal requests were answered one after the other.
            self._by_request[pair[0]].remove(pair)
            for recorded in self._by_step.values():
                if pair in recorded:
                    recorded.remove(pair)
                    break
            return pair[1]

    def keep(self, step: str, request: str, response: str) -> None:
        """Record one exchange."""
        entry = {"step": step, "request": self.redact(request), "response": self.redact(response)}
        with self._lock, self.path.open("a") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
