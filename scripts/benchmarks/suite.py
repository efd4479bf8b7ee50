"""How fast does every built-in task become, against eager and against torch.compile."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro
from rich.table import Table

from benchmarks import lanes
from benchmarks.figures import Figure, Figures, console, kept_lines, same_settings
from ke_gym import Result, optimize, policies, tasks
from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.account import ALONE, BUILDING, SHARING, together
from ke_gym.evaluation.arms import ArmDied
from ke_gym.evaluation.checking import Rejected
from ke_gym.evaluation.evaluation import BASELINES, HARNESS_VERSION
from ke_gym.evaluation.gpu_client import OutOfDeviceMemory
from ke_gym.evaluation.opening import kernel_language, language_for, open_evaluator
from ke_gym.job import RUN_FILE, read_run
from ke_gym.search.budget import Budget
from ke_gym.search.run import Watch
from ke_gym.search.session import Ask, Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Node
from ke_gym.tasks.task import Task

COMPILERS = BASELINES[1:]
# Families in the order of what compiling, checking and racing their tasks at GPU sizes takes.
LONGEST = ("attention", "matmul", "conv")
IN_ALL = "in all"
"""What a task's search and comparison took, whatever was done: beside the phases of ``Row.time``."""
GPU_WORKERS = 4
# What the last races of searches that are cut short take, in all and a lane; what must be left to begin one.
RESERVED_SECONDS, CONFIRMING_SECONDS, LEAST_SECONDS = 10.0, 8.0, 15.0
# What the project promises of its families on a CPU, over eager.
PROMISED = {"pointwise": 2.0, "norm": 2.0, "softmax": 2.0, "ranking": 2.0, "matmul": 1.0}


@dataclass(frozen=True)
class Row:
    """One task: speedup over eager after a search of ``evaluations``, and the best kernel's over each compiler.

    ``over`` holds the time through a compiler / the best kernel's, ``over_ci`` 95 % intervals of it; ``run`` is the run's
    folder, "" for a task that was refused.
    """

    task: str
    family: str
    evaluations: int
    valid: float
    seconds: float
    seed_correct: bool
    reference_ms: float | None
    best_ms: float | None
    speedup: float
    speedup_ci: tuple[float, float]
    kernel_coverage: float | None
    over: dict[str, float]
    run: str
    harness: int = HARNESS_VERSION
    target: str = "cpu"
    budget: int = 60
    policy: str = "epsilon_greedy"
    seed: int = 0
    language: str = ""
    refused: dict[str, int] = field(default_factory=dict)
    """Why candidates were not taken: outcome → how many; "no gain": correct, but not faster."""
    floor_ms: float | None = None
    """What bytes and FLOPs take at this device's measured peaks, with the slack of ``Peaks.floor_s``."""
    stopped: str = ""
    """Why the search ended; by "seconds" or "interrupted", it goes on when the suite is run again."""
    time: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Where the time went: phase → seconds, and how often it was entered (``ke_gym.evaluation.account``)."""
    over_ci: dict[str, tuple[float, float]] = field(default_factory=dict)
    uncompiled: dict[str, str] = field(default_factory=dict)
    """Compilers that could not be raced, and why: they count for nothing."""

    @property
    def cut(self) -> bool:
        """Whether the search has evaluations left for which there was no time, or was ended by hand."""
        return self.stopped == "interrupted" or (self.stopped == "seconds" and self.evaluations < self.budget)

    @property
    def per_minute(self) -> float:
        return 60 * self.evaluations / self.seconds

    def delivered(self, baseline: str) -> float:
        """What a user gains over ``baseline`` who takes the kernel if it beats eager, and else stays with eager.

        1.0 for a task without a correct kernel.
        """
        over = self.speedup if baseline == "eager" else self.over.get(baseline, 1.0)
        return over if self.speedup_ci[0] > 1.0 else over / self.speedup

    def gain(self, baseline: str) -> float | None:
        """``delivered``; None if it is not known: against a compiler that failed, or is still to be raced."""
        known = baseline == "eager" or baseline in self.over or self.best_ms is None
        return self.delivered(baseline) if known else None

    @property
    def raced(self) -> bool:
        """Whether the kernel, if there is one, was raced against a compiler."""
        return bool(self.over) or self.best_ms is None

    @property
    def compiled(self) -> float:
        """``delivered`` against the better of the compilers."""
        return min((self.delivered(compiler) for compiler in self.over), default=1.0)

    @property
    def library(self) -> float:
        """``delivered`` against the best way to run the task without a kernel of ours."""
        return min(self.delivered("eager"), self.compiled)


@dataclass(frozen=True)
class Job:
    """A task that one process does next: what of search and comparison is left of it, ``until`` then at the latest
    (by the monotonic clock)."""

    task: bytes
    until: float


class CompilerFailed(Exception):
    """A compiler did not make anything of a reference."""


@contextmanager
def compiling() -> Iterator[None]:
    """What fails within is the compiler's doing, but for what lacks memory that others have."""
    try:
        yield
    except (UserError, ArmDied) as error:
        if isinstance(error, OutOfDeviceMemory) and error.elsewhere:
            raise
        raise CompilerFailed(str(error)) from error


class Until(Watch):
    """Lets a search stop, for want of seconds, at ``end`` by the monotonic clock: however long it took to open."""

    def __init__(self, end: float) -> None:
        self._end = end

    def asked(self, session: Session, ask: Ask) -> None:
        self.tick(session)

    def told(self, session: Session, node: Node, improved: bool) -> None:
        self.tick(session)

    def tick(self, session: Session) -> None:
        if time.monotonic() >= self._end and not session.stop_reason:
            session.stop_reason = "seconds"


@dataclass
class Suite:
    """Optimize the built-in suite; resumable, searches too. On GPUs, several tasks at a time: see ``lanes``."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ("suite",)
    """Which tasks: names, families ("family:softmax" where a task has that name), or the whole suite."""
    target: str = "cpu"
    """cpu, cuda (all GPUs that are here, side by side), or cuda:1 for the second GPU alone."""
    language: str = ""
    """What kernels for a GPU are generated in: triton (the default) or cuda."""
    budget: int = 60
    """Evaluations per task."""
    seconds: float | None = None
    """For the target cuda: the whole benchmark ends by then. What is under way is measured, and goes on in another run."""
    lanes: int = 4
    """For the target cuda: tasks per GPU; one of them races, while the others open, compile, generate and check."""
    policy: str = "epsilon_greedy"
    """Who chooses the transformations."""
    seed: int = 0
    """Of every search."""
    compilers: bool = True
    """Race the best kernels against torch.compile too: default and max-autotune; on a GPU max-autotune-no-cudagraphs."""
    out: Path = Path("runs/suite")
    """Runs, and suite.jsonl with the last line of every task: what is there is not done again."""

    def run(self) -> None:
        Budget(self.budget)
        kernel_language(self.target, self.language)
        policies.make(self.policy)
        report(*self.rows([task for spec in self.tasks for task in tasks.resolve(spec)]))

    def rows(self, chosen: Sequence[Task]) -> tuple[list[Row], float | None]:
        """A row of every task that could be finished, and candidates a minute, if any were judged now."""
        self.out.mkdir(parents=True, exist_ok=True)
        done = self._read()
        left = [task for task in chosen if not self._finished(done.get(task.name))]
        known = [done[task.name] for task in chosen if self._finished(done.get(task.name))]
        ended = {row.task for row in known}
        before = {task.name: self._judged(task, done.get(task.name)) for task in left}
        start = time.monotonic()
        in_turn = (row for task in left if (row := self.finish(task)) is not None)
        made = self._on_all_gpus(left) if self.target == "cuda" else in_turn
        rows = {task.name: done[task.name] for task in left if task.name in done and done[task.name].run}
        for row in itertools.chain(known, made):
            if rows.get(row.task) == row:
                continue  # there was no time for it
            rows[row.task] = row
            self._tell(row, f"{sum(map(self._finished, rows.values()))}/{len(chosen)}")
        evaluations = sum(
            max(0, row.evaluations - before[row.task]) for row in rows.values() if row.task not in ended
        )
        rate = 60 * evaluations / (time.monotonic() - start) if evaluations else None
        if missing := [task.name for task in chosen if not self._finished(rows.get(task.name))]:
            console.print(f"not finished in time, run it again: {' '.join(missing)}", highlight=False)
        return [rows[task.name] for task in chosen if task.name in rows], rate

    def _tell(self, row: Row, number: str) -> None:
        against = "".join(f", {value:.2f}x {name}" for name, value in row.over.items())
        console.print(
            f"{number} {row.task}: {row.speedup:.2f}x eager{against}; {row.evaluations} evaluations,"
            f" {row.per_minute:.0f} a minute",
            highlight=False,
        )

    @property
    def _compilers(self) -> tuple[str, ...]:
        return COMPILERS if self.compilers else ()

    def _finished(self, row: Row | None) -> bool:
        """Whether nothing is left to do for a row; what was refused may be mended by now."""
        if row is None or not row.run or row.cut:
            return False
        return not self._left(row) or row.best_ms is None

    def _left(self, row: Row) -> list[str]:
        """The compilers that a row's kernel is still to be raced against."""
        return [name for name in self._compilers if name not in row.over and name not in row.uncompiled]

    def _on_all_gpus(self, left: Sequence[Task]) -> Iterator[Row]:
        """The rows as they are finished: what was begun first, then the tasks that take longest."""
        until = time.monotonic() + (math.inf if self.seconds is None else self.seconds)
        begun = {name for name, row in self._read().items() if row.cut}
        order = sorted(left, key=lambda t: (t.name not in begun, (*LONGEST, t.family).index(t.family)))
        jobs = (Job(task.to_bytes(), until) for task in order)
        for job, row, error in lanes.spread(
            partial(_finish, self), jobs, lanes.shares(lanes.gpus(), self.lanes), until
        ):
            if error is not None:  # one task's costs the others nothing
                name = Task.from_bytes(job.task).name
                if not isinstance(error, lanes.Late):
                    console.print(f"{name}: {error}", highlight=False, style="red", markup=False)
                row = self._read().get(name)  # the search may have ended before the comparison did
            if row is not None:
                yield row

    def finish(self, task: Task, until: float = math.inf) -> Row | None:
        """Do and write what is not in the file yet, of search and comparison; the row, if there is one.

        Nothing begins that cannot end by ``until``.
        """
        row = self._read().get(task.name)
        if row is None or not row.run or row.cut:
            # All that are cut are confirmed one after another.
            end = until - RESERVED_SECONDS - CONFIRMING_SECONDS * self.lanes
            if time.monotonic() > end - LEAST_SECONDS:
                return row
            row = self._optimize(task, row, end)
        if not row.run or self._finished(row) or row.cut:
            return row
        return self._compare(task, row)

    @property
    def _file(self) -> Path:
        return self.out / "suite.jsonl"

    def _read(self) -> dict[str, Row]:
        """The last line of every task."""
        rows = {}
        for data in kept_lines(self._file):
            if data["harness"] != HARNESS_VERSION:
                raise UserError(f"{self._file} was measured by another harness version; choose another --out")
            row = Row(**{**data, "speedup_ci": tuple(data["speedup_ci"])})
            row.time.update({name: (seconds, times) for name, (seconds, times) in row.time.items()})
            row.over_ci.update({name: (low, high) for name, (low, high) in row.over_ci.items()})
            same_settings(self._file, row, self, ("target", "language", "budget", "policy", "seed"))
            rows[row.task] = row
        return rows

    def _write(self, row: Row) -> Row:
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        return row

    def _resumable(self, task: Task) -> Path | None:
        """The folder of the task's last search, if it can go on: of these settings, its store still there."""
        for file in sorted(self.out.glob(f"*-{task.name}*/{RUN_FILE}"), reverse=True):
            folder, run = read_run(file.parent)
            same = (run.target, run.policy, run.seed) == (self.target, self.policy, self.seed)
            if (
                run.task_id == task.id
                and same
                and run.language == kernel_language(self.target, self.language)
            ):
                return folder if Path(run.store).exists() else None
        return None

    def _judged(self, task: Task, row: Row | None) -> int:
        """Evaluations of a task's last search so far, whether or not it lived to write its row."""
        folder = self._resumable(task)
        if folder is None:
            return row.evaluations if row is not None else 0
        _, run = read_run(folder)
        with Store(run.store) as store:
            return sum(node.evaluation is not None for node in store.nodes(run.session))

    def _optimize(self, task: Task, cut: Row | None, end: float) -> Row:
        """Search for one task, from where it was interrupted or ``cut``, until ``end``; a row of nothing gained if it is
        refused.

        Ctrl-C during the search ends the suite, once the row is written.
        """
        start = time.perf_counter()
        row = Row(
            task=task.name, family=task.family, evaluations=0, valid=0.0, seconds=0.0, seed_correct=False,
            reference_ms=None, best_ms=None, speedup=1.0, speedup_ci=(1.0, 1.0), kernel_coverage=None, over={},
            run="", target=self.target, language=self.language, budget=self.budget, policy=self.policy,
            seed=self.seed,
        )  # fmt: skip
        earlier = cut or row
        resume = self._resumable(task)
        result: Result | None
        try:
            result = self._search(task, end, resume)
        except UserError as error:
            console.print(f"{task.name}: {error}", highlight=False, style="red")
            result = self._anew(task, end) if resume is not None else None
        if result is not None:
            row = _filled(row, result)
        wall = time.perf_counter() - start
        spent = together([earlier.time, row.time, {IN_ALL: (wall, 1)}])
        # A process that was ended has written no row: its seconds only the session knows.
        took = max(earlier.seconds + wall, row.seconds)
        row = self._write(replace(row, seconds=took, time=spent))
        if row.stopped == "interrupted":
            raise KeyboardInterrupt
        return row

    def _anew(self, task: Task, end: float) -> Result | None:
        """Another search, after one that could not go on."""
        try:
            return self._search(task, end, None)
        except UserError as error:
            console.print(f"{task.name}: {error}", highlight=False, style="red")
            return None

    def _search(self, task: Task, end: float, resume: Path | None) -> Result:
        return optimize(
            task,
            budget=self.budget,
            target=self.target,
            language=self.language,
            workers=2 if self.target == "cpu" else GPU_WORKERS,
            policy=self.policy,
            seed=self.seed,
            inspect=False,
            out=self.out,
            resume=resume,
            watch=Until(end),
        )

    def _compare(self, task: Task, row: Row) -> Row:
        """Race the best kernel against the reference through each compiler."""
        path = self.out / row.run / "best.py"
        kernel = Candidate.from_file(path, language_for(self.target)(path))
        if self.target == "cpu":
            for compiler in self._left(row):
                row = self._with(row, compiler, lambda: self._over(task, kernel, compiler))  # noqa: B023
            return row
        # It was confirmed against eager, and every fresh process would have to compile again: one race is enough.
        start = time.perf_counter()
        try:
            with open_evaluator(task, self.target) as evaluator:
                evaluator.account.add("opening", time.perf_counter() - start)

                def race(compiler: str) -> tuple[float, tuple[float, float]]:
                    with compiling():
                        evaluator.compile_baseline(compiler)
                    return evaluator.race_baseline(kernel)

                for compiler in self._left(row):
                    row = self._with(row, compiler, partial(race, compiler))
                spent = [row.time, evaluator.account.spent(), {IN_ALL: (time.perf_counter() - start, 1)}]
                row = self._write(replace(row, time=together(spent)))
        except UserError as error:
            console.print(f"{task.name}: {error}", highlight=False, style="red")
        return row

    def _over(self, task: Task, kernel: Candidate, compiler: str) -> tuple[float, tuple[float, float]]:
        with ExitStack() as opened:
            with compiling():
                evaluator = opened.enter_context(open_evaluator(task, self.target, compiler))
            judged = evaluator.evaluate(kernel)
            if judged.speedup is None or judged.speedup_ci is None:
                raise Rejected(judged.outcome, judged.log)
            return judged.speedup, judged.speedup_ci

    def _with(self, row: Row, compiler: str, over: Callable[[], tuple[float, tuple[float, float]]]) -> Row:
        """The row, written with what the kernel is over a compiler; as it was, if the race failed: another run tries again."""
        try:
            value, interval = over()
        except CompilerFailed as error:
            console.print(f"{row.task} through {compiler}: {error}", highlight=False, style="red")
            return self._write(replace(row, uncompiled={**row.uncompiled, compiler: str(error)}))
        except (UserError, Rejected, ArmDied) as error:
            console.print(f"{row.task} against {compiler}: {error}", highlight=False, style="red")
            return row
        over_ci = {**row.over_ci, compiler: interval}
        return self._write(replace(row, over={**row.over, compiler: value}, over_ci=over_ci))


def _finish(suite: Suite, job: Job) -> Row | None:
    """``Suite.finish`` in a process of its own."""
    return suite.finish(Task.from_bytes(job.task), job.until)


def _filled(row: Row, result: Result) -> Row:
    return replace(
        row,
        evaluations=result.evaluations,
        seconds=result.seconds,
        valid=result.valid,
        seed_correct=result.seed_correct,
        reference_ms=result.reference_ms,
        best_ms=result.best_ms,
        speedup=result.speedup,
        speedup_ci=result.speedup_ci,
        kernel_coverage=result.kernel_coverage,
        run=result.run_dir.name,
        floor_ms=result.floor_ms,
        refused=result.refused,
        stopped=result.stopped,
        time=result.time,
    )


def report(rows: Sequence[Row], rate: float | None = None) -> None:
    """A row per task, means per family, and the figures the project promises.

    ``rate``: candidates a minute of all lanes together, by the clock.
    """
    if not rows:
        console.print("no task was finished", highlight=False)
        return
    compilers = [name for name in COMPILERS if any(name in row.over for row in rows)]
    table = Table(
        "task", "family", "eager", "over eager", "95 %", *compilers, "coverage", "valid", "refused", "per min"
    )
    for row in rows:
        low, high = row.speedup_ci
        table.add_row(
            row.task,
            row.family,
            "-" if row.reference_ms is None else f"{row.reference_ms:.3f} ms",
            f"{row.speedup:.2f}x",
            f"{low:.2f}-{high:.2f}",
            *(
                f"{row.over[c]:.2f}x" if c in row.over else "failed" if c in row.uncompiled else "-"
                for c in compilers
            ),
            "-" if row.kernel_coverage is None else f"{row.kernel_coverage:.2f}",
            f"{row.valid:.2f}",
            ", ".join(f"{count} {reason}" for reason, count in row.refused.items()) or "-",
            f"{row.per_minute:.0f}",
        )
    console.print(table)

    against: dict[str, Callable[[Row], float | None]] = {
        name: partial(Row.gain, baseline=name) for name in ("eager", *compilers)
    }
    if compilers:
        against["the better compiler"] = lambda row: row.compiled if row.raced else None
    by_family = {name: [r for r in rows if r.family == name] for name in sorted({r.family for r in rows})}
    families = Table(
        "family",
        "tasks",
        *(f"over {name}" for name in against),
        title="geometric mean (median)",
        title_justify="left",
    )
    for name, members in [*by_family.items(), ("all", list(rows))]:
        gains = [[gain for row in members if (gain := over(row)) is not None] for over in against.values()]
        families.add_row(name, str(len(members)), *map(_summary, gains))
    console.print(families)
    times(rows)

    figures = Figures("suite")
    figures.extend(promised(rows))
    failed = [row.task for row in rows if not row.seed_correct]
    figures.add(Figure("tasks whose first candidate fails", " ".join(failed) or "none", "none", not failed))
    if rate is None:
        rate = 60 * sum(row.evaluations for row in rows) / sum(row.seconds for row in rows)
    least = 40 if rows[0].target == "cpu" else 100
    figures.add(Figure("evaluations a minute", f"{rate:.0f}", f"≥ {least}", rate >= least))
    figures.print()


def times(rows: Sequence[Row]) -> None:
    """Where the time of the searches and comparisons went, by phase.

    What is in no phase: candidates are generated, or none is built yet.
    """
    spent = together([row.time for row in rows])
    if IN_ALL not in spent:
        return
    evaluations = sum(row.evaluations for row in rows)
    table = Table(
        "phase",
        "seconds",
        "times",
        "each",
        "per evaluation",
        title="where the time went",
        title_justify="left",
    )
    beside = (BUILDING, SHARING, ALONE, IN_ALL)
    phases = sum(seconds for name, (seconds, _) in spent.items() if name not in beside)
    spent["nothing to judge"] = spent[IN_ALL][0] - phases, spent[IN_ALL][1]
    for name in [*sorted(spent.keys() - set(beside), key=lambda name: -spent[name][0]), *beside]:
        if name in spent:
            seconds, count = spent[name]
            each = f"{seconds / count:.2f} s", f"{seconds / max(1, evaluations):.3f} s"
            table.add_row(name, f"{seconds:.0f}", str(count), *each)
    console.print(table)


def promised(rows: Sequence[Row]) -> Iterator[Figure]:
    """What the project promises of speed on this target. Rows whose races against compilers are still to come count
    for eager alone."""
    on_gpu = rows[0].target != "cpu"
    overall = geomean([row.delivered("eager") for row in rows])
    yield Figure(
        "geometric mean over eager", f"{overall:.2f}x of {len(rows)} tasks", "≥ 2.0x", overall >= 2.0
    )
    if any(row.over for row in rows):
        raced = [row for row in rows if row.raced]
        name = "max-autotune-no-cudagraphs" if on_gpu else "the better torch.compile"
        gains = [row.gain("max-autotune") if on_gpu else row.compiled for row in raced]
        known = [gain for gain in gains if gain is not None]
        over, least = geomean(known) if known else 1.0, 1.25 if on_gpu else 1.3
        yield Figure(f"... over {name}", f"{over:.2f}x of {len(known)} tasks", f"≥ {least}x", over >= least)
        if on_gpu:
            behind = [f"{row.task} ({_about(row)})" for row in raced if row.library < 1.0]
            yield Figure("tasks below the best library path", " ".join(behind) or "none", "none", not behind)
    for family, least in () if on_gpu else PROMISED.items():
        members = [row.delivered("eager") for row in rows if row.family == family]
        if members:
            mean = geomean(members)
            yield Figure(f"{family} over eager", f"{mean:.2f}x", f"≥ {least}x", mean >= least)


def _about(row: Row) -> str:
    """What a task gains over the best library path; with the interval, where that is a compiler: it may reach 1."""
    compiler = min(row.over, key=lambda name: row.over[name], default="")
    if compiler not in row.over_ci or row.library != row.over[compiler]:
        return f"{row.library:.3f}x"
    low, high = row.over_ci[compiler]
    return f"{row.library:.3f}x [{low:.3f}, {high:.3f}]"


def _summary(values: Sequence[float]) -> str:
    return f"{geomean(values):.2f}x ({median(values):.2f}x)" if values else "-"


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
