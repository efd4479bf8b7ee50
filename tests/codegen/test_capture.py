"""Graphs of tasks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ke_gym.codegen import Program
from ke_gym.tasks import Task


def test_threads_capture_at_once() -> None:
    """``torch.export`` itself can't: several threads lose each other's modes."""
    names = ["softmax", "rms_norm", "layer_norm_backward", "swiglu"] * 3
    with ThreadPoolExecutor(4) as pool:
        programs = list(pool.map(lambda name: Program.from_task(Task.load(name)), names))
    for name, program in zip(names, programs):
        alone = next(p for n, p in zip(names, programs) if n == name)
        assert program.emit(program.seeds()[0]) == alone.emit(alone.seeds()[0])
