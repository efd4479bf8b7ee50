from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ke_gym.candidate import Candidate
from ke_gym.report.table import summary
from ke_gym.search.result import Result
from ke_gym.tasks import resolve
from tests.search.fakes import evaluation


@pytest.mark.parametrize(("ms", "said"), [(0.25, True), (None, False)])
def test_what_is_prepared_once_is_told_under_the_table(ms: float | None, said: bool, tmp_path: Path) -> None:
    best = Candidate("best")
    found = evaluation(best, 2.0).replace(preparation_ms=ms)
    (task,) = resolve("softmax")
    result = Result(task, "cpu", "eager", best, found, None, 1, 1.0, 1.0, True, "budget", 0.1, tmp_path)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(summary([result]))
    assert ("softmax: weights are prepared once, 0.250 ms" in shown.get()) == said
    assert "2.00x" in shown.get()


def test_names_and_numbers_are_no_markup(tmp_path: Path) -> None:
    best, nan = Candidate("best"), float("nan")
    found = evaluation(best, 2.0).replace(preparation_ms=0.25, speedup_ci=(nan, nan))
    task = replace(resolve("softmax")[0], name="y[i] [/x] :x:")
    result = Result(task, "cpu", "eager", best, found, None, 1, 1.0, 1.0, True, "budget", 0.1, tmp_path)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(summary([result]))
    assert shown.get().count("y[i] [/x] :x:") == 2 and "2.00x [nan, nan]" in shown.get()
