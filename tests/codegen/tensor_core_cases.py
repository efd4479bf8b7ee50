"""What CUDA C++ computes on tensor cores, in several sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
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

# With the knobs of a launch each; there are more samples than warps, and the last ones are not as many.
WALKED_PAIRS: dict[str, tuple[dict[str, Any], tuple[tuple[str, Any], ...]]] = {
    "rows_24": ({"BATCH": 300, "DIM": 128}, (("warps", 1), ("stages", 1))),
    "rows_40": ({"BATCH": 300, "DIM": 128, "ROWS": 40}, (("warps", 1), ("stages", 2))),
    "rows_48": ({"BATCH": 600, "DIM": 128, "ROWS": 48}, (("warps", 2), ("stages", 1))),
    "rows_17": ({"BATCH": 600, "ROWS": 17, "DTYPE": torch.bfloat16}, (("warps", 1), ("stages", 3))),
    "rows_64": ({"BATCH": 270, "ROWS": 64, "DIM": 96, "RANK": 8}, (("warps", 1), ("stages", 2))),
    "rows_of_two": ({"BATCH": 300, "ROWS": 40, "OTHERS": 57, "RANK": 0}, (("warps", 1), ("stages", 2))),
    "in_registers": ({"BATCH": 600, "ROWS": 17}, (("warps", 1), ("persistent", 132), ("loads", "pointers"))),
}

# With the knobs of a launch each.
MATMULS: dict[str, tuple[dict[str, Any], tuple[tuple[str, Any], ...]]] = {
    "plain": ({"ROWS": 72}, ()),
    "large": ({"AFTER": "linear"}, (("m", 128), ("n", 128), ("stages", 3), ("warps", 8))),
    "across": (
        {
            "LEFT": True,
            "RIGHT": False,
            "DEPTH": 136,
            "BATCH": 2,
            "DTYPE": torch.bfloat16,
            "AFTER": "residual",
        },
        (("k", 128), ("m", 128), ("n", 128), ("stages", 2), ("warps", 4)),
    ),
    "walking": (
        {"ROWS": 1096, "COLUMNS": 1000, "DEPTH": 40, "LEFT": True},
        (("m", 64), ("n", 128), ("persistent", 132), ("stages", 2), ("warps", 4)),
    ),
    "tall": ({"ROWS": 300, "RIGHT": False}, (("m", 256), ("n", 64), ("stages", 2), ("warps", 8))),
    "halves": ({"ROWS": 72, "PART": 64}, ()),
    "turned": ({"ROWS": 24, "BATCH": 3, "AFTER": "two"}, (("turned", True),)),
    "split": ({"ROWS": 72, "COLUMNS": 40, "DEPTH": 1000, "BATCH": 2, "AFTER": "two"}, (("split", 4),)),
    "single": (
        {"DTYPE": torch.float32, "ROWS": 72, "DEPTH": 100, "RIGHT": False, "AFTER": "residual"},
        (("k", 64), ("m", 64), ("n", 64), ("stages", 2), ("warps", 4)),
    ),
}


# Convolutions as products of matrices, with the knobs of a launch each.
WINDOWS: dict[str, tuple[dict[str, Any], tuple[tuple[str, Any], ...]]] = {
    "points": ({"TAPS": 1, "PADDING": 0, "OUTPUTS": 72}, ()),
    "points_apart": ({"TAPS": 1, "PADDING": 0, "STRIDE": 2, "SIZES": (11, 13)}, (("n", 32), ("stages", 2))),
    "image": ({"STRIDE": (1, 2), "PADDING": (2, 1), "DILATION": (2, 1), "BIAS": False}, (("stages", 2),)),
    "image_parts": ({"INPUTS": 64, "SIZES": (7, 9)}, (("split", 2),)),
    "volume": (
        {
            "SIZES": (6, 9, 7),
            "STRIDE": (1, 2, 1),
            "PADDING": (1, 0, 2),
            "DILATION": (1, 1, 2),
            "DTYPE": torch.bfloat16,
        },
        (),
    ),
    "signal_apart": ({"SIZES": (53,), "STRIDE": 2}, ()),
    "image_tf32": ({"DTYPE": torch.float32}, (("m", 64), ("n", 64))),
    "points_tf32": ({"DTYPE": torch.float32, "TAPS": 1, "PADDING": 0}, ()),
}


def task(name: str, **sizes: Any) -> Task:
    """By the name of its sizes, with some other than its own."""
    files = {
        "conv": CONVOLUTIONS,
        "pairs": PAIRS | {name: sizes for name, (sizes, _) in WALKED_PAIRS.items()},
        "matmul": {name: sizes for name, (sizes, _) in MATMULS.items()},
        "window": {name: sizes for name, (sizes, _) in WINDOWS.items()},
    }
    file, own = next((file, cases[name]) for file, cases in files.items() if name in cases)
    made = Task.from_file(Path(__file__).parent / "tensor_cores" / f"{file}.py")
    precision = "tf32" if name == "single" or name.endswith("tf32") else made.precision
    return replace(made, name=name, precision=precision, shapes={"cpu": own | sizes, "gpu": own | sizes})


@cache
def program(name: str, **sizes: Any) -> Program:
    """In CUDA C++, with some sizes other than its own."""
    return Program.from_task(task(name, **sizes), "cuda", "cuda")
