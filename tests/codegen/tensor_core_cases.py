"""What CUDA C++ computes on tensor cores, in several sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ke_gym.codegen import Program
from ke_gym.tasks import Task

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "residual": {"RESIDUAL": True, "DTYPE": torch.bfloat16},
    "several_tiles": {"BATCH": 2, "LENGTH": 520, "INPUTS": 32, "OUTPUTS": 200, "TAPS": 5, "PADDING": 2},
    "dilated": {"LENGTH": 264, "INPUTS": 96, "OUTPUTS": 64, "DILATION": 3, "PADDING": 3, "BIAS": False},
    "odd": {"LENGTH": 53, "INPUTS": 20, "OUTPUTS": 33, "TAPS": 4, "PADDING": 2, "RESIDUAL": True},
    "odd_input": {"LENGTH": 58, "PADDING": 0, "BATCH": 150},
    "odd_output": {"LENGTH": 600, "PADDING": 0, "TAPS": 2, "DTYPE": torch.bfloat16},
}


PAIRS: dict[str, dict[str, Any]] = {
    "interactions": {},
    "odd_rows": {"ROWS": 21, "DIM": 96, "RANK": 40, "DTYPE": torch.bfloat16},
    "two_operands": {"ROWS": 20, "OTHERS": 42, "RANK": 64},
    "without_matrix": {"ROWS": 33, "RANK": 0, "DIM": 32},
}


def task(name: str) -> Task:
    """By the name of its sizes."""
    file, sizes = ("conv", CONVOLUTIONS[name]) if name in CONVOLUTIONS else ("pairs", PAIRS[name])
    made = Task.from_file(Path(__file__).parent / "tensor_cores" / f"{file}.py")
    return replace(made, name=name, shapes={"cpu": sizes, "gpu": sizes})


def program(name: str, **sizes: int) -> Program:
    """In CUDA C++, with some sizes other than its own."""
    made = task(name)
    both = made.shapes["gpu"] | sizes
    return Program.from_task(replace(made, shapes={"cpu": both, "gpu": both}), "cuda", "cuda")
