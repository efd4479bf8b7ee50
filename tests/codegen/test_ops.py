"""Every family of operations that is promised as generated loops: correct, and without a library call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ke_gym.codegen import Program
from ke_gym.codegen.decompositions import decompositions
from ke_gym.codegen.graph import Extern
from ke_gym.codegen.lower import RULES
from ke_gym.tasks import Task
from tests.codegen.test_program import wrong

Inputs = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Family:
    """What one module computes, and on what."""

    compute: Callable[..., Any]
    inputs: Inputs


class Module(nn.Module):
    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *inputs: Tensor) -> Any:
        return self.compute(*inputs)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Inputs:
    return lambda: [torch.randn(*shape).to(dtype)]


def positive(*shape: int) -> Inputs:
    return lambda: [torch.rand(*shape) + 0.5]


def pair(*shape: int) -> Inputs:
    return lambda: [torch.randn(*shape), torch.randn(*shape)]


def integers(*shape: int) -> Inputs:
    return lambda: [torch.randint(-9, 10, shape), torch.randint(1, 6, shape)]


def with_index(shape: tuple[int, ...], index: tuple[int, ...], limit: int) -> Inputs:
    return lambda: [torch.randn(*shape), torch.randint(0, limit, index)]


def arithmetic(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (
        x + 2 * y - 3, x / (y.abs() + 1), torch.maximum(x, y), torch.fmod(x, 1.5), torch.remainder(x, 0.7), x.neg(),
        torch.floor_divide(x, 0.3), x.abs().pow(1.7), torch.atan2(x, y), torch.hypot(x, y), x.sign(), x.clamp(-1, 1),
    )  # fmt: skip


def transcendental(x: Tensor) -> tuple[Tensor, ...]:
    return (
        x.exp(), x.log(), x.log2(), x.log10(), x.log1p(), x.expm1(), x.sqrt(), x.rsqrt(), x.sin(), x.cos(), x.tan(),
        x.tanh(), x.sinh(), x.cosh(), x.erf(), (x / 2).asin(), (x / 2).acos(), x.atan(), x.asinh(), (x + 1).acosh(),
        (x / 2).atanh(), x.reciprocal(), x.sigmoid(),
    )  # fmt: skip


def rounding_and_tests(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (
        x.floor(), x.ceil(), x.round(), x.trunc(), x.isnan(), x.isinf(), x.gt(y), x.le(y), x.eq(y), x.ne(y),
        torch.where(x > y, x, 2 * y), x.masked_fill(y > 0, 7.0), (x > 0) & ~(y > 0) | (x > 1), (x > 0) ^ (y > 0),
    )  # fmt: skip


def activations(x: Tensor) -> tuple[Tensor, ...]:
    return (
        F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.elu(x), F.selu(x), F.softplus(x), F.mish(x),
        F.leaky_relu(x), F.hardswish(x), F.hardsigmoid(x), F.hardtanh(x), F.celu(x), F.softsign(x), F.logsigmoid(x),
        F.threshold(x, 0.1, -2.0),
    )  # fmt: skip


def integer_arithmetic(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (
        x + y, x * y, torch.div(x, y, rounding_mode="floor"), torch.div(x, y, rounding_mode="trunc"), x % y, x & y,
        x | y, x ^ y, ~x, x << 2, x >> 1, x.abs(), x.float() / y,
    )  # fmt: skip


def casts(x: Tensor) -> tuple[Tensor, ...]:
    small = x.clamp(-100, 100)
    return (
        x.to(torch.bfloat16), x.half(), x.double(), small.to(torch.int8), small.int(), small.long(), x.bool(),
        small.abs().to(torch.uint8), x.half().float() * 2, (x.double() * 3).float(),
    )  # fmt: skip


def views(x: Tensor) -> tuple[Tensor, ...]:
    return (
        x.transpose(0, 2) + 1, x.reshape(6, -1) * 2, x[:, 1:4, ::2] - 1, x.unsqueeze(1).expand(-1, 3, -1, -1) * 2,
        x.flip(2) + x, x[..., None] * x[..., None, :], torch.diagonal(x, dim1=0, dim2=1) + 1, x.unfold(2, 3, 2) * 1.5,
        torch.roll(x, 2, 1) - x, x.repeat(1, 2, 1) + 1,
    )  # fmt: skip


def reductions(x: Tensor) -> tuple[Tensor, ...]:
    return (
        x.sum(), x.sum((0, 2)), x.mean(1), x.mean((1, 2), keepdim=True), x.var(2), x.std((0, 1)), x.amax((0, 2)),
        x.amin(1), x.prod(2), (x > 1).any(1), (x > -4).all(0), x.norm(dim=2), torch.logsumexp(x, 1), x.argmax(2),
        x.argmin(0), x.argmax(), x.max(1).values, x.min(2).indices,
    )  # fmt: skip


def half_precision(x: Tensor) -> tuple[Tensor, ...]:
    return torch.softmax(x, -1), x.sum(-1), F.layer_norm(x, x.shape[-1:]), F.gelu(x) * x


def biased_in_half(x: Tensor, w: Tensor, b: Tensor, image: Tensor, filters: Tensor) -> tuple[Tensor, ...]:
    return (
        F.gelu(F.linear(x, w, b)), F.linear(x[0] * 2, w, b), torch.addmm(x[0, :, :1], x[1], w.mT), F.linear(x, w),
        F.conv2d(image, filters, b, padding=1).relu(), F.conv2d(image, filters, stride=2),
    )  # fmt: skip


def biased_inputs(dtype: torch.dtype) -> Inputs:
    shapes = ((2, 20, 37), (29, 37), (29,), (2, 5, 9, 8), (29, 5, 3, 3))
    return lambda: [torch.randn(*shape).to(dtype) for shape in shapes]


def softmaxes(x: Tensor) -> tuple[Tensor, ...]:
    return torch.softmax(x, 2), torch.softmax(x, 0), torch.log_softmax(x, 1), F.softmin(x, -1)


def norms(x: Tensor) -> tuple[Tensor, ...]:
    return (
        F.layer_norm(x, x.shape[-2:]), F.group_norm(x, 2), F.instance_norm(x), F.rms_norm(x, x.shape[-1:]),
        F.batch_norm(x, None, None, training=True), F.normalize(x, dim=1), F.local_response_norm(x, 3),
    )  # fmt: skip


def gathers(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    return torch.gather(x, 1, index), x[index[:, 0]], x.index_select(0, index[0]), F.embedding(index, x)


def scatters(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    return (
        torch.zeros_like(x).scatter_add(1, index, x), x.scatter_add(0, index, 2 * x), x.index_add(0, index[:, 0], x),
    )  # fmt: skip


def bags(table: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    return F.embedding_bag(index, table, mode="sum"), F.embedding_bag(index, table, mode="mean")


def masks(x: Tensor) -> tuple[Tensor, ...]:
    causal = torch.ones(x.shape[-2:], dtype=torch.bool).tril()
    return (
        x.tril(-1),
        x.triu(),
        x.masked_fill(~causal, float("-inf")).softmax(-1),
        torch.where(causal, x, 0.0),
    )


def pads_and_joins(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (
        F.pad(x, (1, 2, 0, 3)), F.pad(x, (2, 1), value=7.0), F.pad(x, (1, 1, 2, 2), mode="reflect"),
        F.pad(x, (2, 2, 1, 1), mode="replicate"), torch.cat([x, y], 2), torch.cat([x, y, x], 1), torch.stack([x, y], 0),
    )  # fmt: skip


def pools(x: Tensor) -> tuple[Tensor, ...]:
    return (
        F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 2, dilation=2), F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 1, 1),
        F.adaptive_avg_pool2d(x, (3, 4)), F.adaptive_avg_pool2d(x, 1), F.max_pool1d(x[:, :, 0], 3), F.avg_pool1d(x[0], 2),
        F.max_pool3d(x, 2), F.avg_pool3d(x, 2), F.interpolate(x, scale_factor=2), F.lp_pool2d(x, 2, 2),
    )  # fmt: skip


FAMILIES = {
    "arithmetic": Family(arithmetic, pair(17, 33)),
    "transcendental": Family(transcendental, positive(13, 37)),
    "rounding_and_tests": Family(rounding_and_tests, pair(19, 21)),
    "activations": Family(activations, normal(23, 29)),
    "integers": Family(integer_arithmetic, integers(15, 31)),
    "casts": Family(casts, lambda: [torch.randn(11, 45) * 20]),
    "f64": Family(lambda x: (torch.softmax(x, 1), x.exp() * x.sum()), normal(9, 70, dtype=torch.float64)),
    "bf16": Family(half_precision, normal(9, 64, dtype=torch.bfloat16)),
    "f16": Family(half_precision, normal(9, 64, dtype=torch.float16)),
    "bf16_bias": Family(biased_in_half, biased_inputs(torch.bfloat16)),
    "f16_bias": Family(biased_in_half, biased_inputs(torch.float16)),
    "broadcasting": Family(
        lambda a, b, c: a * b + c, lambda: [torch.randn(5, 1, 7), torch.randn(6, 1), torch.randn(7)]
    ),
    "views": Family(views, normal(4, 6, 9)),
    "reductions": Family(reductions, normal(5, 11, 23)),
    "softmax": Family(softmaxes, normal(4, 9, 33)),
    "norms": Family(norms, normal(3, 4, 6, 8)),
    "scans": Family(
        lambda x: (x.cumsum(1), x.cumsum(0), (1 + 0.1 * x).cumprod(1), x.flip(1).cumsum(1)), normal(7, 40)
    ),
    "gathers": Family(gathers, with_index((7, 12), (7, 7), 7)),
    "scatters": Family(scatters, with_index((9, 12), (9, 12), 9)),
    "embedding_bag": Family(bags, with_index((20, 16), (6, 5), 20)),
    "masks": Family(masks, normal(3, 14, 14)),
    "pads_and_joins": Family(pads_and_joins, pair(2, 6, 7)),
    "pools": Family(pools, normal(2, 3, 12, 16)),
    "integer_pools": Family(
        lambda x: (F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 7, 3, 3)),
        lambda: [-torch.randint(2**40, 2**50, (2, 3, 9, 9))],
    ),
    "matmul": Family(
        lambda a, b: (F.gelu(a @ b + 1), (a * 2) @ b, (a @ b).amax(1), a.T @ b.T),
        pair(30, 30),
    ),
    "bmm": Family(lambda a, b: (torch.bmm(a, b), a @ b.mT.mT + a), pair(3, 18, 18)),
    "attention": Family(
        lambda q, k, v: (torch.softmax(q @ k.mT * 0.3, -1) @ v, torch.softmax((q @ k.mT).tril() + 1, -1) @ v * 2),
        lambda: [torch.randn(2, 3, 16, 8) for _ in range(3)],
    ),
    "conv1d": Family(
        lambda x, w: (F.conv1d(x, w, stride=2), F.conv1d(x, w, padding=2, dilation=2).relu()),
        lambda: [torch.randn(2, 4, 40), torch.randn(6, 4, 3)],
    ),
    "conv2d": Family(
        lambda x, w, d, p: F.conv2d(F.conv2d(F.conv2d(x, w, padding=1), d, groups=8, stride=2), p) * 2,
        lambda: [torch.randn(2, 4, 13, 15), torch.randn(8, 4, 3, 3), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)],
    ),
    "conv3d": Family(
        lambda x, w: (F.conv3d(x, w, padding=1).relu(), F.conv3d(x, w, stride=(1, 2, 1))),
        lambda: [torch.randn(1, 3, 6, 8, 7), torch.randn(4, 3, 3, 3, 3)],
    ),
}  # fmt: skip


def program_of(family: Family) -> tuple[Task, Program]:
    torch.manual_seed(0)
    task = Task.from_module(Module(family.compute), family.inputs())
    return replace(task, shapes={"cpu": {}}), Program.from_task(task)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_generated_as_loops(name: str) -> None:
    task, program = program_of(FAMILIES[name])
    schedule = program.seeds()[0]
    covered = {node for plan in schedule.plans for group in plan.groups for node in group.nodes}
    steps = program.graphs[0].steps
    assert [s.target for n, s in steps.items() if isinstance(s, Extern) and n not in covered] == []
    source = program.emit(replace(schedule, flags=("-O0",)))  # what is computed, quickly
    assert "torch.ops." not in source
    assert not wrong(task, source), source


def test_every_pointwise_operation_of_core_aten_has_a_rule() -> None:
    table = decompositions("triton")
    missing = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            operation = getattr(packet, overload)
            wanted = {torch.Tag.core, torch.Tag.pointwise} <= set(operation.tags) and overload != "out"
            if wanted and f"aten.{name}.{overload}" not in RULES and operation not in table:
                missing.append(f"{name}.{overload}")
    assert missing == []
