"""Finding tasks by what people type: a name, a family, the suite, a file or a folder."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from ke_gym.errors import UserError
from ke_gym.tasks.source import nearest
from ke_gym.tasks.task import Task

LIBRARY = Path(__file__).parent / "library"
SUITE = "suite"
FAMILY = "family:"


@functools.cache
def library() -> dict[str, Task]:
    """The built-in tasks by name, in order of family and name."""
    tasks = [Task.from_file(path) for path in LIBRARY.glob("*.py") if path.stem != "__init__"]
    return {task.name: task for task in sorted(tasks, key=lambda task: (task.family, task.name))}


def built_in(task: Task) -> bool:
    """Whether a task is one of the suite that ships with the project."""
    return Path(task.path).parent == LIBRARY


def resolve(spec: str | Path) -> list[Task]:
    """The tasks a specification names, at least one.

    "suite" is the whole library; then task names, families ("family:softmax" where a task has the same name),
    task files and folders of task files are tried.
    Raises `UserError`: for an unknown name with the nearest ones, for a broken file with line and reason.
    """
    text, path = str(spec), Path(spec)
    if not isinstance(spec, Path) and os.sep not in text and path.suffix != ".py":
        tasks = library()
        if text == SUITE:
            return list(tasks.values())
        if text in tasks:  # before families: "softmax" is both
            return [tasks[text]]
        if members := [task for task in tasks.values() if task.family == text.removeprefix(FAMILY)]:
            return members
    if path.is_dir():
        files = sorted(file for file in path.glob("*.py") if not file.name.startswith("_"))
        if not files:
            raise UserError(f"the folder {path} holds no task files (*.py); name a folder or file with tasks")
        return [Task.from_file(file) for file in files]
    if path.is_file():
        return [Task.from_file(path)]
    names = [SUITE, *sorted({task.family for task in library().values()}), *library()]
    hint = nearest(path.stem, names) or "; `scripts/tasks.py list` prints the names"
    raise UserError(f"no task, family, file or folder is called {text}{hint}")
