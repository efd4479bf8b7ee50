"""What is wrong with a set of documents, all of it at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ke_gym.errors import UserError
from ke_gym.knowledge import learned as lessons
from ke_gym.knowledge.document import ANY, FIELDS, Document, injection, read
from ke_gym.knowledge.index import Situation
from ke_gym.knowledge.library import BUILT_IN, INDEX, Knowledge

_LONG = 1000


def problems(folders: Sequence[Path] = (), learned: Path | None = None) -> tuple[list[str], int]:
    """One sentence per problem of the built-in documents, those in ``folders`` and the lessons in ``learned``, and
    how many documents there are. ``UserError`` for a folder that does not exist."""
    found: list[str] = []
    good: list[tuple[Path, Document]] = []
    for folder in (BUILT_IN, *folders):
        for path in _files(folder):
            try:
                good.append((path, read(path, folder)))
            except UserError as error:
                found.append(str(error))
    if learned is not None and learned.is_dir():
        for path in _files(learned):
            try:
                lessons.load(path, learned)
            except UserError as error:
                found.append(str(error))
    found += [f"{path}: {problem}" for path, document in good for problem in _flaws(document)]
    if not found:
        knowledge = Knowledge(folders, learned)
        found = [problem for document in knowledge for problem in _lost(knowledge, document)]
        return found, len(knowledge)
    return found, len(good)


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise UserError(f"the knowledge folder {folder} does not exist")
    return (path for path in sorted(folder.rglob("*.md")) if path.name != INDEX)


def _flaws(document: Document) -> Iterator[str]:
    if passage := injection(document.body):
        yield f"it gives instructions ({passage!r}); a document tells what is so"
    if document.tokens > _LONG:
        yield f"it takes about {document.tokens} tokens of a prompt that has room for {_LONG}; split it"


def _lost(knowledge: Knowledge, document: Document) -> Iterator[str]:
    """Asked for by its own title and front matter, a document should come up."""
    named = {field: document.front_matter(field)[0] for field in FIELDS}
    named = {field: name for field, name in named.items() if name != ANY}
    device = document.device[0] if document.device else ""
    found = knowledge.retrieve(Situation(**named, text=document.title, device=device), 8, 1 << 20)
    if document not in found:
        yield f"{document.id}: its own title does not find it; give it keywords, or a narrower front matter"
