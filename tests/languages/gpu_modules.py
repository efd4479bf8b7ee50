"""Building kernel modules for a GPU that is not there."""

from __future__ import annotations

from typing import Any

from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildOptions, Signature, build
from ke_gym.languages.plan import Launch, TensorSpec

VECTOR = TensorSpec((4096,), (1,), "float32")


def signature(
    inputs: tuple[Any, ...], outputs: tuple[TensorSpec, ...], state: dict[str, TensorSpec] | None = None
) -> Signature:
    empty: dict[str, Any] = {"default": {}}
    given = {"default": state or {}}
    return Signature("task", {"default": inputs}, {"default": outputs}, given, empty, {"default": ()})


def built(
    source: str,
    language: str = "triton",
    inputs: tuple[Any, ...] = (VECTOR, VECTOR),
    outputs: tuple[TensorSpec, ...] = (VECTOR,),
    state: dict[str, TensorSpec] | None = None,
    **options: Any,
) -> Artifact:
    """The artifact, after a round trip through its bytes."""
    artifact = build(source, signature(inputs, outputs, state), language, BuildOptions("cuda", **options))
    return Artifact.from_bytes(artifact.to_bytes())


def launches(artifact: Artifact) -> list[Launch]:
    return [step for step in artifact.plans["default"].steps if isinstance(step, Launch)]
