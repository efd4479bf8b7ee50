"""Which replay tables there are: those that ship with the project, by split, and those of your own."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ke_gym.envs.table import Table
from ke_gym.errors import UserError

SHIPPED = Path(__file__).parent / "tables"

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("pointwise", "norm", "matmul", "reduction", "scan", "gather"),
    "validation": ("softmax", "conv", "pooling"),
    "test": ("ranking", "attention"),
}
"""By operator family, not by task: what a policy is tested on, it has seen nothing like."""

TableSpec = str | Path | Table


def split_of(family: str) -> str:
    """``train``, ``validation`` or ``test``; families of one's own are for training."""
    return next((split for split, families in SPLITS.items() if family in families), "train")


def load(specs: TableSpec | Sequence[TableSpec] = "all") -> list[Table]:
    """The tables that ``specs`` name, each once.

    A specification is ``"all"``, a split, a family or a task (of the tables that ship), a file, a folder, or a
    table. A folder that is called like one of the first is ``"./train"``, or a ``Path``. ``UserError`` for an unknown
    one (nearest suggested), an unfit file, different tables of one task, or none at all.
    """
    listed = [specs] if isinstance(specs, (str, Path, Table)) else list(specs)
    found: dict[str, Table] = {}
    for spec in listed:
        made = [spec] if isinstance(spec, Table) else [_table(path) for path in files((spec,))]
        found |= {table.hash: table for table in made}
    if not found:
        raise UserError("a replay needs at least one table")
    counts = Counter(table.task for table in found.values())
    if twice := [task for task, count in counts.items() if count > 1]:
        raise UserError(
            f"there are different tables of {', '.join(twice)}; name one of each, or join those of one machine with"
            " scripts/record.py --from"
        )
    return list(found.values())


def files(specs: Sequence[str | Path]) -> list[Path]:
    """The files that the specifications name, in order."""
    return [path for spec in specs for path in _files(spec)]


def _files(spec: str | Path) -> list[Path]:
    if isinstance(spec, str) and "/" not in spec and (found := _shipped(spec)):
        return found
    path = Path(spec)
    if path.suffix == ".npz" and path.exists():
        return [path]
    if path.is_dir():
        inside = sorted(path.glob("*.npz"))
        if not inside:
            raise UserError(f"the folder {path} holds no replay table (*.npz); scripts/record.py makes them")
        return inside
    if found := _shipped(str(spec)):
        return found
    shipped = [file.stem for file in sorted(SHIPPED.glob("*.npz"))]
    near = difflib.get_close_matches(str(spec), [*shipped, *SPLITS], n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "scripts/record.py makes them"
    raise UserError(f"there is no replay table {str(spec)!r}; {hint}")


def _shipped(name: str) -> list[Path]:
    """The shipped tables that a task, split or family of this name has; none for another."""
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.npz"))}
    if name == "all":
        return list(shipped.values())
    if name in shipped:
        return [shipped[name]]
    families = {file: _family(file) for file in shipped.values()}
    return [file for file, family in families.items() if name in (split_of(family), family)]


def _table(path: Path) -> Table:
    return _loaded(path, *_state(path))


def _family(path: Path) -> str:
    return _known(path, *_state(path))


def _state(path: Path) -> tuple[int, int]:
    """Changes whenever the file does."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=256)
def _loaded(path: Path, changed: int, size: int) -> Table:
    return Table.load(path)


@lru_cache(maxsize=256)
def _known(path: Path, changed: int, size: int) -> str:
    return Table.family_of(path)
