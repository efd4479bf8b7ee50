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


ATTENTION = """
import torch
class Model(torch.nn.Module):
    def forward(self, query, key, value, lengths):
        scores = query @ key.repeat_interleave(2, dim=1).transpose(-2, -1) * 0.3
        at = torch.arange(40)
        MASK
        return torch.softmax(scores, -1) @ value.repeat_interleave(2, dim=1)
def get_inputs():
    query = torch.randn(3, 4, 40, 16)
    key, value = torch.randn(2, 3, 2, 40, 16)
    return [query, key, value, torch.tensor([10, 20, 40])]
"""
CAUSAL = 41 / 80
SHORT = 70 / 120


@pytest.mark.parametrize(
    ("mask", "share", "read"),
    [
        ("", 1, 0),
        ("scores = scores.masked_fill(at[:, None] < at, -torch.inf)", CAUSAL, 0),
        ("scores = torch.where(at[:, None] >= at, scores, -1e9)", CAUSAL, 0),
        ("scores = scores + torch.full((40, 40), -torch.inf).triu(1)", CAUSAL, 0),
        ("scores = scores + torch.zeros(40, 40)", 1, 0),
        ("scores = torch.relu(scores)", 1, 0),
        # Of keys that none may see nothing has to be read.
        ("scores = scores.masked_fill(at >= lengths[:, None, None, None], -torch.inf)", SHORT, 1 - SHORT),
    ],
)
def test_what_a_mask_hides_need_not_be_computed(mask: str, share: float, read: float, tmp_path: Path) -> None:
    path = tmp_path / "attention.py"
    path.write_text(ATTENTION.replace("MASK", mask))
    task = Task.load(str(path))
    work = count(task.reference("default", 0), task.inputs("default", 0))
    assert work.flops == 2 * 2 * 3 * 4 * 40 * 40 * 16
    assert work.floor_flops == pytest.approx(share * work.flops)
    kept = 4 * (2 * 3 * 4 * 40 * 16 + (2 - read) * 3 * 2 * 40 * 16) + (3 * 8 if "lengths" in mask else 0)
    assert work.bytes == pytest.approx(kept)


def test_weights_with_a_triangle_of_zeros_are_half_the_work(tmp_path: Path) -> None:
    path = tmp_path / "triangle.py"
    path.write_text(
        "import torch\nclass Model(torch.nn.Module):\n    def forward(self, x, w):\n        return torch.tril(w) @ x\n"
        "def get_inputs():\n    return [torch.randn(64, 48), torch.randn(64, 64)]\n"
    )
    task = Task.load(str(path))
    work = count(task.reference("default", 0), task.inputs("default", 0))
    assert work.floor_flops == pytest.approx(65 / 128 * work.flops)
