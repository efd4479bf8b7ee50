"""Graphs of tasks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ke_gym.codegen import CodegenError, Program
from ke_gym.codegen.capture import capture
from ke_gym.tasks import Task


def test_threads_capture_at_once() -> None:
    """``torch.export`` itself can't: several threads lose each other's modes."""
    names = ["softmax", "rms_norm", "layer_norm_backward", "swiglu"] * 3
    with ThreadPoolExecutor(4) as pool:
        programs = list(pool.map(lambda name: Program.from_task(Task.load(name)), names))
    for name, program in zip(names, programs):
        alone = next(p for n, p in zip(names, programs) if n == name)
        assert program.emit(program.seeds()[0]) == alone.emit(alone.seeds()[0])


def test_large_tensors_are_not_filled_to_be_captured(tmp_path: Path) -> None:
    path = tmp_path / "table.py"
    path.write_text(
        """
import torch
import torch.nn as nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1 << 27, 8)
    def forward(self, ids, x):
        return self.table(ids) + x
def get_inputs():
    return [torch.randint(0, 1 << 27, (5,)), torch.randn(5, 8)]
"""
    )
    process = psutil.Process()
    before = process.memory_info().rss
    captured = capture(Task.from_file(path), "default")  # a table of 4 GiB
    assert process.memory_info().rss - before < 1 << 30
    (table,) = (node for node in captured.graph.nodes if node.name == "p_table_weight")
    assert table.meta["val"].shape == (1 << 27, 8)


def test_inputs_that_depend_on_what_was_drawn_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "drawn.py"
    path.write_text(
        """
import torch
import torch.nn as nn
class Model(nn.Module):
    def forward(self, x, twice):
        return x * 2
def get_inputs():
    lengths = torch.randint(3, 9, (4,))
    return [torch.randn(4, int(lengths.max())), 2]
"""
    )
    captured = capture(Task.from_file(path), "default")
    assert captured.names[1] is None


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_tensors_without_elements_are_refused(target: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text(
        """
import torch
import torch.nn as nn
class Model(nn.Module):
    def forward(self, x):
        return torch.relu(x).sum(-1)
def get_inputs():
    return [torch.randn(0, 8)]
"""
    )
    with pytest.raises(CodegenError, match="without elements"):
        Program.from_task(Task.from_file(path), target)
