"""Figures of a benchmark: printed when they are known, kept as JSON, and as one table at the end."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ke_gym.errors import UserError
from ke_gym.targets import cpu

console = Console()
if not console.is_terminal:
    console.width = 160


def kept_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON-lines file, if it is there; one that was cut off is as good as none."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            data = json.loads(line)
        except ValueError:
            continue
        yield data


def same_settings(path: Path, row: object, asked: object, names: Sequence[str]) -> None:
    """Raises ``UserError`` for a row of ``path`` that was measured with other settings than are asked for now."""
    for name in names:
        before, now = getattr(row, name), getattr(asked, name)
        if before != now:
            raise UserError(f"{path} was measured with --{name} {before}, not {now}; choose another --out")


@dataclass(frozen=True)
class Figure:
    """One measured figure and the target it is held against; without one (empty) it is there to be read."""

    measure: str
    value: str
    target: str
    reached: bool


class Figures:
    """All figures of one benchmark."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name, self.path = name, path
        self.figures: list[Figure] = []

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        against = f" (target {figure.target})" if figure.target else ""
        console.print(f"{figure.measure}: {figure.value}{against}", highlight=False)
        if self.path is not None:
            self.path.write_text(json.dumps([asdict(f) for f in self.figures], indent=1))

    def extend(self, figures: Iterable[Figure]) -> None:
        for figure in figures:
            self.add(figure)

    def print(self) -> None:
        table = Table("measure", "value", "target", "reached", title=self.name, title_justify="left")
        for figure in self.figures:
            reached = ("yes" if figure.reached else "NO") if figure.target or not figure.reached else ""
            table.add_row(figure.measure, figure.value, figure.target, reached)
        console.print(table)
        console.print(machine(), highlight=False)


def machine() -> str:
    """Date, processor and versions: what a figure means nothing without."""
    facts = cpu.facts()
    return (
        f"{time.strftime('%Y-%m-%d')}, {facts.model}, {facts.cores} cores, torch {torch.__version__},"
        f" Python {platform.python_version()}"
    )
