"""Wrong versions of a reference that every task must reject (docs/tasks.md).

Zeros, a copy of an input, one operator skipped, half-precision arithmetic, and an output frozen from other
inputs. A task whose check lets one of them through can be cheated: none such ships with the project. A user's own is
searched all the same, with a warning, unless the one let through computes nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ke_gym.errors import UserError
from ke_gym.tasks.task import Precision, Reference

MAX_SKIPPED = 12
ZEROS, FROZEN, COPY = "zeros", "frozen output", "copy of input"
_LOWER = {torch.float64: torch.float32, torch.float32: torch.bfloat16}


@dataclass(frozen=True)
class Mutant:
    name: str
    outputs: tuple[Tensor, ...]


class _Skip(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the n-th eligible operator by one of its operands; counts the eligible ones."""

    def __init__(self, skip: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.skip, self.eligible, self.name = skip, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or func.is_view or not out.is_floating_point():
            return out
        operand = next(
            (
                t
                for t in tree_leaves(args)
                if isinstance(t, Tensor) and t.shape == out.shape and t.dtype == out.dtype
            ),
            None,
        )
        if operand is None:
            return out
        self.eligible += 1
        if self.eligible - 1 == self.skip:
            self.name = func.__name__.split(".")[0]
            return operand.clone()
        return out


def mutants(
    reference: Reference, arguments: list[Any], other: list[Any], precision: Precision
) -> Iterator[Mutant]:
    """Yield the mutants of ``reference`` on ``arguments``; ``other`` are inputs of another seed.

    None is what the task's ``precision`` allows: half-precision arithmetic is no fault under "bf16".
    """
    outputs = reference(*arguments)
    yield Mutant(ZEROS, tuple(torch.zeros_like(t) for t in outputs))
    frozen = reference(*other)
    if _differ(outputs, frozen):
        yield Mutant(FROZEN, frozen)
    for position, tensor in enumerate(a for a in arguments if isinstance(a, Tensor)):
        copied = tuple(
            tensor.to(t.dtype, copy=True) if tensor.shape == t.shape else torch.zeros_like(t) for t in outputs
        )
        if any(tensor.shape == t.shape for t in outputs):
            yield Mutant(f"{COPY} {position}", copied)
    if precision != "bf16":
        yield from _half(reference, arguments, outputs)
    for index in range(MAX_SKIPPED):
        with _Skip(index) as mode:
            try:
                skipped = reference(*arguments)
            except UserError:  # what the reference raises
                continue  # a skipped operator may break a later one: nothing to judge
        if not mode.name:
            return
        if all(a.shape == b.shape for a, b in zip(outputs, skipped)) and _differ(outputs, skipped):
            yield Mutant(f"skipped {mode.name} ({index})", tuple(skipped))


def computes_nothing(mutant: str) -> bool:
    """Whether a mutant of this name gives an answer without computing anything."""
    return mutant.startswith((ZEROS, FROZEN, COPY))


def _differ(outputs: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(outputs, others))


def _half(reference: Reference, arguments: list[Any], outputs: tuple[Tensor, ...]) -> Iterator[Mutant]:
    """Inputs rounded to the next lower precision: what computing in that precision cannot do better than."""

    def rounded(value: Any) -> Any:
        lower = _LOWER.get(value.dtype) if isinstance(value, Tensor) else None
        return value.to(lower).to(value.dtype) if lower else value

    lowered = tree_map(rounded, arguments)
    if all(t.is_floating_point() and t.dtype.itemsize < 4 for t in outputs):
        return  # an output of that precision can't tell
    changed = any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(arguments, lowered))
    if changed:
        results = reference(*lowered)
        if _differ(outputs, results):
            yield Mutant("half precision", tuple(results))
