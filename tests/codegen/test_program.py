"""Every built-in task gets a correct first kernel, and no rewrite makes it wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ke_gym.codegen import Program, Schedule, rewrites
from ke_gym.evaluation import work
from ke_gym.evaluation.acceptance import Expected, judge_output
from ke_gym.languages.base import Signature, build
from ke_gym.targets.executor import PlanRunner
from ke_gym.tasks import library
from ke_gym.tasks.task import Task

CONTRASTING = ("softmax", "bias_gelu", "matmul_bias_gelu", "layer_norm", "column_mean", "conv_pointwise")


def small(name: str) -> Task:
    """The task at its smallest sizes, as if they were its contract."""
    task = library()[name]
    return replace(task, shapes={"cpu": task.shapes["ragged"]})


def wrong(task: Task, source: str) -> str:
    """Build and run a kernel module; what is wrong with its outputs, if anything."""
    artifact = build(source, Signature.of(task))
    assert artifact.lane == "plan"
    reference = task.reference("cpu")
    arguments = task.inputs("cpu", 3)
    reference.randomize(5)
    counted = work.count(reference, arguments)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    outputs = PlanRunner(artifact, "cpu", tensors, reference.state).run()
    expected = zip(reference(*arguments), reference.double()(*arguments), strict=True)
    for output, (own, oracle) in zip(outputs, expected, strict=True):
        verdict = judge_output(
            output, Expected(own, oracle, task.precision, task.tolerance, counted.reduction_length)
        )
        if not verdict.ok:
            return verdict.reason
    return ""


@pytest.mark.parametrize("name", library())
def test_every_task_has_a_correct_first_kernel(name: str) -> None:
    task = small(name)
    program = Program.from_task(task)
    seeds = program.seeds()
    source = program.emit(seeds[0])
    assert source == program.emit(seeds[0])
    assert not wrong(task, source), source
    assert len(set(seeds)) == len(seeds)
    for schedule in seeds:
        assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize("name", CONTRASTING)
def test_no_rewrite_makes_it_wrong(name: str) -> None:
    task = small(name)
    program = Program.from_task(task)
    seed = program.seeds()[0]
    applied = 0
    for strategy in rewrites.STRATEGIES:
        schedule = rewrites.apply(program, seed, strategy, 0)
        assert schedule == rewrites.apply(program, seed, strategy, 0)
        if schedule is None or schedule == seed:
            continue
        applied += 1
        source = program.emit(schedule)
        assert not wrong(task, source), f"{strategy}\n{source}"
    assert applied >= 3
