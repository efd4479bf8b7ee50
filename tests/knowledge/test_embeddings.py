"""The embedding reranker, with a made-up model and over real HTTP."""

from __future__ import annotations

import base64
import json
import threading
import traceback
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from ke_gym.errors import UserError
from ke_gym.knowledge import Knowledge, Situation
from ke_gym.knowledge.embeddings import Embeddings, endpoint


def embed(texts: Sequence[str]) -> list[list[float]]:
    """Meaning, for the test, is how often a text speaks of waves and of scans."""
    return [[1.0 + text.lower().count("wavefront"), 1.0 + text.lower().count("scan")] for text in texts]


def test_documents_close_to_the_query_rise_and_each_is_embedded_once() -> None:
    asked: list[Sequence[str]] = []

    def counting(texts: Sequence[str]) -> list[list[float]]:
        asked.append(texts)
        return embed(texts)

    knowledge = Knowledge(reranker=Embeddings(counting))
    situation = Situation(target="cpu", text="scan scan scan scan, and a maximum in each row")
    first = [d.id for d, _ in knowledge.search(situation)]
    assert first.index("guidance/scans") <= [d.id for d, _ in Knowledge().search(situation)].index(
        "guidance/scans"
    )
    assert knowledge.search(situation)
    assert len(asked[0]) == 21 and len(asked[1]) == 1


ODD: dict[str, Any] = {
    "page": "<html>welcome</html>",
    "empty": {},
    "list": [],
    "none": {"data": None},
    "few": {"data": [{"index": 0, "embedding": [1.0]}]},
    "twice": {"data": [{"index": 0, "embedding": [1.0]}] * 2},
    "strings": {"data": [{"index": i, "embedding": ["x"]} for i in range(2)]},
    "numbers": {"data": [1, 2]},
    "lengths": {"data": [{"index": i, "embedding": [1.0] * (i + 1)} for i in range(2)]},
    "nothing": {"data": [{"index": i, "embedding": []} for i in range(2)]},
    "infinite": {"data": [{"index": i, "embedding": [float("inf")]} for i in range(2)]},
}
"""Answers of models that give no embeddings."""


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["model"] == "echo":
            self._send(401, {"error": {"message": f"bad key {self.headers['Authorization']} at {self.path}"}})
            return
        if request["model"] in ODD:
            self._send(200, ODD[request["model"]])
            return
        if request["model"] != "toy":
            self._send(404, {"error": {"message": "no such model"}})
            return
        vectors = embed(request["input"])
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)][::-1]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        self._send(200, {"object": "list", "data": data, "model": "toy", "usage": usage})

    def _send(self, code: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    httpd = HTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()


def test_an_endpoint_embeds_in_order(server: str) -> None:
    texts = ["wavefront wavefront", "scan", "neither"]
    assert endpoint("toy", server)(texts) == embed(texts)


def test_a_refusal_is_one_clear_sentence(server: str) -> None:
    with pytest.raises(UserError, match="no embeddings from 'other'"):
        endpoint("other", server)(["text"])


@pytest.mark.parametrize("login", ["", "me:planted-password@"])
def test_an_endpoint_that_echoes_secrets_is_censored(
    login: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0a1b2c")
    with pytest.raises(UserError, match=r"no embeddings from 'echo' .*\[key\]") as caught:
        endpoint("echo", server.replace("http://", f"http://{login}"))(["text"])
    told = "".join(traceback.format_exception(caught.value))
    assert "planted" not in told and "me:" not in told and server in told
    assert base64.b64encode(login.removesuffix("@").encode()).decode() not in told or not login


@pytest.mark.parametrize("model", ODD)
def test_an_odd_answer_is_one_clear_sentence(model: str, server: str) -> None:
    with pytest.raises(UserError, match=f"no embeddings from '{model}'"):
        endpoint(model, server)(["one", "two"])


@pytest.mark.parametrize("url", ["http://[::1/v1", "nowhere", "http://localhost:abc/v1", "http://a\x07/v1"])
def test_a_bad_address_is_one_clear_sentence(url: str) -> None:
    with pytest.raises(UserError, match="no http address"):
        endpoint("toy", url)


@pytest.mark.parametrize("vectors", [[], [[1.0]], [[1.0], [1.0, 2.0], [1.0]]])
def test_a_model_that_gives_other_vectors_is_named(vectors: list[list[float]]) -> None:
    ranked = Embeddings(lambda texts: vectors)
    with pytest.raises(UserError, match="of the same length"):
        ranked("query", list(Knowledge())[:2])
