"""The documents a session may use: the built-in ones, those of plug-ins, the user's folders, what was learned."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from ke_gym.errors import UserError
from ke_gym.knowledge import learned as lessons
from ke_gym.knowledge.document import Document, read
from ke_gym.knowledge.index import Index, Reranker, Situation

BUILT_IN = Path(__file__).parent
ENTRY_POINTS = "ke_gym.knowledge"
INDEX = "index.md"
_RELEVANT = 0.4


class Knowledge:
    """Documents by id, and their retrieval.

    ``folders`` overlay the built-in documents and each other, later ones first: a document of the same id
    replaces the earlier one. ``learned`` is the folder of what earlier sessions left, or None. Raises
    ``UserError`` for a folder that is missing or a document that is malformed.
    """

    def __init__(
        self,
        folders: Sequence[str | Path] = (),
        learned: str | Path | None = None,
        reranker: Reranker | None = None,
    ) -> None:
        found = {document.id: document for document in _built_in()}
        for folder in (*_plugged_in(), *(Path(folder) for folder in folders)):
            overlay = list(documents(folder, str(folder)))
            if not overlay:
                raise UserError(f"{folder} holds no knowledge documents (*.md with front matter)")
            found.update((document.id, document) for document in overlay)
        if learned is not None and Path(learned).is_dir():
            found.update((document.id, document) for document in lessons.documents(Path(learned)))
        self._index = Index(found.values(), reranker)
        self._by_id = found

    def __iter__(self) -> Iterator[Document]:
        return iter(self._index.documents)

    def __len__(self) -> int:
        return len(self._index.documents)

    def get(self, id: str) -> Document:
        """The document of this id; ``UserError`` if there is none."""
        if document := self._by_id.get(id):
            return document
        raise UserError(f"there is no knowledge document {id!r}; scripts/knowledge.py search finds by words")

    def search(self, situation: Situation) -> list[tuple[Document, float]]:
        """Every document that applies, best first, with its score."""
        return self._index.search(situation)

    def retrieve(self, situation: Situation, limit: int, budget_tokens: int) -> list[Document]:
        """The best documents for the situation: at most ``limit``, together at most ``budget_tokens``.

        A document is taken whole or not at all; one that no longer fits gives way to the next. What is far less
        relevant than the best is left out: a prompt is better short than padded.
        """
        found = self.search(situation)
        chosen: list[Document] = []
        left = budget_tokens
        for document, score in found:
            if len(chosen) == limit or score < _RELEVANT * found[0][1]:
                break
            if document.tokens <= left:
                chosen.append(document)
                left -= document.tokens
        return chosen


def documents(folder: Path, origin: str = "") -> Iterator[Document]:
    """The documents below ``folder``, sorted by path; files named index.md only list others."""
    if not folder.is_dir():
        raise UserError(f"the knowledge folder {folder} does not exist")
    for path in sorted(folder.rglob("*.md")):
        if path.name != INDEX:
            yield read(path, folder, origin)


@functools.cache
def _built_in() -> tuple[Document, ...]:
    return tuple(documents(BUILT_IN))


def _plugged_in() -> list[Path]:
    """Folders that installed packages offer: the entry point is a package, or a function that gives a path."""
    folders = []
    for point in entry_points(group=ENTRY_POINTS):
        offered = point.load()
        if callable(offered):
            folders.append(Path(offered()))
        elif getattr(offered, "__path__", None):
            folders.append(Path(offered.__path__[0]))
        else:
            raise UserError(
                f"the entry point {point.name} of {ENTRY_POINTS} gives {point.value}, which is neither a package"
                " nor a function that returns a folder"
            )
    return folders
