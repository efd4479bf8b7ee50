"""A reranker that compares meanings rather than words: cosine similarity of embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.knowledge.document import Document
from ke_gym.redaction import redactor, shown

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
        *vectors, asked = [_unit(vector) for vector in self._embed([*new, query])]
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
    url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    key = os.environ.get("OPENAI_API_KEY", "")
    client = openai.OpenAI(api_key=key or "none", base_url=url, timeout=60)
    redact = redactor(key, url)

    def embed(texts: Sequence[str]) -> Sequence[Sequence[float]]:
        try:
            answer = client.embeddings.create(model=model, input=list(texts), encoding_format="float")
        except openai.OpenAIError as error:
            said = redact(" ".join(str(error).split()))[:200]
            raise UserError(
                f"{shown(url, redact)} gives no embeddings from {model!r} ({said}); check the name of the model,"
                " OPENAI_BASE_URL and OPENAI_API_KEY"
            ) from None  # the cause would quote the key
        return [entry.embedding for entry in sorted(answer.data, key=lambda entry: entry.index)]

    return embed


def _unit(vector: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(vector, dtype=np.float64)
    return array / max(float(np.linalg.norm(array)), 1e-12)
