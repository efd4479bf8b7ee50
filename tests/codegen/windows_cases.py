"""Convolutions that CUDA C++ computes on tensor cores: sizes, and how the tiles travel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ke_gym.codegen import Program
from ke_gym.tasks import Task

CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "residual": {"RESIDUAL": True, "DTYPE": torch.bfloat16},
    "several_tiles": {"BATCH": 60, "LENGTH": 520, "INPUTS": 32, "OUTPUTS": 200, "TAPS": 5, "PADDING": 2},
    "dilated": {"LENGTH": 264, "INPUTS": 96, "OUTPUTS": 64, "DILATION": 3, "PADDING": 3, "BIAS": False},
    "odd": {"LENGTH": 53, "INPUTS": 20, "OUTPUTS": 33, "TAPS": 4, "PADDING": 2, "RESIDUAL": True},
    "odd_input": {"LENGTH": 58, "PADDING": 0, "BATCH": 300},
    "odd_output": {"LENGTH": 600, "PADDING": 0, "TAPS": 2, "DTYPE": torch.bfloat16},
}


def task(name: str) -> Task:
    made = Task.from_file(Path(__file__).parent / "windows" / "conv.py")
    return replace(made, name=name, shapes={"cpu": CASES[name], "gpu": CASES[name]})


def program(name: str) -> Program:
    return Program.from_task(task(name), "cuda", "cuda")
