"""A real OpenAI-compatible HTTP endpoint that answers from a function."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Answer = Callable[[dict[str, Any]], tuple[int, str]]


def first_strategy(request: dict[str, Any]) -> tuple[int, str]:
    """The first strategy the prompt offers."""
    found = re.search(r"^- (\w+)", request["messages"][1]["content"], re.MULTILINE)
    assert found is not None
    return 200, json.dumps({"strategy": found.group(1)})


class Endpoint:
    """Serves ``/v1/chat/completions`` on a free local port; ``requests`` and ``keys`` record the calls."""

    def __init__(self, answer: Answer = first_strategy) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                request = json.loads(self.rfile.read(length))
                endpoint.requests.append(request)
                endpoint.keys.append(self.headers["Authorization"])
                status, text = answer(request)
                if self.path != "/v1/chat/completions":
                    status, text = 404, "no such path"
                body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
