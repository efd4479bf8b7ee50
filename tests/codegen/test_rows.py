"""Reductions, softmax, normalisation, scans and pointwise chains, on the values and sizes that break them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ke_gym.codegen import Program
from ke_gym.codegen.expr import Index, Quotient, Remainder, Var, bounds, constant, of
from ke_gym.languages.base import Signature, build
from ke_gym.targets.executor import PlanRunner
from ke_gym.tasks.task import Task

INF, NAN = float("inf"), float("nan")
EDGES = [0.0, -0.0, INF, -INF, NAN, 1e-45, 3e38, -3e38, 88.7, 88.8, -87.5, -104.5, 5.7, -5.8, 20.0, -0.93]


class Applied(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def source_of(function: Callable[..., Tensor], *inputs: Tensor) -> str:
    program = Program.from_task(Task.from_module(Applied(function), inputs))
    return program.emit(program.seeds()[0])


def generated(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)`` as computed by the first kernel generated for it."""
    task = Task.from_module(Applied(function), inputs)
    program = Program.from_task(task)
    artifact = build(program.emit(program.seeds()[0]), Signature.of(task))
    shapes = task.contract()
    (output,) = PlanRunner(artifact, shapes, list(inputs), task.reference(shapes).state).run()
    return output


def same(function: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """The reference is computed in double: torch's own float kernels lose some infinities (gelu)."""
    exact = function(*(x.double() if x.is_floating_point() else x for x in inputs))
    got = generated(function, *inputs)
    torch.testing.assert_close(got, exact.to(got.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def hard_rows(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows with each edge at the start, in the last vector and at the very end; one row of minus infinity."""
    edges = [v for v in EDGES if not INF > abs(v) > 3e4]
    x = torch.randn(3 * len(edges) + 2, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    for k, value in enumerate(edges):
        for place, column in enumerate((0, columns - 3, columns - 1)):
            x[3 * k + place, column] = value
    x[-1] = -INF
    return x


@pytest.mark.parametrize("columns", [5, 211])
def test_extremes_and_softmax_propagate_what_is_not_finite(columns: int) -> None:
    x = hard_rows(columns)
    banned = torch.rand(columns, generator=torch.Generator().manual_seed(1)) < 0.2
    same(lambda x: torch.cat([x.amax(-1), x.amin(-1), x.max(-1).values, x.sum(-1)]), x)
    same(lambda x: torch.softmax(x, -1), x)
    same(lambda x, banned: torch.log_softmax((x / 1.3).masked_fill(banned, -1e4), -1), x, banned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    x = hard_rows(131, dtype)
    same(lambda x: F.gelu(x * 0.7 + 0.3), x, tolerance=torch.finfo(dtype).eps)
    same(lambda x: torch.softmax(x, -1), x, tolerance=torch.finfo(dtype).eps)


def test_activations_at_their_edges() -> None:
    x = torch.tensor(EDGES * 3 + [0.5, -0.5, 3.0])
    for function in (F.gelu, F.silu, torch.tanh, torch.erf, torch.exp, torch.expm1):
        same(lambda x, f=function: f(x), x)
        assert torch.equal(
            torch.signbit(generated(lambda x, f=function: f(x), x)[:2]), torch.signbit(function(x)[:2])
        )


@pytest.mark.parametrize("columns", [1, 7, 8, 203])
def test_running_sums(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x, alive = torch.randn(9, columns, generator=generator), torch.rand(9, columns, generator=generator) < 0.8
    x[1, columns // 2], x[2, columns // 3], x[3, 0], x[3, -1] = NAN, INF, INF, -INF
    x[4] = 3e38  # the sum leaves the range of float only where it does in double
    x[4, ::2] *= -1
    same(lambda x: torch.cumsum(x, 1), x)
    same(lambda x: torch.cumsum(x * 0.5, 0), x)
    same(
        lambda x, alive: torch.flip(torch.cumsum(torch.flip(torch.where(alive, x, 0.0), [1]), 1), [1]),
        x,
        alive,
    )


def test_running_sums_are_as_accurate_as_those_of_torch() -> None:
    x = torch.rand(2, 100_003, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(generated(lambda x: torch.cumsum(x, 1), x), torch.cumsum(x.double(), 1).float(),
                               rtol=2e-7, atol=0)  # fmt: skip


def test_norms_of_odd_sizes() -> None:
    x = 3 + torch.randn(3, 7, 19, 17, generator=torch.Generator().manual_seed(3))
    same(lambda x: F.instance_norm(x), x, tolerance=1e-4)
    same(lambda x: F.group_norm(x, 7), x, tolerance=1e-4)
    same(lambda x: F.layer_norm(x, (17,)), x, tolerance=1e-4)
    assert "/" not in source_of(lambda x: F.instance_norm(x), x).split("extern")[1].replace("1.0f / ", "")


def test_a_mean_over_rows_does_not_make_the_rows_serial() -> None:
    x, labels = torch.randn(64, 2000), torch.arange(64)
    source = source_of(F.cross_entropy, x, labels)
    first = source.split('extern "C"')[1]
    assert "#pragma omp for" in first and "exp(" in first
    same(F.cross_entropy, x, labels)


@pytest.mark.parametrize("shape", [(130, 1601), (1100, 200), (3, 65_537)])
def test_large_tensors_are_fetched_ahead(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    functions = (
        lambda x: torch.softmax(x, -1),
        lambda x: F.silu(x),
        lambda x: x.sum(-1),
        lambda x: x.t() * 2.0,
    )
    for function in functions:
        same(function, x, tolerance=1e-4)
    assert all("ke::prefetch(" in source_of(f, x) for f in functions[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_leave_past_the_caches(dtype: torch.dtype) -> None:
    x = torch.randn(2100, 2003, generator=torch.Generator().manual_seed(5)).to(dtype)  # rows of any alignment
    for function in (lambda x: torch.softmax(x, -1), lambda x: F.relu(x[:, 1:])):
        same(function, x, tolerance=torch.finfo(dtype).eps)
        assert "ke::stream_out(" in source_of(function, x)


def test_division_by_a_constant_stays_a_division_where_rounding_decides() -> None:
    x = torch.arange(0.0, 41 * 64).reshape(64, 41)
    assert "/ 41.0f" in source_of(lambda x: torch.floor(x / 41), x).replace("(1.0f / 41.0f)", "")
    assert "* (1.0f / 41.0f)" in source_of(lambda x: torch.exp(x / 41), x)
    assert torch.equal(generated(lambda x: torch.floor(x / 41), x), torch.floor(x / 41))


def value(index: Index, at: dict[Var, int]) -> int:
    total = index.const
    for atom, coefficient in index.terms:
        if isinstance(atom, Var):
            inner = at[atom]
        else:
            assert isinstance(atom, Quotient)
            whole = value(atom.index, at)
            inner = whole % atom.divisor if isinstance(atom, Remainder) else whole // atom.divisor
        total += inner * coefficient
    return total


@given(st.lists(st.integers(2, 6), min_size=2, max_size=4), st.data())
def test_digits_of_an_index_are_found(sizes: list[int], data: st.DataObject) -> None:
    variables = [Var(f"x{k}", size) for k, size in enumerate(sizes)]
    index, step, steps = constant(0), 1, [1]
    for var in reversed(variables):
        index = index + of(var) * step
        step *= var.size
        steps.append(step)
    divisor = data.draw(st.sampled_from(steps))
    at = {v: data.draw(st.integers(0, v.size - 1)) for v in variables}
    whole = value(index, at)
    assert value(index // divisor, at) == whole // divisor
    assert value(index % divisor, at) == whole % divisor
    other = data.draw(st.integers(2, 40))
    assert value(index // other, at) == whole // other
    assert value(index % other, at) == whole % other
    assert bounds(index // divisor * divisor + index % divisor) == bounds(index)
    assert index // divisor * divisor + index % divisor == index
