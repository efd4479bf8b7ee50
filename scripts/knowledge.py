"""The knowledge documents: find some, check your own, see which helped.

    python scripts/knowledge.py search "softmax over long rows" --language cpp --strategy fuse
    python scripts/knowledge.py check --knowledge my_docs/
    python scripts/knowledge.py report

`check` reads every document that a search with these folders would use, and exits with 1 if one of them is malformed,
gives instructions instead of advice, or can never be found. `report` compares, over all recorded searches, proposals
that were told of a document with those of the same strategies that were not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ke_gym.errors import UserError
from ke_gym.evaluation.record import home
from ke_gym.knowledge import Knowledge, Situation, learned, usefulness
from ke_gym.knowledge.check import problems
from ke_gym.knowledge.embeddings import Embeddings, endpoint
from ke_gym.search.store import Store
from ke_gym.strategies import get

Folders = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]


@dataclass
class Search:
    """Find documents: by words, and by the situation they are meant for."""

    text: Annotated[str, tyro.conf.Positional] = ""
    """What they should be about."""
    target: str = ""
    """cpu, cuda, hip, mtia, or what your documents name."""
    language: str = ""
    """cpp, triton, cuda, hip, cute, flydsl, or what your documents name."""
    strategy: str = ""
    """A strategy: fuse, vectorize, …"""
    limiter: str = ""
    """What limits the kernel: dram, l2, compute, instructions, latency, …"""
    phase: str = ""
    """draft, improve, fix or tune."""
    device: str = ""
    """The device's name: leaves out what is known of others."""
    limit: int = 5
    """How many."""
    show: bool = False
    """Print the documents, not just their names."""
    knowledge: Folders = ()
    """A folder of your own documents; may be given several times."""
    learned: bool = True
    """Look in the lessons of earlier searches too."""
    embeddings: str = ""
    """An embedding model at OPENAI_BASE_URL that has the last word on the best twenty."""
    json: bool = False
    """Print a JSON list."""


@dataclass
class Check:
    """Check documents: form, names, instructions, and whether each can be found."""

    knowledge: Folders = ()
    """A folder of your own documents; may be given several times."""
    learned: bool = True
    """Check the lessons of earlier searches too."""


@dataclass
class Report:
    """Which documents helped: outcomes of the proposals whose prompts quoted them."""

    store: Path | None = None
    """The store to read; by default the one that searches write to."""
    json: bool = False
    """Print a JSON list."""


def main(command: Search | Check | Report) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 120
    if isinstance(command, Report):
        return report(command, console)
    lessons = home() / learned.FOLDER if command.learned else None
    if isinstance(command, Check):
        return check(command.knowledge, lessons, console)
    if command.limit < 1:
        raise UserError(f"--limit {command.limit} shows nothing; give at least 1")
    if command.strategy:
        get(command.strategy)
    reranker = Embeddings(endpoint(command.embeddings)) if command.embeddings else None
    return search(command, Knowledge(command.knowledge, lessons, reranker), console)


def search(command: Search, knowledge: Knowledge, console: Console) -> int:
    situation = Situation(
        command.target, command.language, command.strategy, command.limiter, command.phase, command.text,
        command.device,
    )  # fmt: skip
    found = knowledge.search(situation)[: command.limit]
    if command.json:
        print(
            json.dumps([{"id": d.id, "title": d.title, "score": score, "body": d.body} for d, score in found])
        )
    elif command.show:
        print("\n\n".join(document.body for document, _ in found))
    else:
        table = Table("document", "title", "score", "tokens")
        for document, score in found:
            table.add_row(Text(document.id), Text(document.title), f"{score:.2f}", str(document.tokens))
        console.print(table)
    return 0


def check(folders: Sequence[Path], lessons: Path | None, console: Console) -> int:
    found, count = problems(folders, lessons)
    for problem in found:
        console.print(Text(problem, style="red"), soft_wrap=True)
    console.print(f"{count} documents, {len(found)} problems")
    return 1 if found else 0


def report(command: Report, console: Console) -> int:
    path = command.store or home() / "store.db"
    if not path.exists():
        raise UserError(f"there is no store at {path}: no search has been recorded yet")
    with Store(path) as store:
        rows = usefulness.measure(store.nodes(session) for session, *_ in store.sessions())
    if command.json:
        print(json.dumps([row.to_dict() for row in rows], indent=1))
        return 0
    if not rows:
        console.print("No recorded proposal was told of a document (only models are: --proposer openai).")
        return 0
    table = Table("document", "told", "correct", "faster", "without it", "median gain")
    for row in rows:
        table.add_row(*map(Text, cells(row)))
    console.print(table)
    return 0


def cells(row: usefulness.Usefulness) -> tuple[str, ...]:
    """A line of the report."""
    return (
        row.document,
        str(row.told),
        f"{100 * row.correct:.0f} %",
        f"{100 * row.faster:.0f} %",
        "-" if row.without is None else f"{100 * row.without:.0f} %",
        "-" if row.gain is None else f"{row.gain:.2f}x",
    )


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Search | Check | Report)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
