"""The evaluator for a target, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ke_gym.errors import UserError
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.tasks.task import Task

_IMPORTS_TRITON = re.compile(r"^\s*(?:import|from)\s+triton\b", re.MULTILINE)


def open_evaluator(
    task: Task,
    target: str = "cpu",
    baseline: str = "eager",
    threads: int | None = None,
    folder: Path | None = None,
    exchange: Path | None = None,
    **options: Any,
) -> Evaluator:
    """An evaluator for ``task`` on ``"cpu"``, ``"cuda"`` or one of several GPUs (``"cuda:1"``).

    With ``exchange``, a folder, on the GPU of whoever serves it. Other arguments are those of ``Evaluator``.
    Raises ``UserError`` for a target that is unknown or not there.
    """
    if exchange is not None:
        from ke_gym.evaluation.exchange import ExchangeEvaluator

        if not target.startswith("cuda"):
            raise UserError(f"--exchange is for the target cuda, not {target}")
        return ExchangeEvaluator(task, exchange, baseline, folder, **options)
    if target == "cpu":
        return Evaluator(task, target, baseline, threads, folder, **options)
    kind, _, number = target.partition(":")
    if kind == "cuda" and (number.isdecimal() or not number):
        from ke_gym.evaluation.gpu_evaluator import GpuEvaluator

        device = int(number or 0)
        return GpuEvaluator(task, target, baseline, threads, folder, device=device, **options)
    raise UserError(f"target {target!r} is unknown; there are cpu, cuda, and cuda:1 for the second GPU")


def kernel_language(target: str) -> str:
    """What kernels are generated in for a target."""
    return "cpp" if target == "cpu" else "triton"


def language_for(target: str) -> Callable[[Path], str]:
    """Which language a kernel module's file is in, on a target: for a GPU, whether it imports Triton."""

    def language(path: Path) -> str:
        if target == "cpu":
            return "cpp"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); give a Python kernel module") from error
        return "triton" if _IMPORTS_TRITON.search(text) else "cuda"

    return language
