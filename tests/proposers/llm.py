"""What the tests of language-model proposers share: a brief made by hand, and a fast judge."""

from __future__ import annotations

from functools import cache

from ke_gym.languages.base import Signature
from ke_gym.proposers.brief import Argument, Brief, describe, input_names
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
    task = Task.load(name)
    signature = Signature.of(task)
    names = input_names(task.source)
    shapes = {
        shape_set: (
            tuple(Argument(n, describe(v)) for n, v in zip(names, signature.inputs[shape_set])),
            tuple(Argument(n, describe(v)) for n, v in signature.state[shape_set].items()),
            tuple(describe(v) for v in signature.outputs[shape_set]),
        )
        for shape_set in signature.shape_sets
    }
    return Brief(task, "cpu", "eager", task.contract("cpu"), shapes, 33.6e6, 0.0, 0.4, MACHINE)
