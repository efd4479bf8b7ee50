"""The evaluator for a target, by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ke_gym.errors import UserError
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.tasks.task import Task

GENERATED = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
"""What kernels can be generated in, by kind of target, the default first."""
UNKNOWN = "target {target!r} is unknown; there are cpu, cuda, and cuda:1 for the second GPU"
_IMPORTS_TRITON = re.compile(r"^\s*(?:import\s.*|from\s+)\btriton\b", re.MULTILINE)
"""For files that do not parse: the compiler will say so of them."""


def open_evaluator(
    task: Task,
    target: str = "cpu",
    baseline: str = "eager",
    threads: int | None = None,
    folder: Path | None = None,
    exchange: Path | None = None,
    **options: Any,
) -> Evaluator:
    """An evaluator for ``task`` on ``"cpu"``, all GPUs of one kind (``"cuda"``) or one of them (``"cuda:1"``).

    With ``exchange``, a folder, on the GPU of whoever serves it. Other arguments are those of ``Evaluator``.
    Raises ``UserError`` for a target that is unknown or not there.
    """
    if exchange is not None:
        from ke_gym.evaluation.exchange import ExchangeEvaluator

        if target != "cuda":
            raise UserError(f"--exchange is for the target cuda, not {target}; who serves it chooses the GPU")
        return ExchangeEvaluator(task, exchange, baseline, folder, **options)
    if target == "cpu":
        return Evaluator(task, target, baseline, threads, folder, **options)
    kind, _, number = target.partition(":")
    if kind == "cuda" and (number.isdecimal() or not number):
        from ke_gym.evaluation.gpu_evaluator import GpuEvaluator
        from ke_gym.evaluation.gpu_fleet import open_gpus

        if not number:
            return open_gpus(task, target, baseline, threads=threads, folder=folder, **options)
        return GpuEvaluator(task, target, baseline, threads, folder, device=int(number), **options)
    raise UserError(UNKNOWN.format(target=target))


def kernel_language(target: str, language: str = "") -> str:
    """What kernels are generated in for a target: ``language``, or by default the first that it has.

    Raises ``UserError`` for an unknown target, and for a language that does not fit it.
    """
    fitting = GENERATED.get(target.partition(":")[0])
    if fitting is None:
        raise UserError(UNKNOWN.format(target=target))
    if language and language not in fitting:
        raise UserError(
            f"--language {language} is not for the target {target}, whose kernels are generated in"
            f" {' or '.join(fitting)}"
        )
    return language or fitting[0]


def language_for(target: str) -> Callable[[Path], str]:
    """Which language a kernel module's file is in, on a target: for a GPU, whether it imports Triton."""

    def language(path: Path) -> str:
        if target == "cpu":
            return "cpp"
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); give a Python kernel module") from error
        return "triton" if _imports_triton(text) else "cuda"

    return language


def _imports_triton(text: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return _IMPORTS_TRITON.search(text) is not None
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return any(name.partition(".")[0] == "triton" for name in names)
