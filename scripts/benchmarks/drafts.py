"""How fast are the generator's kernels as they are, without any search, against eager and torch.compile."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from benchmarks import lanes
from benchmarks.figures import console, kept_lines, machine, same_settings
from benchmarks.forms import DRAFTS, Failed, Form, Recipe, build_form
from benchmarks.operators import OPERATORS
from benchmarks.suite import geomean
from benchmarks.trials import COMPILED, Bench, Job, Over, Raced, answer
from ke_gym import tasks
from ke_gym.evaluation.gpu_setting import arch_of
from ke_gym.targets import cuda
from ke_gym.tasks.task import Task

REFERENCE = "compiled"
"""The name of the compiled reference among what is built, and of what is asked of ``Trial`` for it."""
COMPILERS = 4
"""Processes that compile references side by side."""
RACED = 4
"""So many of a task's forms are raced against the compiled reference."""


@dataclass
class Built:
    """What of a task was built in time, why the rest was not, and how much is ``left``: forms, and the compiled reference."""

    left: int
    ready: dict[str, Form | None] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, form: Form | None, error: Exception | None) -> None:
        """What became of one of them; ``form`` is None for the reference, and for one more form than there are."""
        if isinstance(error, lanes.Late):
            return
        self.left -= 1
        if error is None:
            self.ready[name] = form
        else:
            self.failed[name] = str(error)

    @property
    def forms(self) -> list[Form]:
        return [form for _, form in sorted(self.ready.items()) if form is not None]


@dataclass
class Row:
    """One task, filled as it is measured: times in microseconds, the best form and its error, and what it is over others.

    ``failed`` says what and why, ``wrong`` which form by how much. There was no time to build so many of the forms and the
    compiled reference as are ``left``.
    """

    task: str
    language: str
    variants: int
    built: int = 0
    left: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, float] = field(default_factory=dict)
    eager_us: float | None = None
    compiled_us: float | None = None
    best_us: float | None = None
    best: str = ""
    knobs: str = ""
    error: float | None = None
    over_eager: float | None = None
    over_compiled: float | None = None
    device: str = ""

    @property
    def finished(self) -> bool:
        """Whether there was time for what a row takes: a form, and the compiled reference, if they are not refused."""
        raced = self.compiled_us is not None or not self.failed.keys().isdisjoint(("eager", REFERENCE))
        return raced and (self.built > 0 or not self.left)


@dataclass
class Drafts:
    """Time the generator's kernels as they are, without a search, in a minute or two on one GPU; resumable.

    Nothing is confirmed here: each kernel is compared with eager on one drawing, and timed in one process. Verdicts are
    the evaluator's (scripts/evaluate.py, and the suite). Four references are compiled at a time, so Inductor makes its
    choices on a device that it shares.
    """

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ("suite",)
    """Which tasks: names, families, the whole suite, or operators of the benchmark of that name."""
    language: Literal["triton", "cuda"] = "triton"
    """What kernels are generated in."""
    variants: int = 8
    """Besides a task's first drafts, so many random settings of the first one's knobs: always the same."""
    seconds: float = 120.0
    """Everything ends by then; what is not built by half of it is left out."""
    out: Path = Path("runs/drafts.jsonl")
    """A line per task, written when it is finished: what is there is not done again."""

    def run(self) -> None:
        chosen = self._chosen()
        gpu, end = lanes.gpus()[:1], time.monotonic() + self.seconds
        done = self._read()
        left = [task for name, task in chosen.items() if name not in done or not done[name].finished]
        rows = {name: done[name] for name in chosen if name in done}
        if left:
            rows |= {row.task: row for row in self._made(left, gpu, end)}
        if missing := [name for name in chosen if name not in rows or not rows[name].finished]:
            console.print(f"not finished in time, run it again: {' '.join(missing)}", highlight=False)
        report([rows[name] for name in chosen if name in rows])

    def _chosen(self) -> dict[str, Task]:
        """The tasks by name, each once. Raises ``UserError`` for one that there is not."""
        found = {}
        for spec in self.tasks:
            own = OPERATORS.get(spec)
            found.update({task.name: task for task in ([own.load(spec)] if own else tasks.resolve(spec))})
        return found

    def _made(self, left: Sequence[Task], gpu: list[str], end: float) -> Iterator[Row]:
        """A row of every task that there is time for, written when it is finished."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.out.with_suffix(".inductor").absolute()))
        with lanes.Lane(lanes.shares(gpu)[0]) as lane:
            facts = lane.run(cuda.facts, 0)
            built = self.build(left, gpu, facts, (time.monotonic() + end) / 2)
            bench = Bench(lane, end)
            for number, task in enumerate(left, start=1):
                try:
                    row = self.measure(task, built[task.name], bench)
                except Over:
                    return
                row.device = facts.model
                with self.out.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
                _tell(row, f"{number}/{len(left)}")
                yield row

    def build(
        self, left: Sequence[Task], gpu: Sequence[str], facts: cuda.Facts, until: float
    ) -> dict[str, Built]:
        """What of the tasks can be built until then, on all cores; the first drafts of all tasks come first."""
        arch, cores, packed = arch_of(facts), len(os.sched_getaffinity(0)), {t.to_bytes(): t for t in left}
        built = {task.name: Built(DRAFTS + self.variants + 1) for task in left}
        recipes = (
            Recipe(task, number, self.language, self.variants, arch, facts.cores)
            for number in range(DRAFTS + self.variants)
            for task in packed
        )
        rivals = lanes.spread(
            answer, (Job(REFERENCE, task) for task in packed), lanes.shares(gpu, COMPILERS), until
        )
        with ThreadPoolExecutor(1) as beside:
            references = beside.submit(list, rivals)
            for recipe, form, error in lanes.spread(build_form, recipes, lanes.shares(gpu, cores), until):
                built[packed[recipe.task].name].add(f"form {recipe.number:03}", form, error)
        for job, _, error in references.result():
            built[packed[job.task].name].add(REFERENCE, None, error)
        return built

    def measure(self, task: Task, built: Built, bench: Bench) -> Row:
        """Compare and time every form, and race the best. Raises ``Over`` if there is no time for all of it."""
        row = Row(task.name, self.language, self.variants, len(built.forms), built.left, {**built.failed})
        row.eager_us = _asked(row, bench, "eager", task)
        if row.eager_us is None:
            return row
        right = _right(row, bench, task, built.forms)
        if REFERENCE in built.ready:
            row.compiled_us = _asked(row, bench, REFERENCE, task)
        raced = _raced(row, bench, task, [form for *_, form in right[:RACED]]) if row.compiled_us else {}
        if row.compiled_us:
            right = [(raced[form.label].us, error, form) for _, error, form in right if form.label in raced]
        if right:
            us, row.error, form = min(right, key=_microseconds)
            row.best_us, row.best, row.knobs, row.over_eager = us, form.label, form.knobs, row.eager_us / us
        if row.best in raced:
            row.compiled_us, row.over_compiled = raced[row.best].compiled_us, raced[row.best].over
        return row

    def _read(self) -> dict[str, Row]:
        """The last line of every task."""
        rows = [Row(**data) for data in kept_lines(self.out)]
        for row in rows:
            same_settings(self.out, row, self, ("language", "variants"))
        return {row.task: row for row in rows}


def _asked(row: Row, bench: Bench, what: str, task: Task, *about: Form) -> Any:
    """The bench's answer; None if it failed, which the row then says."""
    try:
        return bench.ask(what, task, *about)
    except Failed as error:
        row.failed[about[0].label if about else what] = str(error)
        return None


def _right(row: Row, bench: Bench, task: Task, forms: Sequence[Form]) -> list[tuple[float, float, Form]]:
    """Microseconds, error and form of those that are right, the fastest first; the row says of the others why not."""
    found = []
    for form in forms:
        if (looked := _asked(row, bench, "look", task, form)) is None:
            continue
        error, us = looked
        if us is None:
            row.wrong[form.label] = error
        else:
            found.append((us, error, form))
    return sorted(found, key=_microseconds)


def _raced(row: Row, bench: Bench, task: Task, forms: Sequence[Form]) -> dict[str, Raced]:
    """``Trial.race`` by label; if it fails, each form by itself, and the row says why some fail then too."""
    if len(forms) < 2:
        return {form.label: one for form in forms for one in _asked(row, bench, "race", task, form) or ()}
    try:
        return dict(zip((form.label for form in forms), bench.ask("race", task, *forms)))
    except Failed:
        return {label: one for form in forms for label, one in _raced(row, bench, task, [form]).items()}


def _microseconds(one: tuple[float, float, Form]) -> float:
    return one[0]


def _tell(row: Row, number: str) -> None:
    told = [*row.failed.items(), *((label, f"wrong by {error:.2g}") for label, error in row.wrong.items())]
    for what, why in told:
        console.print(f"{row.task}, {what}: {why[:200]}", highlight=False, style="red", markup=False)
    best = f"{row.best_us:.1f} us ({row.best})" if row.best_us else "no kernel"
    against = f"{_times(row.over_eager)} eager, {_times(row.over_compiled)} compiled"
    left = f"; no time to build {row.left}" if row.left else ""
    console.print(f"{number} {row.task}: {best}, {against}{left}", highlight=False)


def report(rows: Sequence[Row]) -> None:
    """A row per task, and geometric means of those that have a kernel. There are no targets: nothing is promised of drafts."""
    if not rows:
        console.print("no task was finished", highlight=False)
        return
    table = Table(
        "task", "eager us", "compiled us", "best us", "which", "knobs", "error", "over eager", "over compiled",
        "built", "failed", "wrong", "left",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.task,
            *(_number(value, ".1f") for value in (row.eager_us, row.compiled_us, row.best_us)),
            row.best or "-",
            row.knobs or "-",
            _number(row.error, ".1e"),
            _times(row.over_eager),
            _times(row.over_compiled),
            *map(str, (row.built, len(row.failed), len(row.wrong), row.left)),
        )
    console.print(table)
    against = {
        "eager": [row.over_eager for row in rows if row.over_eager],
        f"torch.compile, {COMPILED}": [row.over_compiled for row in rows if row.over_compiled],
    }
    for name, values in against.items():
        if values:
            mean = f"{geomean(values):.2f}x of {len(values)} tasks"
            console.print(f"geometric mean over {name}: {mean}, nothing confirmed", highlight=False)
    none = [row.task for row in rows if row.best_us is None]
    console.print(f"tasks without a kernel: {' '.join(none) or 'none'}", highlight=False)
    devices = dict.fromkeys(row.device for row in rows if row.device)
    console.print(f"{', '.join(devices)}; {machine()}", highlight=False)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _times(over: float | None) -> str:
    return "-" if over is None else f"{over:.2f}x"
