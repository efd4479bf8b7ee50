"""The tasks there are, and whether each can be trusted to judge a kernel.

    python scripts/tasks.py list
    python scripts/tasks.py list norm softmax --json
    python scripts/tasks.py check                      # the whole suite
    python scripts/tasks.py check problems/ rms_norm   # files, folders, families and names

`check` proves every task before use: its own reference must be accepted and race its own copy at 1.0 within
noise, and each wrong version of it (zeros, a skipped operation, half precision, frozen output, …) must be
rejected. Exit code 1 if a task fails, 2 for an unknown task or a broken task file; a task that breaks while it is
checked costs the others nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ke_gym.errors import UserError
from ke_gym.tasks import Task, resolve

Specs = Annotated[tuple[str, ...], tyro.conf.Positional]


@dataclass
class List:
    """List tasks: name, family, what they compute, shapes, dtype, precision."""

    tasks: Specs = ("suite",)
    """Tasks, families ("family:softmax" where a task has that name), files or folders; the whole suite by default."""
    json: bool = False
    """Print a JSON list instead of the table."""


@dataclass
class Check:
    """Check tasks: the reference is accepted, every mutant is rejected."""

    tasks: Specs = ("suite",)
    """Tasks, families ("family:softmax" where a task has that name), files or folders; the whole suite by default."""
    json: bool = False
    """Print a JSON list instead of the table."""


def main(command: List | Check) -> int:
    tasks = [task for spec in command.tasks for task in resolve(spec)]
    console = Console(stderr=command.json)
    if isinstance(command, List):
        rows = [row(task) for task in tasks]
        print(json.dumps(rows, indent=2)) if command.json else console.print(listing(rows))
        return 0
    return check(tasks, console, command.json)


def row(task: Task) -> dict[str, Any]:
    """What `list` says of a task."""
    shape_set = task.contract()
    shapes = {name: dict(overrides) for name, overrides in task.shapes.items()}
    arguments = task.inputs("ragged" if "ragged" in task.shapes else shape_set)
    return {
        "name": task.name,
        "family": task.family,
        "description": task.description,
        "shapes": shapes,
        "dtype": dtypes(arguments),
        "precision": task.precision,
        "backward": task.backward,
        "id": task.id,
    }


def dtypes(arguments: Iterable[Any]) -> str:
    """The dtypes of the tensors, floats first: "float32, int64"."""
    kinds = {value.dtype for value in arguments if isinstance(value, torch.Tensor)}
    ordered = sorted(kinds, key=lambda dtype: (not dtype.is_floating_point, str(dtype)))
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in ordered)


def listing(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{len(rows)} tasks", title_justify="left")
    for heading in ("task", "family", "CPU shape, dtype", "computes"):
        table.add_column(heading, no_wrap=heading != "computes")
    for task in rows:
        shape = "x".join(str(size) for size in task["shapes"].get("cpu", {}).values())
        permitted = "" if task["precision"] == "strict" else f" ({task['precision']} ok)"
        sizes = f"{shape or 'as in the file'}\n{task['dtype']}{permitted}"
        table.add_row(*map(Text, (task["name"], task["family"], sizes, task["description"])))
    return table


def check(tasks: list[Task], console: Console, as_json: bool) -> int:
    """Check each task and print the verdicts; 1 if any task fails, 2 if one is broken."""
    from ke_gym.evaluation import selfcheck
    from ke_gym.evaluation.zygote import Zygote
    from ke_gym.targets import cpu

    table = Table(title_justify="left")
    for heading in ("task", "verdict", "reference", "races its copy at", "mutants rejected", "reason"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "task")
    results, broken = [], 0
    with Zygote(cpu.facts().cores) as zygote, console.status("checking") as status:
        for number, task in enumerate(tasks, start=1):
            status.update(Text(f"checking {task.name} ({number} of {len(tasks)})"))
            try:
                result = selfcheck.check(task, zygote)
            except UserError as error:
                reason = str(error) if task.path in str(error) else f"{task.path}: {error}"
                results.append(selfcheck.SelfCheck(task.name, False, 0.0, 0.0, (0.0, 0.0), 0, (), reason))
                table.add_row(Text(task.name), "FAILED", "-", "-", "-", Text(reason))
                broken += 1
                continue
            results.append(result)
            low, high = result.speedup_ci
            table.add_row(
                Text(task.name),
                "trusted" if result.ok else "FAILED",
                f"{result.reference_ms:.2f} ms",
                f"{result.speedup:.2f}x [{low:.2f}, {high:.2f}]",
                f"{result.mutants - len(result.survivors)} of {result.mutants}",
                Text(result.reason),
            )
    failed = [result for result in results if not result.ok]
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        console.print(table)
        console.print(f"{len(results) - len(failed)} of {len(results)} tasks can be trusted")
    return 2 if broken else 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(List | Check, description=__doc__)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
