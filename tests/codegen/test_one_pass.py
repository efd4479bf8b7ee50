"""Statistics in one pass over a row: where the strategy offers them, and what they give on rows chosen to break them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ke_gym.codegen import Program, Schedule, fusion, rewrites
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.nest import Nest
from ke_gym.codegen.one_pass import SUM_EXP
from ke_gym.codegen.split_reductions import for_gpu
from ke_gym.languages.base import Signature, build
from ke_gym.targets.executor import PlanRunner
from ke_gym.tasks.task import Task
from tests.codegen.test_rows import INF, NAN, Applied

ROWS, COLUMNS = 8, 2500  # of an online sum: three blocks, the last one partial
LABELS = torch.arange(ROWS) * 300
VARIANCES: dict[str, Callable[..., Any]] = {
    "var": lambda x: x.var(-1),
    "var_mean": lambda x: torch.var_mean(x, -1, correction=0),
    "columns": lambda x: x.view(40, -1).var(0),
    "written out": lambda x: (x - x.mean(-1, keepdim=True)).pow(2).mean(-1),
}
NORMS: dict[str, Callable[..., Any]] = {
    "layer": lambda x: F.layer_norm(x, (COLUMNS,)),
    "group": lambda x: F.group_norm(x.view(2, 4, COLUMNS), 2),
    "instance": lambda x: F.instance_norm(x.view(2, 4, 50, 50)),
}
SOFTMAXES: dict[str, Callable[..., Any]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "masked": lambda x: torch.softmax(torch.where(x > 1, x * 0.5, x), -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x.view(ROWS, 50, 50), (1, 2)),
    "cross entropy": lambda x: F.cross_entropy(x, LABELS),
    "double": lambda x: torch.softmax(x.double(), -1),
}
ALL = VARIANCES | NORMS | SOFTMAXES


def program_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[Task, Program]:
    task = Task.from_module(Applied(function), inputs)
    return task, Program.from_task(task)


def swapped(program: Program) -> Schedule:
    made = rewrites.apply(program, program.seeds()[0], "algorithm_swap", 0)
    assert made is not None
    assert any(group.one_pass for group in made.plans[0].groups)
    return made


@cache
def kernel(name: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What one pass computes for the function of that name."""
    task, program = program_of(ALL[name], torch.randn(ROWS, COLUMNS))
    artifact = build(program.emit(swapped(program)), Signature.of(task))
    shapes = task.contract()
    state = task.reference(shapes).state
    return lambda x: tuple(PlanRunner(artifact, shapes, [x], state).run())


def exact(name: str, x: Tensor) -> tuple[Tensor, ...]:
    found = ALL[name](x.double())
    return found if isinstance(found, tuple) else (found,)


def close(name: str, x: Tensor, rtol: float, atol: float) -> None:
    for got, wanted in zip(kernel(name)(x), exact(name, x), strict=True):
        torch.testing.assert_close(got, wanted.to(got.dtype), rtol=rtol, atol=atol, equal_nan=True)


def in_one_pass(graph: Graph, schedule: Schedule) -> list[Nest]:
    nests = fusion.nests(graph, schedule.plans[0])
    return [n for n in nests if isinstance(n, Nest) and n.group.one_pass]


def passes(nest: Nest) -> int:
    return sum(any(item.op for item in stage.items) for stage in nest.stages)


@pytest.mark.parametrize("name", ALL)
def test_the_algorithm_is_a_choice_that_can_be_taken_back(name: str) -> None:
    _, program = program_of(ALL[name], torch.randn(ROWS, COLUMNS))
    seed = program.seeds()[0]
    made = swapped(program)
    (nest,) = in_one_pass(program.graphs[0], made)
    before = next(
        n
        for n in fusion.nests(program.graphs[0], seed.plans[0])
        if isinstance(n, Nest) and n.group.nodes == nest.group.nodes
    )
    assert passes(nest) == passes(before) - 1
    assert "; statistics in one pass\n" in program.emit(made)
    assert "statistics in one pass" not in program.emit(seed)
    assert rewrites.apply(program, made, "algorithm_swap", 0) == seed
    assert Schedule.from_json(made.to_json()) == made


@given(
    mean=st.sampled_from([0.0, 1e-3, 1.0, -300.0, 1e4, 3e6, 1e18]),
    spread=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e3]),
    first=st.sampled_from([None, 0.0, 50.0, -1e4, 1e7]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", VARIANCES)
def test_variances_of_large_means_and_small_spreads(
    name: str, mean: float, spread: float, first: float | None, seed: int
) -> None:
    """Better than two passes in fp32 would be: the rounding of the mean, nothing else, is what is lost."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * spread + mean
    if first is not None:
        x[:, 0] = first
        x[0, :] = first
    close(name, x, rtol=2e-6, atol=0.0)


@given(mean=st.sampled_from([0.0, 1.0, -30.0, 200.0]), first=st.sampled_from([None, 0.0, -1e4, 1e6]))
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_rows_far_from_zero(name: str, mean: float, first: float | None) -> None:
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) + mean
    if first is not None:
        x[:, 0] = first
    size = max(float(x.abs().max()), 1.0)
    close(name, x, rtol=1e-5, atol=1e-5 + 2e-7 * abs(mean) + 2e-9 * size)


@pytest.mark.parametrize("name", ["var", "var_mean", "layer"])
@pytest.mark.parametrize("value", [INF, -INF, NAN, 3e38])
def test_statistics_of_rows_that_are_not_finite(name: str, value: float) -> None:
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    x[0, 0] = x[1, 1300] = x[2, -1] = value
    # A mean alone is infinite; torch's variance with it makes it NaN.
    wanted = (x.var(-1, correction=0), x.mean(-1)) if name == "var_mean" else (ALL[name](x),)
    for mine, theirs in zip(kernel(name)(x), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


EXTREMES = st.sampled_from([INF, -INF, NAN, 0.0, 88.8, -104.0, 1e4, -1e4, 3e37, -3e37])


@given(
    slope=st.sampled_from([-90.0, -1.0, 0.0, 1.0, 90.0]),
    places=st.lists(st.tuples(st.integers(0, COLUMNS - 1), EXTREMES), max_size=3),
    blank=st.sampled_from([(0, 0), (0, 1024), (0, 2048), (1024, 2500), (0, 2500)]),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", SOFTMAXES)
def test_exponentials_whose_maximum_comes_late_or_never(
    name: str, slope: float, places: list[tuple[int, float]], blank: tuple[int, int]
) -> None:
    """As two passes give it, NaN and infinities included: rising and falling rows, blocks of minus infinity."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    x += torch.linspace(0, slope, COLUMNS)
    x[:5, blank[0] : blank[1]] = -INF
    for column, value in places:
        x[:3, column] = value
    close(name, x, rtol=2e-5, atol=1e-6)


def test_half_precision_and_nested_statistics() -> None:
    def both(x: Tensor) -> Tensor:
        return torch.softmax(F.layer_norm(x * 2 + 3, (x.shape[-1],)), -1) + x.var(-1, keepdim=True)

    x = torch.randn(6, 1300).bfloat16()
    task, program = program_of(both, x)
    made = swapped(program)
    (nest,) = in_one_pass(program.graphs[0], made)
    assert {item.op for stage in nest.stages for item in stage.items} >= {"sum", "max", SUM_EXP}
    shapes = task.contract()
    runner = PlanRunner(
        build(program.emit(made), Signature.of(task)), shapes, [x], task.reference(shapes).state
    )
    (got,) = runner.run()
    torch.testing.assert_close(got.double(), both(x.double()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: torch.softmax(x, 1), torch.randn(8, 64, 600)),  # of columns: each lane is another row
        (lambda x: x.var(-1), torch.randn(8, 600).double()),  # nothing wider to sum in
        (lambda x: (x - x.amax(-1, keepdim=True)).sum(-1), torch.randn(8, 600)),
        (lambda x: x.cumsum(-1), torch.randn(8, 600)),
        (lambda x: (x - x.sum(-1, keepdim=True) * 0.5).pow(2).sum(-1), torch.randn(8, 600)),  # not the mean
    ],
)
def test_what_one_pass_cannot_give_is_illegal(function: Callable[..., Any], x: Tensor) -> None:
    _, program = program_of(function, x)
    seed = program.seeds()[0]
    assert rewrites.apply(program, seed, "algorithm_swap", 0) is None
    plan = seed.plans[0]
    forced = replace(plan, groups=tuple(replace(g, one_pass=True) for g in plan.groups))
    assert not program.legal(replace(seed, plans=(forced,)))


def test_kernels_for_a_gpu_do_not_take_the_choice() -> None:
    """They sum exponentials online by themselves where a row takes several passes."""
    _, program = program_of(SOFTMAXES["softmax"], torch.randn(ROWS, COLUMNS))
    graph = for_gpu(program.graphs[0])
    plan = fusion.fused(graph)
    forced = replace(plan, groups=tuple(replace(g, one_pass=True) for g in plan.groups))
    assert fusion.legal(graph, plan)
    with pytest.raises(Illegal, match="only loop nests"):
        fusion.nests(graph, forced)
