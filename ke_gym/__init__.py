"""Kernel optimization as a Gymnasium environment: proven-correct, measured speedups for PyTorch.

>>> import ke_gym
>>> result = ke_gym.optimize(module, example_inputs, budget=60)
>>> result.speedup, result.kernel(*example_inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ke_gym.candidate import Candidate
    from ke_gym.evaluation.evaluation import Evaluation
    from ke_gym.evaluation.evaluator import Evaluator
    from ke_gym.job import optimize
    from ke_gym.search.result import Result
    from ke_gym.search.store import Store
    from ke_gym.tasks.task import Task

__version__ = "0.1.0"

# Imported on first use: kernel modules import `ke_gym.lang` alone.
_HOMES = {
    "Candidate": "ke_gym.candidate",
    "Evaluation": "ke_gym.evaluation.evaluation",
    "Evaluator": "ke_gym.evaluation.evaluator",
    "Result": "ke_gym.search.result",
    "Store": "ke_gym.search.store",
    "Task": "ke_gym.tasks.task",
    "optimize": "ke_gym.job",
}

__all__ = ["Candidate", "Evaluation", "Evaluator", "Result", "Store", "Task", "optimize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ke_gym' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
