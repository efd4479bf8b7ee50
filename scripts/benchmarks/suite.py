"""How fast does every built-in task become, against eager and against torch.compile."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro
from rich.table import Table

from benchmarks.figures import Figure, Figures, console
from ke_gym import Result, optimize, policies, tasks
from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import BASELINES, HARNESS_VERSION
from ke_gym.evaluation.opening import kernel_language, open_evaluator
from ke_gym.search.budget import Budget
from ke_gym.tasks.task import Task

COMPILERS = BASELINES[1:]
# What the project promises of its families, over eager.
PROMISED = {"pointwise": 2.0, "norm": 2.0, "softmax": 2.0, "ranking": 2.0, "matmul": 1.0}


@dataclass(frozen=True)
class Row:
    """One task: speedup over eager after a search of ``evaluations``, and the best kernel's over each compiler.

    ``over`` holds the time through a compiler / the best kernel's; ``run`` is the run's folder, "" for a task that
    was refused.
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

    @property
    def per_minute(self) -> float:
        return 60 * self.evaluations / self.seconds

    def delivered(self, baseline: str) -> float:
        """What a user gains over ``baseline`` who takes the kernel if it beats eager, and else stays with eager.

        1.0 for a task without a correct kernel.
        """
        over = self.speedup if baseline == "eager" else self.over.get(baseline, 1.0)
        return over if self.speedup_ci[0] > 1.0 else over / self.speedup

    @property
    def compiled(self) -> float:
        """``delivered`` against the better of the compilers."""
        return min((self.delivered(compiler) for compiler in self.over), default=1.0)


@dataclass
class Suite:
    """Optimize the built-in suite, one task after the other; resumable."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ("suite",)
    """Which tasks: names, families, or the whole suite."""
    target: str = "cpu"
    """cpu, cuda, or cuda:1 for the second GPU."""
    budget: int = 60
    """Evaluations per task."""
    policy: str = "epsilon_greedy"
    """Who chooses the transformations."""
    seed: int = 0
    """Of every search."""
    compilers: bool = True
    """Race the best kernels against torch.compile (default and max-autotune) too."""
    out: Path = Path("runs/suite")
    """Runs, and suite.jsonl with a line per finished task: what is there is not done again."""

    def run(self) -> None:
        Budget(self.budget)
        policies.make(self.policy)
        chosen = [task for spec in self.tasks for task in tasks.resolve(spec)]
        self.out.mkdir(parents=True, exist_ok=True)
        done = self._read()
        rows = []
        for number, task in enumerate(chosen, 1):
            row = done.get(task.name)
            if row is None or not row.run:  # what was refused may be mended by now
                row = self._optimize(task)
            if self.compilers and not row.over and row.best_ms is not None:
                row = self._compare(task, row)
            rows.append(row)
            against = "".join(f", {value:.2f}x {name}" for name, value in row.over.items())
            console.print(
                f"{number}/{len(chosen)} {row.task}: {row.speedup:.2f}x eager{against}; {row.evaluations}"
                f" evaluations, {row.per_minute:.0f} a minute",
                highlight=False,
            )
        report(rows)

    @property
    def _file(self) -> Path:
        return self.out / "suite.jsonl"

    def _read(self) -> dict[str, Row]:
        """The last line of every task; a line that was cut off is as good as none."""
        rows = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else ():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if data["harness"] != HARNESS_VERSION:
                raise UserError(f"{self._file} was measured by another harness version; choose another --out")
            row = Row(**{**data, "speedup_ci": tuple(data["speedup_ci"])})
            for name in ("target", "budget", "policy", "seed"):
                before, now = getattr(row, name), getattr(self, name)
                if before != now:
                    raise UserError(
                        f"{self._file} was measured with --{name} {before}, not {now}; choose another --out"
                    )
            rows[row.task] = row
        return rows

    def _write(self, row: Row) -> Row:
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        return row

    def _optimize(self, task: Task) -> Row:
        """Search for one task; a row of nothing gained if it is refused."""
        start = time.perf_counter()
        row = Row(
            task=task.name, family=task.family, evaluations=0, valid=0.0, seconds=0.0, seed_correct=False,
            reference_ms=None, best_ms=None, speedup=1.0, speedup_ci=(1.0, 1.0), kernel_coverage=None, over={},
            run="", target=self.target, budget=self.budget, policy=self.policy, seed=self.seed,
        )  # fmt: skip
        try:
            result = optimize(
                task,
                budget=self.budget,
                target=self.target,
                policy=self.policy,
                seed=self.seed,
                out=self.out,
            )
        except UserError as error:
            console.print(f"{task.name}: {error}", highlight=False, style="red")
        else:
            row = _filled(row, result)
        return self._write(replace(row, seconds=time.perf_counter() - start))

    def _compare(self, task: Task, row: Row) -> Row:
        """Race the best kernel against the reference through each compiler; 1.0 if that one fails."""
        kernel = Candidate.from_file(self.out / row.run / "best.py", kernel_language(self.target))
        over = {}
        for compiler in COMPILERS:
            try:
                with open_evaluator(task, self.target, compiler) as evaluator:
                    over[compiler] = evaluator.evaluate(kernel).speedup or 1.0
            except UserError as error:
                console.print(f"{task.name} through {compiler}: {error}", highlight=False, style="red")
                over[compiler] = 1.0
        return self._write(replace(row, over=over))


def _filled(row: Row, result: Result) -> Row:
    return replace(
        row,
        evaluations=result.evaluations,
        valid=result.valid,
        seed_correct=result.seed_correct,
        reference_ms=result.reference_ms,
        best_ms=result.best_ms,
        speedup=result.speedup,
        speedup_ci=result.speedup_ci,
        kernel_coverage=result.kernel_coverage,
        run=result.run_dir.name,
    )


def report(rows: Sequence[Row]) -> None:
    """A row per task, means per family, and the figures the project promises."""
    table = Table("task", "family", "eager", "over eager", "95 %", *COMPILERS, "coverage", "valid", "per min")
    for row in rows:
        low, high = row.speedup_ci
        table.add_row(
            row.task,
            row.family,
            "-" if row.reference_ms is None else f"{row.reference_ms:.3f} ms",
            f"{row.speedup:.2f}x",
            f"{low:.2f}-{high:.2f}",
            *(f"{row.over[c]:.2f}x" if c in row.over else "-" for c in COMPILERS),
            "-" if row.kernel_coverage is None else f"{row.kernel_coverage:.2f}",
            f"{row.valid:.2f}",
            f"{row.per_minute:.0f}",
        )
    console.print(table)

    compared = any(row.over for row in rows)
    against: dict[str, Callable[[Row], float]] = {"eager": lambda row: row.delivered("eager")}
    if compared:
        against |= {name: partial(Row.delivered, baseline=name) for name in COMPILERS}
        against["the better compiler"] = lambda row: row.compiled
    by_family = {name: [r for r in rows if r.family == name] for name in sorted({r.family for r in rows})}
    families = Table(
        "family",
        "tasks",
        *(f"over {name}" for name in against),
        title="geometric mean (median)",
        title_justify="left",
    )
    for name, members in [*by_family.items(), ("all", list(rows))]:
        gains = [[over(row) for row in members] for over in against.values()]
        families.add_row(
            name, str(len(members)), *(f"{geomean(values):.2f}x ({median(values):.2f}x)" for values in gains)
        )
    console.print(families)

    figures = Figures("suite")
    overall = geomean([row.delivered("eager") for row in rows])
    figures.add(Figure("geometric mean over eager", f"{overall:.2f}x", "≥ 2.0x", overall >= 2.0))
    if compared:
        over = geomean([row.compiled for row in rows])
        figures.add(Figure("... over the better torch.compile", f"{over:.2f}x", "≥ 1.3x", over >= 1.3))
    for name, least in PROMISED.items():
        if name in by_family:
            mean = geomean([row.delivered("eager") for row in by_family[name]])
            figures.add(Figure(f"{name} over eager", f"{mean:.2f}x", f"≥ {least}x", mean >= least))
    failed = [row.task for row in rows if not row.seed_correct]
    figures.add(Figure("tasks whose first candidate fails", " ".join(failed) or "none", "none", not failed))
    rate = 60 * sum(row.evaluations for row in rows) / sum(row.seconds for row in rows)
    figures.add(Figure("evaluations a minute", f"{rate:.0f}", "≥ 40", rate >= 40))
    figures.print()


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
