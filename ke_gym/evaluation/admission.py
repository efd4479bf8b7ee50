"""What an artifact must be before anything is allocated for it: it comes from a sandbox that ran foreign Python.

`Artifact.from_bytes` proves the form; this proves that it is an answer to what was asked, of a size that the
task can explain. Whatever the compile sandbox said about this itself is worth nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError
from ke_gym.languages.module import runtime
from ke_gym.languages.plan import Alloc, Plan, TensorSpec

STEPS = 10_000
WORKSPACE = 1 << 30
WORKSPACE_TIMES = 32
"""Intermediates may take ``WORKSPACE`` bytes, or this many times the inputs and outputs."""
PADDING_TIMES = 4
"""An output may lie in memory this many times its own size (rows of a padded buffer, for one)."""


def admit(
    artifact: Artifact,
    source: str,
    language: str,
    shapes: Mapping[str, tuple[Sequence[TensorSpec], Sequence[TensorSpec]]],
    training: bool = False,
) -> None:
    """Raise ``BuildError`` unless ``artifact`` can be the one of ``source``.

    ``shapes``: per shape set the specs of what the task gives (inputs and state) and of what it wants back.
    ``training``: weights are others in every call, so nothing can be prepared.
    """
    if artifact.source != source or artifact.language != language:
        raise BuildError("constraints", "the build reports another source than the one it was given")
    if problem := _report_problem(artifact.report):
        raise BuildError("constraints", f"the build's report is malformed: {problem}")
    if artifact.lane == "host":
        built_for = artifact.report.get("built_for", runtime())
        if built_for != runtime():
            raise BuildError(
                "constraints",
                f"forward cannot be traced, and its extensions were built for {built_for}, here is {runtime()}: build it "
                "where it runs",
            )
        return
    if missing := [name for name in shapes if name not in artifact.plans]:
        raise BuildError("constraints", f"the build gave no plan for {len(missing)} of the task's shape sets")
    for name, (given, wanted) in shapes.items():
        _admit_plan(artifact.plans[name], given, wanted)
        if training and artifact.plans[name].preparation is not None:
            raise BuildError(
                "constraints", "gradients are asked for: weights change, and nothing is prepared"
            )


def _admit_plan(plan: Plan, given: Sequence[TensorSpec], wanted: Sequence[TensorSpec]) -> None:
    if len(plan.return_specs) != len(wanted):
        raise BuildError(
            "correctness", f"the plan returns {len(plan.return_specs)} tensors, the task {len(wanted)}"
        )
    for index, (got, want) in enumerate(zip(plan.return_specs, wanted)):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise BuildError(
                "correctness",
                f"output {index} is {got.dtype} {list(got.shape)}, the reference gives {want.dtype} "
                f"{list(want.shape)}",
            )
        if got.storage_bytes > PADDING_TIMES * _dense_bytes(want) + 4096:
            raise BuildError("constraints", f"output {index} is spread over {got.storage_bytes} bytes")
    parts = [plan] if plan.preparation is None else [plan, plan.preparation]
    if (steps := sum(len(part.steps) for part in parts)) > STEPS:
        raise BuildError("constraints", f"the plan has {steps} steps; {STEPS} are allowed")
    workspace = sum(step.spec.storage_bytes for p in parts for step in p.steps if isinstance(step, Alloc))
    workspace += sum(part.scratch_bytes for part in parts)
    workspace += sum(spec.storage_bytes for spec in parts[-1].return_specs if len(parts) > 1)
    allowed = max(WORKSPACE, WORKSPACE_TIMES * sum(spec.storage_bytes for spec in (*given, *wanted)))
    if workspace > allowed:
        raise BuildError(
            "constraints", f"the plan allocates {workspace} bytes; {allowed} are allowed for this task"
        )


def _dense_bytes(spec: TensorSpec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count * spec.torch_dtype.itemsize


def _report_problem(report: Mapping[str, Any]) -> str:
    """What in a build's report is not of the type that readers rely on."""
    remarks, warnings = report.get("vectorization", []), report.get("warnings", [])
    if not isinstance(warnings, list) or not all(isinstance(text, str) for text in warnings):
        return "warnings"
    if not isinstance(remarks, list) or not all(_is_remark(remark) for remark in remarks):
        return "vectorization"
    return ""


def _is_remark(remark: Any) -> bool:
    return (
        isinstance(remark, dict)
        and type(remark.get("line")) is int
        and type(remark.get("width")) is int
        and isinstance(remark.get("message"), str)
    )
