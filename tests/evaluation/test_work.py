from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ke_gym.evaluation.work import count
from ke_gym.tasks.task import Task

N = 64 * 48


@pytest.mark.parametrize(
    ("forward", "products", "arithmetic"),
    [
        ("x.clone()", 0, 0),
        ("x.t().contiguous()", 0, 0),
        ("x[:, ::2].flip(0)", 0, 0),
        ("torch.relu(x)", 0, N),
        ("torch.nn.functional.gelu(x) * 2", 0, 2 * N),
        ("x.sum(1)", 0, N),
        ("x.amax(0)", 0, N),
        ("torch.softmax(x, 1)", 0, N),
        ("torch.nn.functional.layer_norm(x, (48,))", 0, N),
        ("x.cumsum(1)", 0, N),
        ("x @ x.t()", 2 * 64 * N, 2 * 64 * N),
        ("torch.relu(x @ x.t())", 2 * 64 * N, 2 * 64 * N + 64 * 64),
    ],
)
def test_what_is_computed_is_counted_once_per_element(
    forward: str, products: float, arithmetic: float, tmp_path: Path
) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        "import torch\nclass Model(torch.nn.Module):\n"
        f"    def forward(self, x):\n        return {forward}\n"
        "def get_inputs():\n    return [torch.randn(64, 48)]\n"
    )
    task = Task.load(str(path))
    inputs = task.inputs("default", 0)
    work = count(task.reference("default", 0), inputs)
    assert work.flops == products and work.arithmetic == arithmetic
    assert work.floor_flops <= work.flops
    assert isinstance(inputs[0], torch.Tensor) and work.bytes >= inputs[0].numel() * 4 / 2
