"""How much of a plan's time is its own kernels': what is gone when the plan runs without them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Alloc, Call, Launch, Plan, uses
from ke_gym.targets._memory import alias_roots, resolve

_TAKES_ANYTHING = {
    "_log_softmax", "_scaled_dot_product_attention_math", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_softmax", "_to_copy", "addmm", "amax", "amin", "baddbmm", "bmm", "cat",
    "clone", "constant_pad_nd", "contiguous", "convolution", "copy_", "linear", "log_softmax", "matmul", "mean", "mm",
    "mv", "native_group_norm", "native_layer_norm", "scaled_dot_product_attention", "softmax", "sum", "var_mean",
    "_unsafe_view",
}  # fmt: skip
"""Operators that fail on no contents, besides pointwise ones and views: they take no indices and no probabilities."""
_DIVIDES_INTEGERS = ("div.Scalar_mode", "div.Tensor_mode", "floor_divide.", "fmod.", "remainder.")


def without_kernels(artifact: Artifact, shape_set: str) -> Artifact | float | None:
    """The artifact with one plan's library calls alone.

    For a plan that has no kernels or no library calls, the kernels' share of its time: 0 or 1. None where a call takes what
    kernels made, and might fail on whatever else lies there.
    """
    plan = artifact.plans[shape_set]
    rest = tuple(step for step in plan.steps if not isinstance(step, Launch))
    if len(rest) == len(plan.steps):
        return 0.0
    if not any(isinstance(step, Call) for step in rest):
        return 1.0
    if not _runs_on_anything(plan):
        return None
    return replace(artifact, plans={shape_set: replace(plan, steps=rest, graph=False)})


def _runs_on_anything(plan: Plan) -> bool:
    """Whether no call fails, whatever the memory holds that kernels write to."""
    roots = alias_roots(plan)
    allocated = {step.out for step in plan.steps if isinstance(step, Alloc)}
    made: set[int] = set()
    for step in plan.steps:
        used = {roots[value] for value in uses(step)}
        if isinstance(step, Launch):
            made |= used & allocated
        elif isinstance(step, Call) and used & made:
            if not _takes_anything(step.target):
                return False
            made.update(roots[out] for out in step.outs)
    return True


def _takes_anything(target: str) -> bool:
    overload = resolve(target)
    name = target.removeprefix("aten.")
    if torch.Tag.nondeterministic_seeded in overload.tags or name.startswith(_DIVIDES_INTEGERS):
        return False
    aliases = [result.alias_info for result in overload._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in aliases)
    return view or torch.Tag.pointwise in overload.tags or name.split(".")[0] in _TAKES_ANYTHING
