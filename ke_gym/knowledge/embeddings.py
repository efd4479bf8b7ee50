"""A reranker that compares meanings rather than words: cosine similarity of embeddings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.knowledge.document import Document
from ke_gym.redaction import address, redactor, sendable, shown

Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""Texts to vectors of one length, in order."""


class Embeddings:
    """Scores documents by the cosine between their embedding and the query's; a ``Reranker``.

    Each document is embedded once. ``embed`` is any model: ``endpoint(name)`` asks an OpenAI-compatible one.
    """

    def __init__(self, embed: Embed) -> None:
        self._embed = embed
        self._vectors: dict[str, NDArray[np.float64]] = {}

    def __call__(self, query: str, documents: Sequence[Document]) -> Sequence[float]:
        new = [document.body for document in documents if document.body not in self._vectors]
        found = [_unit(vector) for vector in self._embed([*new, query])]
        sizes = {vector.shape for vector in (*found, *self._vectors.values())}
        if len(found) != len(new) + 1 or len(sizes) != 1:
            raise UserError(
                f"the embeddings of {len(new) + 1} texts are {len(found)} vectors of {len(sizes)} lengths; use a model"
                " that gives one vector of the same length for each"
            )
        *vectors, asked = found
        self._vectors.update(zip(new, vectors, strict=True))
        return [float(self._vectors[document.body] @ asked) for document in documents]


def endpoint(model: str, base_url: str = "") -> Embed:
    """Embeddings from ``base_url``, or ``OPENAI_BASE_URL``; the key comes from ``OPENAI_API_KEY``.

    ``UserError`` if the client is not installed, or when the endpoint refuses.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError("embeddings need the openai package: pip install 'ke-gym[llm]'") from error
    url = address(base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
    key = sendable(os.environ.get("OPENAI_API_KEY", ""))
    redact = redactor(key, url)

    def refused(error: Exception) -> UserError:
        said = redact(" ".join(str(error).split()))[:200]
        return UserError(
            f"{shown(url, redact)} gives no embeddings from {model!r} ({said}); check the name of the model,"
            " OPENAI_BASE_URL and OPENAI_API_KEY"
        )

    try:
        client = openai.OpenAI(api_key=key or "none", base_url=url, timeout=60)
    except Exception as error:  # whatever the HTTP library says of an address
        raise refused(error) from None

    def embed(texts: Sequence[str]) -> Sequence[Sequence[float]]:
        try:
            answer = client.embeddings.with_raw_response.create(
                model=model, input=list(texts), encoding_format="float"
            )
            return _vectors(answer.text, len(texts))
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            raise refused(error) from None  # the cause would quote the key

    return embed


def _vectors(response: str, count: int) -> list[list[float]]:
    """The vectors in a response's text, in order; ``ValueError`` unless they are ``count`` of one length."""
    try:
        entries = json.loads(response)["data"]
        found = {int(entry["index"]): [float(x) for x in entry["embedding"]] for entry in entries}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError("its answer holds no embeddings") from error
    if len(entries) != count or sorted(found) != list(range(count)):
        raise ValueError(f"it answered {len(entries)} of {count} texts")
    if len({len(vector) for vector in found.values()} - {0}) != 1 or not all(found.values()):
        raise ValueError("its vectors differ in length")
    if not all(math.isfinite(x) for vector in found.values() for x in vector):
        raise ValueError("its vectors are not finite")
    return [found[index] for index in range(count)]


def _unit(vector: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(vector, dtype=np.float64)
    return array / max(float(np.linalg.norm(array)), 1e-12)
