"""What the tests of language-model proposers share: a brief made by hand, and a fast judge."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ke_gym.proposers.brief import Brief
from ke_gym.tasks import Task

MACHINE = (
    "Test CPU (x86_64), 2 OpenMP thread(s), one per core",
    "vectors of 512 bits (16 floats); no matrix unit",
    "measured peaks, all threads together: 100 GFLOP/s of float32 FMA, 50 of float64",
)
KEY = "sk-planted-4f1d0c9a7b"


@cache
def brief(name: str = "softmax") -> Brief:
    """The brief of a built-in task on a machine that stays the same wherever the tests run."""
    return replace(Brief.unmeasured(Task.load(name), MACHINE), bytes_moved=33.6e6, floor_ms=0.4)
