"""What attention in CUDA C++ is to compute, in several sizes, and with which blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ke_gym.codegen import Program
from ke_gym.codegen.schedule import Schedule
from ke_gym.tasks import Task
from tests.codegen.interpret import scheduled

CASES: dict[str, tuple[dict[str, Any], tuple[tuple[str, Any], ...]]] = {
    "causal": ({"CAUSAL": True, "SPOILT": True}, ()),
    "later": (
        {"CAUSAL": True, "ROWS": 70, "KEYS": 300, "DTYPE": torch.float16},
        (("m", 64), ("n", 80), ("stages", 3)),
    ),
    "three_groups": ({"CAUSAL": True, "ROWS": 330, "KEYS": 330}, (("m", 192), ("n", 112))),
    "biased": ({"MASK": "added", "KEYS": 90, "DIM": 128, "VALUES": 72, "DTYPE": torch.float16}, (("n", 32),)),
    "kept": ({"BATCH": 2, "MASK": "kept", "ROWS": 64, "DIM": 40, "GROUPS": 2}, (("n", 64), ("stages", 1))),
    "decoding": ({"BATCH": 3, "HEADS": 4, "GROUPS": 2, "ROWS": 1, "KEYS": 200, "MASK": "lengths"}, ()),
    "slopes": (
        {"MASK": "slopes", "ROWS": 40, "KEYS": 96, "DIM": 32, "GROUPS": 2},
        (("n", 96), ("stages", 4)),
    ),
    "wide": ({"HEADS": 1, "KEYS": 130, "DIM": 256, "VALUES": 192}, (("turns", True),)),
}


@cache
def task(name: str, **sizes: Any) -> Task:
    """By its name, with some sizes other than its own."""
    own = CASES[name][0] | sizes
    made = Task.from_file(Path(__file__).parent / "tensor_cores" / "attention.py")
    return replace(made, name=f"attention_{name}", shapes={"cpu": own, "gpu": own})


@cache
def program(name: str, language: Any = "cuda", **sizes: Any) -> Program:
    """For a GPU, with some sizes other than its own."""
    return Program.from_task(task(name, **sizes), "cuda", language)


def schedule(name: str, **sizes: Any) -> Schedule:
    """Everything in one kernel with the case's own blocks."""
    launch = CASES[name][1]
    return scheduled(program(name, **sizes), launch) if launch else program(name, **sizes).seeds()[0]
