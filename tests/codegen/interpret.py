"""Generated Triton modules run by Triton's interpreter. Needs ``TRITON_INTERPRET=1`` before Triton is imported."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ke_gym.codegen import Program, channels_last
from ke_gym.codegen.capture import capture
from ke_gym.codegen.graph import Extern
from ke_gym.codegen.lower import lower
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.split_reductions import for_gpu
from ke_gym.tasks import Task

SMALL = "ragged"
FOLDER = Path(__file__).parent
DRAFTED = [str(path) for path in sorted((FOLDER / "drafted").glob("*.py"))]
HALF = [str(path) for path in sorted((FOLDER / "half").glob("*.py"))]
PASSES = [str(path) for path in sorted((FOLDER / "passes").glob("*.py"))]
SEARCHED = [str(path) for path in sorted((FOLDER / "searched").glob("*.py"))]
THIN = [str(path) for path in sorted((FOLDER / "thin").glob("*.py"))]
# Products that are split, walked over by few programs, fetched by bulk copies or put in order first; convolutions.
PRODUCTS = [
    (str(FOLDER / "products" / f"{name}.py"), launch)
    for name, launch in (
        ("linear_half", (("m", 64), ("n", 64), ("k", 64), ("split", 2))),
        ("linear_half", (("loads", "descriptors"),)),
        ("linear_half", (("m", 16), ("n", 16), ("persistent", 132), ("loads", "descriptors"))),
        ("many_tiles", (("specialized", True), ("k", 32))),
        ("batched", (("loads", "descriptors"), ("m", 32))),
        ("batched", (("m", 16), ("n", 16), ("persistent", 132))),
        ("deep", (("k", 64), ("split", 4))),
        ("deep", (("k", 32), ("split", 4), ("loads", "descriptors"))),
        ("deep", (("k", 64), ("packed", True), ("loads", "descriptors"))),
        ("rows", (("packed", True),)),
        ("rows", (("k", 16), ("loads", "descriptors"))),
        ("conv1d", (("k", 16), ("m", 16), ("n", 32))),
        ("conv1d", (("k", 16), ("packed", False))),
        ("conv1d", (("unroll", False), ("loads", "descriptors"))),
        ("conv1d", (("unroll", True), ("loads", "descriptors"))),
        ("conv1d", (("words", True), ("k", 16), ("unroll", True))),
        ("conv1d", (("words", True), ("m", 16), ("n", 32), ("k", 16), ("loads", "descriptors"))),
        ("conv2d", (("warps", 2),)),
        ("conv2d_even", (("words", True),)),
        ("conv3d", (("warps", 2),)),
        ("pointwise", (("loads", "descriptors"),)),
        ("pointwise_single", (("packed", True), ("turned", True))),
        ("depthwise", (("rows", 256),)),
        ("weighted", (("seed", -1), ("prepared", True))),
        ("weighted", (("packed", True), ("prepared", True))),
        ("weighted", (("ready", True), ("prepared", True))),
        ("weighted", (("ready", True), ("packed", True), ("loads", "descriptors"), ("prepared", True))),
        ("weighted", (("ready", True), ("split", 2))),
        ("conv1d", (("channels_last", True), ("loads", "descriptors"))),
        ("weighted", (("ready", True), ("sums", 2), ("k", 16))),
        ("conv2d", (("channels_last", True), ("warps", 2))),
        ("conv2d_even", (("channels_last", True), ("unroll", True), ("prepared", True))),
        ("pointwise", (("channels_last", True), ("loads", "descriptors"))),
        ("conv_chain", (("channels_last", True), ("prepared", True))),
        ("pointwise_given", (("channels_last", True), ("precision", "tf32x3"), ("ready", True))),
        ("conv3d", (("channels_last", True), ("warps", 2))),
        ("conv2d_single", (("channels_last", True),)),
        ("conv2d_single", (("channels_last", True), ("packed", True), ("ready", True), ("prepared", True))),
        ("conv2d_taps", (("channels_last", True), ("ready", True), ("sums", 2), ("k", 32), ("unroll", True))),
    )
]


# Rows of tasks that take each by itself: blocks of two, four and eight of them end raggedly all the same.
FEW_ROWS = 13
BY_ROWS = {
    "softmax", "log_softmax", "layer_norm", "cross_entropy", "argmax", "variance", "layer_norm_backward",
    "rms_norm_backward",
}  # fmt: skip


@cache
def program(name: str) -> Program:
    """The task's program for a GPU, at its small odd sizes."""
    return program_of(Task.load(name))


def program_of(task: Task) -> Program:
    return Program(task.name, (for_gpu(lower(capture(task, SMALL), task.precision)),))


def interpretable(name: str) -> Task:
    """The task with few rows: every program of the grid is a walk through Python."""
    task = Task.load(name)
    few = {"ROWS": FEW_ROWS} if name in BY_ROWS else {}
    return replace(task, shapes={**task.shapes, SMALL: {**task.shapes[SMALL], **few}})


def with_launch(schedule: Schedule, launch: Any) -> Schedule:
    """The schedule with these knobs of its first kernel."""
    plan = schedule.plans[0]
    first = replace(plan.groups[0], launch=tuple((str(k), v) for k, v in launch))
    return Schedule((replace(plan, groups=(first, *plan.groups[1:])),))


def scheduled(made: Program, launch: Any) -> Schedule:
    """The program's schedule with these knobs of its products, or else of its first kernel.

    ``prepared`` is the schedule's own, ``seed`` says which draft it is made from; ``channels_last`` takes the library's
    convolutions over.
    """
    (graph,) = made.graphs
    knobs = tuple((str(k), v) for k, v in launch if k not in ("prepared", "seed"))
    plan = made.seeds()[dict(launch).get("seed", 0)].plans[0]
    called = [name for name, step in graph.steps.items() if isinstance(step, Extern)]
    if ("channels_last", True) in knobs:
        plan = channels_last.everywhere(graph, plan)
    inside = [any(name in group.nodes for name in called) for group in plan.groups]
    chosen = inside if any(inside) else [k == 0 for k in range(len(inside))]
    groups = (replace(g, launch=knobs) if here else g for g, here in zip(plan.groups, chosen))
    return Schedule((replace(plan, groups=tuple(groups)),), prepared=dict(launch).get("prepared", False))


def first(made: Program) -> Schedule:
    """The first draft without CUDA C++, which no interpreter runs."""
    return next(seed for seed in made.seeds() if "lang.cuda(" not in made.emit(seed))


def imported(source: str, folder: Path) -> ModuleType:
    path = folder / "kernel_module.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("kernel_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(module: ModuleType, task: Task) -> None:
    """Fails unless ``forward`` gives what the reference does, on infinities and NaN too."""
    reference = task.reference(SMALL)
    for seed, distribution in enumerate(("task", "special")):
        inputs = task.inputs(SMALL, seed, distribution)
        given = {name: tensor.detach() for name, tensor in reference.state.items()}
        if hasattr(module, "prepare"):
            taken = inspect.signature(module.prepare).parameters
            given |= module.prepare(**{name: given[name] for name in taken})
        names = list(inspect.signature(module.forward).parameters)[len(inputs) :]
        got = module.forward(*inputs, **{name: given[name] for name in names})
        wanted = reference(*inputs)
        for a, b in zip([got] if isinstance(got, torch.Tensor) else got, wanted, strict=True):
            close = 2e-2 if b.dtype in (torch.bfloat16, torch.float16) else 2e-4
            torch.testing.assert_close(a, b, rtol=close, atol=close, equal_nan=True)


def check(name: str, launch: Any) -> None:
    """Whether the module computes what the reference does, inputs with infinities and NaN included."""
    task = interpretable(name)
    made = program_of(task)
    schedule = scheduled(made, launch) if launch else first(made)
    assert made.legal(schedule)
    with tempfile.TemporaryDirectory() as folder:
        compare(imported(made.emit(schedule), Path(folder)), task)


def case(name: str, launch: Any) -> str:
    """A module and the knobs that differ, for people."""
    return " ".join([Path(name).stem, *(f"{knob}={value}" for knob, value in launch)])


def case_ids(value: Any) -> str:
    """Parametrized tests' ids."""
    return Path(value).stem if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value) or "drafted"


def main() -> None:
    found = {}
    for name, launch in json.load(sys.stdin):
        key = case(name, launch)
        try:
            check(name, launch)
            found[key] = ""
        except Exception as error:
            found[key] = f"{type(error).__name__}: {error}"[:500]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
