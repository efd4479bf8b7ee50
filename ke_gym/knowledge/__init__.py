"""What is known of hardware, languages and kernels: short documents, and which of them fit a situation.

    >>> from ke_gym.knowledge import Situation, retrieve
    >>> for document in retrieve(Situation("cpu", "cpp", "vectorize", "instructions"), 3, 2000):
    ...     print(document.id)

``Knowledge(folders, learned)`` adds a user's own documents and the lessons of earlier sessions.
"""

from __future__ import annotations

import functools

from ke_gym.knowledge.document import Document
from ke_gym.knowledge.index import Reranker, Situation
from ke_gym.knowledge.library import Knowledge

__all__ = ["Document", "Knowledge", "Reranker", "Situation", "retrieve"]


@functools.cache
def _default() -> Knowledge:
    return Knowledge()


def retrieve(situation: Situation, limit: int, budget_tokens: int) -> list[Document]:
    """The best built-in (and plugged-in) documents: at most ``limit``, at most ``budget_tokens`` together."""
    return _default().retrieve(situation, limit, budget_tokens)
