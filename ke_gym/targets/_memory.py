"""Where a plan's intermediates lie in one reused block of memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ke_gym.languages.plan import Alloc, Call, Plan, Ref, TensorSpec, uses

ALIGNMENT = 64
_UNSAFE_VIEW = "aten._unsafe_view.default"
"""A view of which the schema says that it is none."""


class PlanError(Exception):
    """The plan cannot be run here: which step, and why."""


@dataclass(frozen=True)
class MemoryPlan:
    """Byte offset of every intermediate ``Alloc`` in an arena of ``size`` bytes."""

    offsets: dict[int, int]
    lengths: dict[int, int]
    size: int

    @property
    def used(self) -> list[tuple[int, int]]:
        """(offset, length) of every intermediate."""
        return [(offset, self.lengths[value]) for value, offset in self.offsets.items()]


@functools.cache
def resolve(target: str) -> Any:
    """The ATen overload named like ``"aten.mm.default"``. Raises ``PlanError``."""
    parts = target.split(".")
    if len(parts) != 3 or parts[0] not in ("aten", "prims"):
        raise PlanError(f"{target} is no ATen operator")
    try:
        return getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        raise PlanError(f"this torch has no operator {target}") from None


def view(arena: torch.Tensor, spec: TensorSpec, offset: int) -> torch.Tensor:
    """The tensor ``spec`` at byte ``offset`` of a uint8 arena."""
    if spec.storage_bytes == 0:
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.torch_dtype, device=arena.device)
    flat = arena[offset : offset + spec.storage_bytes].view(spec.torch_dtype)
    return flat.as_strided(spec.shape, spec.stride)


def plan_memory(
    plan: Plan, *, reuse: bool = True, red_zone: int = 0, alignment: int = ALIGNMENT
) -> MemoryPlan:
    """Place the intermediates of ``plan``, first fit by liveness.

    ``reuse=False`` gives each its own bytes and ``red_zone`` bytes before it and after the last: what a
    check for stray writes needs.
    """
    live = _lifetimes(plan)
    placed: list[tuple[int, int, int, int]] = []  # offset, length, first step, last step
    offsets: dict[int, int] = {}
    lengths: dict[int, int] = {}
    end = red_zone
    for value, (spec, first, last) in live.items():
        length = spec.storage_bytes
        offset = red_zone
        for other, size, begin, until in sorted(placed):
            if (not reuse or (begin <= last and first <= until)) and other < offset + length + red_zone:
                offset = max(offset, _align(other + size + red_zone, alignment))
        offset = _align(offset, alignment)
        placed.append((offset, length, first, last))
        offsets[value], lengths[value] = offset, length
        end = max(end, offset + length + red_zone)
    return MemoryPlan(offsets, lengths, _align(end, alignment))


def alias_roots(plan: Plan) -> dict[int, int]:
    """For every value the value whose memory it may share (itself, if it has its own)."""
    roots = {number: number for number in range(len(plan.inputs))}
    for step in plan.steps:
        if isinstance(step, Alloc):
            roots[step.out] = step.out
        elif isinstance(step, Call):
            schema = resolve(step.target)._schema
            shared = _aliased_operand(schema, step)
            for out in step.outs:
                roots[out] = out if shared is None else roots[shared]
    return roots


def _aliased_operand(schema: Any, step: Call) -> int | None:
    """The operand that the schema says the results may be views of.

    An in-place or ``out=`` operator returns its operand too.
    """
    if step.target == _UNSAFE_VIEW:
        given = step.args[0] if step.args else step.kwargs.get("self")
        return given.value if isinstance(given, Ref) else None
    if not any(r.alias_info is not None for r in schema.returns):
        return None
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None:
            continue
        given = step.args[position] if position < len(step.args) else step.kwargs.get(argument.name)
        if isinstance(given, Ref):
            return given.value
    return None


def _lifetimes(plan: Plan) -> dict[int, tuple[TensorSpec, int, int]]:
    """(spec, first step, last step) in which each ``Alloc`` that is not an output holds data."""
    roots = alias_roots(plan)
    returned = {r: plan.return_specs[i] for i, r in reversed(list(enumerate(plan.returns)))}
    live: dict[int, tuple[TensorSpec, int, int]] = {}
    for index, step in enumerate(plan.steps):
        if isinstance(step, Alloc):
            if returned.get(step.out) != step.spec:
                live[step.out] = (step.spec, index, index)
            continue
        for root in {roots[v] for v in uses(step)} & live.keys():
            live[root] = (*live[root][:2], index)
    for root in {roots[r] for r in plan.returns} & live.keys():
        live[root] = (*live[root][:2], len(plan.steps))
    return live


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
