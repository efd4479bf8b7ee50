"""What each strategy is for, where it applies, and that saying so is cheap: nothing is printed to find out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ke_gym.codegen import Program, Schedule, emit_cpp, emit_cpp_products, module, rewrites
from ke_gym.languages import cpp
from ke_gym.strategies import STRATEGIES
from ke_gym.tasks import Task
from tests.codegen.test_program import wrong


class Module(nn.Module):
    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *inputs: Tensor) -> Any:
        return self.compute(*inputs)


CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "transpose": (lambda x: torch.relu(x.transpose(1, 2)) + 1, [torch.randn(3, 70, 90)]),
    "softmax": (lambda x: torch.softmax(x / 3, -1), [torch.randn(64, 96)]),
    "sum": (lambda x: x.sum(-1), [torch.randn(64, 96)]),
    "columns": (lambda x: (x * 2).mean(0), [torch.randn(700, 1100)]),
    "divide": (lambda x, y: x / (y.abs() + 1), [torch.randn(50, 60), torch.randn(50, 60)]),
    "large": (lambda x: torch.relu(x) + 1, [torch.randn(600, 601)]),
    "apart": (
        lambda x, y: (x.sort(-1).values * 2, y.cumsum(0) + 1),
        [torch.randn(9, 40), torch.randn(50, 7)],
    ),
    "rows": (lambda x: torch.softmax(x, -1), [torch.randn(20, 6000)]),
    "borders": (lambda x: (F.pad(x, (3, 5)), F.pad(x, (3, 5)) * x.sum()), [torch.randn(40, 50)]),
    "few_rows": (lambda a, b: a @ b, [torch.randn(4, 96), torch.randn(96, 128)]),
    "bf16": (lambda a, b: a @ b, [torch.randn(24, 40).bfloat16(), torch.randn(40, 32).bfloat16()]),
    "matmul": (lambda a, b: torch.relu(a @ b), [torch.randn(96, 40), torch.randn(40, 64)]),
}


@pytest.fixture(scope="module")
def programs() -> dict[str, tuple[Task, Program]]:
    made = {}
    for name, (compute, inputs) in CASES.items():
        task = replace(Task.from_module(Module(compute), inputs), shapes={"cpu": {}})
        made[name] = (task, Program.from_task(task))
    return made


def variants(program: Program, strategy: str) -> list[Schedule]:
    seed, found = program.seeds()[0], []
    for draw in range(12):
        made = rewrites.apply(program, seed, strategy, draw)
        if made is not None and made not in found:
            found.append(made)
    return found


def test_every_strategy_has_a_rewrite() -> None:
    assert set(rewrites.STRATEGIES) == {strategy.name for strategy in STRATEGIES}


@pytest.mark.parametrize(
    ("strategy", "applies", "not_to"),
    [
        ("layout_coalesce", ["transpose"], ["softmax", "divide", "sum"]),
        ("cache_hint", ["large"], ["softmax", "divide", "sum", "matmul"]),
        ("precision_math", ["softmax", "sum", "divide"], ["transpose"]),
        ("specialize", ["columns", "matmul"], ["softmax", "divide"]),
        ("predicate_peel", ["borders"], ["softmax", "matmul"]),
    ],
)
def test_a_strategy_applies_where_there_is_something_for_it(
    programs: dict[str, tuple[Task, Program]], strategy: str, applies: list[str], not_to: list[str]
) -> None:
    for name in applies:
        task, program = programs[name]
        made = variants(program, strategy)
        assert made, name
        for schedule in made[:3]:
            assert not wrong(task, program.emit(schedule)), program.emit(schedule)
    for name in not_to:
        assert not variants(programs[name][1], strategy), name


def test_transposes_are_walked_in_squares(programs: dict[str, tuple[Task, Program]]) -> None:
    _, program = programs["transpose"]
    tiles = {t for s in variants(program, "layout_coalesce") for g in s.plans[0].groups for _, t in g.outer}
    assert {16, 32, 64} <= tiles


def test_sums_are_reassociated_but_not_the_steps_of_an_exponential(
    programs: dict[str, tuple[Task, Program]],
) -> None:
    flags = {
        name: {f for s in variants(programs[name][1], "precision_math") for f in s.flags} for name in CASES
    }
    assert "-fassociative-math" in flags["sum"] and "-fassociative-math" not in flags["softmax"]
    assert "-freciprocal-math" in flags["divide"] and "-freciprocal-math" not in flags["sum"]
    assert not any("fast" in flag or "finite" in flag for found in flags.values() for flag in found)


@pytest.mark.parametrize("name", CASES)
def test_what_applies_is_legal_prints_differently_and_repeats(
    programs: dict[str, tuple[Task, Program]], name: str
) -> None:
    _, program = programs[name]
    seed = program.seeds()[0]
    text = program.emit(seed)
    for strategy in rewrites.STRATEGIES:
        for draw in (0, 1, 5):
            made = rewrites.apply(program, seed, strategy, draw)
            assert made == rewrites.apply(program, seed, strategy, draw)
            if made is not None:
                assert program.legal(made) and program.emit(made) != text, strategy


def test_the_compiler_is_a_knob_where_there_is_a_choice(
    programs: dict[str, tuple[Task, Program]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program = programs["softmax"]
    seed = program.seeds()[0]
    for families in (("g++",), ("clang++", "g++")):
        monkeypatch.setattr(cpp, "compilers", lambda families=families: dict.fromkeys(families))
        assert rewrites.knobs(program, seed).get("compiler", [seed.compiler]) == list(families)
    changed = rewrites.with_knobs(program, seed, {"compiler": "clang++"})
    assert "compiler='clang++'" in program.emit(changed) and "compiler=" not in program.emit(seed)
    assert rewrites.with_knobs(program, changed, {"compiler": "g++"}) == seed


# Every strategy, and one case to which it applies, some of them after another one.
AFTER = {"fuse": "fission", "traversal_swizzle": "layout_coalesce"}
APPLIES = {
    "tile_block": "columns",
    "stage_local": "columns",
    "layout_coalesce": "transpose",
    "vectorize": "sum",
    "loop_order": "transpose",
    "traversal_swizzle": "transpose",
    "cache_hint": "large",
    "prefetch_pipeline": "rows",
    "fuse": "softmax",
    "fission": "softmax",
    "recompute": "softmax",
    "unroll_ilp": "sum",
    "matrix_unit": "bf16",
    "precision_math": "divide",
    "algebra_hoist": "softmax",
    "algorithm_swap": "few_rows",
    "predicate_peel": "borders",
    "work_partition": "matmul",
    "split_reduce": "columns",
    "sync_launch": "apart",
    "specialize": "matmul",
    "param_tune": "softmax",
}


def test_every_strategy_is_shown_where_it_applies() -> None:
    assert set(APPLIES) == set(rewrites.STRATEGIES)


@pytest.mark.parametrize("strategy", APPLIES)
def test_a_strategy_makes_another_module_that_is_correct(
    programs: dict[str, tuple[Task, Program]], strategy: str
) -> None:
    task, program = programs[APPLIES[strategy]]
    before: Schedule | None = program.seeds()[0]
    if strategy in AFTER:
        before = rewrites.apply(program, program.seeds()[0], AFTER[strategy], 0)
    assert before is not None
    made = rewrites.apply(program, before, strategy, 0)
    assert made is not None
    source = program.emit(made)
    assert source != program.emit(before)
    assert not wrong(task, source), source


def test_applicability_prints_no_module_and_prints_no_kernel_twice(
    programs: dict[str, tuple[Task, Program]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program = programs["matmul"]
    seed = program.seeds()[0]
    for strategy in rewrites.STRATEGIES:
        rewrites.apply(program, seed, strategy, 0)

    def printed(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("printed")

    monkeypatch.setattr(module, "emit", printed)
    monkeypatch.setattr(emit_cpp, "print_nest", printed)
    monkeypatch.setattr(emit_cpp_products, "print_contraction", printed)
    applicable = [s for s in rewrites.STRATEGIES if rewrites.apply(program, seed, s, 0) is not None]
    assert "tile_block" in applicable


def test_a_schedule_says_from_which_size_on_results_leave_past_the_caches(
    programs: dict[str, tuple[Task, Program]],
) -> None:
    _, program = programs["large"]  # a result of 1.4 MiB
    seed = program.seeds()[0]
    leaves = {}
    for least in rewrites.knobs(program, seed)["0.0.stream"]:
        source = program.emit(rewrites.with_knobs(program, seed, {"0.0.stream": least}))
        leaves[least] = "ke::stream_out(" in source
    assert leaves == {0: False, 1: True, 8: False}
