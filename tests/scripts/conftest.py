"""What tests of several scripts need."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.envs.recorded import tables

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of scripts/benchmarks by name; what it prints is not wrapped."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def imported(name: str) -> Any:
        monkeypatch.setattr(import_module("benchmarks.figures").console, "width", 200)
        return import_module(f"benchmarks.{name}")

    return imported


@pytest.fixture
def table_folder(tmp_path: Path) -> Path:
    """The recorded test tables, a file each."""
    for table in tables():
        table.save(tmp_path / "tables" / f"{table.task}.npz")
    return tmp_path / "tables"
