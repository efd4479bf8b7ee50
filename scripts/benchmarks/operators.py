"""The operators that KernelEvolve reports, at its shapes where it tells them: how fast do they become here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from benchmarks.figures import Figure, Figures, console
from benchmarks.suite import Row, Suite
from ke_gym import tasks
from ke_gym.errors import UserError
from ke_gym.targets.cuda import SLACK
from ke_gym.tasks.task import Task

FOLDER = Path(__file__).parent / "operator_tasks"


@dataclass(frozen=True)
class Operator:
    """One operator: a task file (or a task of the suite), the sizes it is to have, what the paper says of its kernel.

    ``sizes`` overrides globals of the file in every shape set.
    """

    task: str
    reported: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    def load(self, name: str) -> Task:
        path = FOLDER / f"{self.task}.py"
        (task,) = tasks.resolve(path if path.exists() else self.task)
        shapes: dict[str, dict[str, Any]] = {
            key: {**values, **self.sizes} for key, values in task.shapes.items() if key in ("cpu", "gpu")
        }
        return replace(task, name=name, shapes=shapes)


# "over" is over torch.compile on an H100, if nothing else is said. What the paper leaves open (batch and width of FM
# and PFFN, all of RMSNorm's, MapId's, MBDT's and the truncation's sizes) is ours, and in the task files.
OPERATORS = {
    "conv1d": Operator("conv1d", "149 us, 2.30x eager, 1.62x channels-last conv2d"),
    "rms_norm_2d_backward": Operator("rms_norm_2d_backward", "17x eager (MTIA)"),
    **{
        f"fm_{n}": Operator("fm_interaction", over, {"FEATURES": n})
        for n, over in {24: "3.6-3.9x over", 40: "2.1-3.0x over", 48: "2.1-3.0x over"}.items()
    },
    **{
        f"pooled_ffn_{b}": Operator("pooled_ffn", over, {"BATCH": b})
        for b, over in {128: "2.0-2.6x over", 256: "2.0-2.6x over", 512: "-", 1024: "1.2-1.4x over"}.items()
    },
    "map_id": Operator("map_id", "0.78-4.07x over (MTIA)"),
    "mbdt": Operator("bucketize", "2.31-9.25x over (MTIA)"),
    "batch_event_truncate": Operator("batch_event_truncate", "1.4-14.5x over (MTIA)"),
    "attention_llama": Operator("attention_llama", "4.6x over"),
}
CONV1D_US = 100.0


@dataclass
class Operators:
    """Optimize the operators of the KernelEvolve paper; resumable. On GPUs side by side, as the suite is."""

    operators: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which of them: all by default."""
    target: str = "cuda"
    """cuda (all GPUs that are here), cuda:1 for the second GPU alone, or cpu, at smaller sizes."""
    language: str = ""
    """What kernels for a GPU are generated in: triton (the default) or cuda."""
    budget: int = 60
    """Evaluations per operator."""
    seconds: float | None = None
    """For the target cuda: the whole benchmark ends by then, and goes on when it is run again."""
    lanes: int = 4
    """For the target cuda: operators per GPU at a time."""
    seed: int = 0
    """Of every search."""
    compilers: bool = True
    """Race the best kernels against torch.compile too."""
    out: Path = Path("runs/operators")
    """Runs, and suite.jsonl with a line per finished operator: what is there is not done again."""

    def run(self) -> None:
        for name in self.operators:
            if name not in OPERATORS:
                raise UserError(f"there is no operator {name!r}; choose of {', '.join(OPERATORS)}")
        chosen = [OPERATORS[name].load(name) for name in self.operators or OPERATORS]
        suite = Suite(
            (), self.target, self.language, self.budget, self.seconds, self.lanes, seed=self.seed,
            compilers=self.compilers, out=self.out,
        )  # fmt: skip
        rows, _ = suite.rows(chosen)
        report(rows)


def report(rows: Sequence[Row]) -> None:
    """Times in microseconds; the share is that of the floor, what bytes and FLOPs take at the measured peaks."""
    compilers = list(dict.fromkeys(name for row in rows for name in row.over))
    table = Table(
        "operator", "eager us", "best us", "over eager", *(f"over {name}" for name in compilers), "floor us",
        "share", "the paper",
    )  # fmt: skip
    for row in rows:
        floor = (row.floor_ms or 0.0) / SLACK
        table.add_row(
            row.task,
            _microseconds(row.reference_ms),
            _microseconds(row.best_ms),
            f"{row.speedup:.2f}x",
            *(f"{row.over[name]:.2f}x" if name in row.over else "-" for name in compilers),
            _microseconds(floor or None),
            f"{100 * floor / row.best_ms:.0f} %" if row.best_ms else "-",
            OPERATORS[row.task].reported,
        )
    console.print(table)
    figures = Figures("operators")
    failed = [row.task for row in rows if row.best_ms is None]
    figures.add(Figure("operators without a correct kernel", " ".join(failed) or "none", "none", not failed))
    for row in rows:
        if row.task == "conv1d" and row.best_ms is not None and row.target != "cpu":
            taken = 1e3 * row.best_ms
            figures.add(Figure("conv1d", f"{taken:.0f} us", f"≤ {CONV1D_US:.0f} us", taken <= CONV1D_US))
    figures.print()


def _microseconds(ms: float | None) -> str:
    return "-" if ms is None else f"{1e3 * ms:.1f}"
