"""The table at the end of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rich.table import Table

from ke_gym.search.result import Result


def summary(results: Sequence[Result]) -> Table:
    """One row per task; a search that found nothing faster counts as 1.0 in the mean."""
    table = Table(title=None, show_footer=len(results) > 1)
    geomean = math.exp(statistics.fmean(math.log(max(r.speedup if r.faster else 1.0, 1.0)) for r in results))
    table.add_column("task", footer="geometric mean")
    table.add_column("time [ms]", justify="right")
    table.add_column("speedup", justify="right", footer=f"{geomean:.2f}x")
    table.add_column("95 % interval", justify="right")
    table.add_column("against")
    table.add_column("own kernels", justify="right")
    table.add_column("evaluations", justify="right")
    table.add_column("valid", justify="right")
    table.add_column("seconds", justify="right")
    for result in results:
        low, high = result.speedup_ci
        known = result.evaluation is not None
        table.add_row(
            result.task.name,
            f"{result.reference_ms:.3f} -> {result.best_ms:.3f}" if known else "-",
            f"{result.speedup:.2f}x" if known else "-",
            f"{low:.2f} - {high:.2f}" if known else "-",
            result.baseline,
            f"{100 * (result.kernel_coverage or 0.0):.0f} %" if known else "-",
            str(result.evaluations),
            f"{100 * result.valid:.0f} %",
            f"{result.seconds:.0f}",
            style=None if result.faster else "dim",
        )
    return table
