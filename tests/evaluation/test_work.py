from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from ke_gym.evaluation.work import Work, _heads_alike, count
from ke_gym.tasks.task import Task

N = 64 * 48


def counted(folder: Path, source: str) -> tuple[Work, list[Any]]:
    """The work of a task of this text, and its inputs."""
    path = folder / "some.py"
    path.write_text(source)
    task = Task.load(str(path))
    inputs = task.inputs("default", 0)
    return count(task.reference("default", 0), inputs), inputs


def forwarding(arguments: str, forward: str, inputs: str) -> str:
    """The text of a task that computes ``forward`` of ``arguments``."""
    return (
        "import torch\nclass Model(torch.nn.Module):\n"
        f"    def forward(self, {arguments}):\n        return {forward}\n"
        f"def get_inputs():\n    return [{inputs}]\n"
    )


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
    work, inputs = counted(tmp_path, forwarding("x", forward, "torch.randn(64, 48)"))
    assert work.flops == products and work.arithmetic == arithmetic
    assert work.floor_flops <= work.flops
    assert isinstance(inputs[0], torch.Tensor) and work.bytes >= inputs[0].numel() * 4 / 2


@pytest.mark.parametrize(
    ("forward", "length"),
    [
        ("torch.renorm(x, 2, 0, 1.0)", 64),
        ("torch.renorm(x, 5, 0, 1.0)", 64),  # the second argument is the norm's order
        ("x.cumsum(1)", 48),
        ("torch.softmax(x, dim=-1)", 48),
        ("torch.cumsum(x[0, 0], 0)", 1),
    ],
)
def test_a_reduction_is_as_long_as_the_dimension_called_so(forward: str, length: int, tmp_path: Path) -> None:
    work, _ = counted(tmp_path, forwarding("x", forward, "torch.randn(64, 48)"))
    assert work.reduction_length == length


ATTENTION = """
import torch
from torch.utils.flop_counter import flop_registry
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
BAND = (40 * 8 - 28) / 1600


@pytest.mark.parametrize(
    ("mask", "share", "unread"),
    [
        ("", 1, 0),
        ("scores = scores.masked_fill(at[:, None] < at, -torch.inf)", CAUSAL, 0),
        ("scores.masked_fill_(at[:, None] < at, -torch.inf)", CAUSAL, 0),
        ("scores = torch.where(at[:, None] >= at, scores, -1e9)", CAUSAL, 0),
        ("scores = scores + torch.full((40, 40), -torch.inf).triu(1)", CAUSAL, 0),
        ("scores = scores - 1e9 * torch.ones(40, 40).triu(1)", CAUSAL, 0),
        ("scores = scores * torch.ones(40, 40).tril()", None, 0),
        ("scores = scores + torch.zeros(40, 40)", 1, 0),
        ("scores = torch.relu(scores)", 1, 0),
        # Two masks hide what either does.
        (
            "scores = scores.masked_fill(at[:, None] < at, -torch.inf).masked_fill(at[:, None] - at >= 8, -1e9)",
            BAND,
            0,
        ),
        # What is needed elsewhere too, or tells what is hidden, has to be computed.
        ("scores = scores.masked_fill(at[:, None] < at, -torch.inf) + scores.mean()", 1, 0),
        ("scores = torch.where(scores > 0, scores, -1e9)", (1 + 0) / 2, 0),
        ("scores = (scores - 2e4).clamp(max=0) + scores.new_zeros(40, 40)", 1, 0),
        # Lengths that are given may hide anything: no key is sure to be read.
        ("scores = scores.masked_fill(at >= lengths[:, None, None, None], -torch.inf)", 0, 2),
    ],
)
def test_what_a_mask_hides_need_not_be_computed(
    mask: str, share: float | None, unread: int, tmp_path: Path
) -> None:
    work, _ = counted(tmp_path, ATTENTION.replace("MASK", mask))
    assert work.flops == 2 * 2 * 3 * 4 * 40 * 40 * 16
    if share is None:  # of the scores; zero is no weight's absence
        share = (CAUSAL + 1) / 2
    assert work.floor_flops == pytest.approx(share * work.flops)
    query, key = 3 * 4 * 40 * 16, 3 * 2 * 40 * 16
    kept = 2 * query + 2 * key - (query + key if unread else 0)
    assert work.bytes == pytest.approx(4 * kept + (3 * 8 if "lengths" in mask else 0))


OTHERS = {
    "torch.tril(w) @ x": 65 / 128,  # weights with a triangle of zeros
    "torch.exp(torch.tril(w)) @ x": 1,  # which are none any more
    "(w @ x).T.masked_fill(torch.ones(48, 64).triu().bool(), 0.0) + w.sum() + x.sum()": 1,
    "torch.where(torch.ones(64, 48).bool(), w @ x, w @ x * 2)": 1,
    "w.masked_fill(torch.eye(64).bool(), 0.0) @ x": 63 / 64,
    "(w.to(torch.complex64) @ x.to(torch.complex64) + 1j).real": 1,
    "torch.where((w @ x) > 0, 1.0, 0.0)": 1,
}


@pytest.mark.parametrize("forward", OTHERS)
def test_what_is_needed_is_no_more_than_what_surely_is(forward: str, tmp_path: Path) -> None:
    work, _ = counted(tmp_path, forwarding("x, w", forward, "torch.randn(64, 48), torch.randn(64, 64)"))
    assert work.flops
    assert work.floor_flops == pytest.approx(OTHERS[forward] * work.flops)


def test_attention_of_shared_heads_counts_as_that_of_all() -> None:
    func = torch.ops.aten._scaled_dot_product_flash_attention.default
    queries, shared = (torch.empty(2, heads, 16, 32, device="meta") for heads in (8, 2))
    given = _heads_alike(func, (queries, shared, shared, 0.0, True))
    assert [tuple(t.shape) for t in given[:3]] == [(2, 8, 16, 32)] * 3 and given[3:] == (0.0, True)
    assert flop_registry[func._overloadpacket](*given, out_val=None) == 2 * 2 * (2 * 8) * 16 * 32 * 16
    assert _heads_alike(torch.ops.aten.mm.default, (queries,)) == (queries,)
