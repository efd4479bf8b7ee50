"""The table at the end of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ke_gym.search.result import Result


def summary(results: Sequence[Result]) -> Table:
    """One row per task; a search that found nothing faster counts as 1.0 in the mean."""
    several = len(results) > 1
    table = Table(box=box.SIMPLE_HEAD, show_footer=several, pad_edge=False)
    gains = [math.log(result.speedup) if result.faster else 0.0 for result in results]
    table.add_column("task", footer="geometric mean" if several else "", no_wrap=True)
    table.add_column(r"time \[ms]", justify="right", no_wrap=True)
    table.add_column("speedup", footer=f"{math.exp(statistics.fmean(gains)):.2f}x", no_wrap=True)
    for heading in ("over", "own code", "tried", "valid", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        low, high = result.speedup_ci
        known = result.evaluation is not None
        table.add_row(
            Text(result.task.name),
            f"{result.reference_ms:.3f} → {result.best_ms:.3f}" if known else "-",
            Text(f"{result.speedup:.2f}x [{low:.2f}, {high:.2f}]" if known else "-"),
            result.baseline,
            "-" if result.kernel_coverage is None else f"{100 * result.kernel_coverage:.0f} %",
            str(result.evaluations),
            f"{100 * result.valid:.0f} %",
            f"{result.seconds:.0f}",
            style=None if result.faster else "dim",
        )
    if said := _preparations(results):
        table.caption = Text("\n".join(said), style="table.caption")
    table.caption_justify = "left"
    return table


def _preparations(results: Sequence[Result]) -> list[str]:
    """What is done once for given weights, and therefore not in the times."""
    timed = [(r.task.name, r.evaluation.preparation_ms) for r in results if r.evaluation is not None]
    return [f"{name}: weights are prepared once, {ms:.3f} ms" for name, ms in timed if ms is not None]
