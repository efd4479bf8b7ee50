"""Runs one artifact's plan by itself, so that tools can watch it: ``ncu``, ``compute-sanitizer``, Proton.

    python -m ke_gym.evaluation.gpu_replay FOLDER SHAPE_SET DEVICE RUNS BLOCKS [--proton]

At most ``BLOCKS`` blocks of every launch run, all if that is 0. ``FOLDER`` holds ``task`` and ``artifact`` (their
bytes). Only the plan's own runs lie between the marks of the profiler's interface. With ``--proton``, Triton's own profiler
watches these from within, and what it has recorded is printed, in one line. The process is trusted: device code is all that
is foreign in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Geometry, Launch, Plan
from ke_gym.targets._memory import plan_memory
from ke_gym.targets.cuda_driver import Driver, runtime
from ke_gym.targets.cuda_executor import ALIGNMENT, CudaRunner
from ke_gym.tasks.task import Task

TASK, ARTIFACT = "task", "artifact"
PROTON = "--proton"
SEED = 7


def clipped(geometry: Geometry, blocks: int) -> Geometry:
    """The same launch with the first blocks alone, whole clusters of them. One that waits for all its blocks stays."""
    if geometry.cooperative:
        return geometry
    grid, left = [], blocks
    for size, cluster in zip(geometry.grid, geometry.cluster):
        grid.append(min(size, -(-max(1, left) // cluster) * cluster))
        left //= grid[-1]
    return replace(geometry, grid=(grid[0], grid[1], grid[2]))


def in_part(plan: Plan, blocks: int) -> Plan:
    """The plan, and its preparation, with every launch ``clipped``."""
    made = in_part(plan.preparation, blocks) if plan.preparation is not None else None
    steps = [
        replace(step, geometry=clipped(step.geometry, blocks))
        if isinstance(step, Launch) and step.geometry is not None
        else step
        for step in plan.steps
    ]
    return replace(plan, steps=tuple(steps), preparation=made)


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """What the device does within, recorded by Proton and printed."""
    from triton import profiler

    profiler.start(str(path), backend="cupti")
    try:
        yield
    finally:
        profiler.finalize()
    print(json.dumps(json.loads(path.with_name(f"{path.name}.hatchet").read_text())), flush=True)


def replay(
    folder: Path, shape_set: str, device: torch.device, runs: int, blocks: int, proton: bool = False
) -> None:
    """Run the plan ``runs`` times, launch by launch, on tensors with memory of their own."""
    task = Task.from_bytes((folder / TASK).read_bytes())
    artifact = Artifact.from_bytes((folder / ARTIFACT).read_bytes())
    plan = replace(artifact.plans[shape_set], graph=False)
    plan = in_part(plan, blocks) if blocks else plan
    artifact = replace(artifact, plans={shape_set: plan})
    inputs = [a for a in task.inputs(shape_set, SEED, device=str(device)) if isinstance(a, Tensor)]
    state = task.reference(shape_set, seed=0, device=str(device)).state
    memory = plan_memory(plan, alignment=ALIGNMENT)
    # Blocks that do not run leave zeros, which later launches may look things up by.
    arena = torch.zeros(memory.size, dtype=torch.uint8, device=device)
    runner = CudaRunner(
        artifact, shape_set, inputs, state, driver=Driver(), device=device, arena=arena, memory=memory
    )
    for made in runner.prepared:
        made.zero_()
    runner.prepare()
    torch.cuda.synchronize(device)
    interface = runtime.cudart()
    interface.cudaProfilerStart()
    with recorded(folder / "proton") if proton else nullcontext():
        for _ in range(runs):
            runner.run()
        torch.cuda.synchronize(device)
    interface.cudaProfilerStop()


def main(arguments: list[str]) -> None:
    folder, shape_set, number, runs, blocks, *options = arguments
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    device = torch.device("cuda", int(number))
    torch.cuda.set_device(device)
    torch.set_default_device(device)
    replay(Path(folder), shape_set, device, int(runs), int(blocks), PROTON in options)


if __name__ == "__main__":
    main(sys.argv[1:])
