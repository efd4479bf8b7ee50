"""``Kernel``: a proven artifact in place of the reference it was proven against."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import TensorSpec
from ke_gym.targets.executor import PlanRunner
from ke_gym.tasks import Reference, Task


class Kernel:
    """Call it like the reference: it runs the artifact's plan where that was proven, else the reference.

    Proven means: shapes, strides and dtypes of a public shape set, the same plain (non-tensor) arguments, the
    training mode of the evaluation, and no gradient asked of it. ``why_not(*inputs)`` says what stands in the
    way, ``fallbacks`` counts the reasons met so far. Parameters are read at every call, so the kernel follows
    a module whose weights change. Thread-safe.

    Args:
        task: what the artifact was proven against.
        reference: the reference to fall back to, whose parameters are used.
        artifact: None if nothing was proven: then every call runs the reference.
        target: the target whose shape sets were proven.
    """

    def __init__(
        self, task: Task, reference: Reference, artifact: Artifact | None, target: str = "cpu"
    ) -> None:
        self.reference = reference
        self.fallbacks: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._runners: dict[tuple[Any, ...], PlanRunner] = {}
        self._structures: dict[tuple[Any, ...], tuple[list[bool], pytree.TreeSpec]] = {}
        self._backward = task.backward
        self._training = reference.module.training
        self._unproven = "no kernel was proven"
        if artifact is None:
            return
        if artifact.lane != "plan":
            self._unproven = "the kernel's Python could not be traced, so there is no plan to run"
            return
        self._unproven = "other shapes, strides, dtypes or plain arguments than the kernel was proven for"
        for shape_set in task.public_shapes(target):
            inputs = task.inputs(shape_set)
            runner = PlanRunner(artifact, shape_set, inputs, reference.state)
            self._runners[_signature(inputs)] = runner

    def __call__(self, *inputs: Any) -> Any:
        """What the reference returns for ``inputs``."""
        reason = self.why_not(*inputs)
        if reason is not None:
            self.fallbacks[reason] += 1
            return self._plain(inputs)
        key = _signature(inputs)
        with self._lock:
            if key not in self._structures:
                # The plan returns a flat tuple: the reference shows once what to fold it into.
                with torch.no_grad():
                    leaves, tree = pytree.tree_flatten(self._plain(inputs))
                self._structures[key] = [leaf is not None for leaf in leaves], tree
            runner = self._runners[key]
            runner.bind(inputs, {n: t.detach() for n, t in zip(self.reference.state, self._state())})
            results = iter(runner.run())
        present, tree = self._structures[key]
        return pytree.tree_unflatten([next(results) if there else None for there in present], tree)

    def why_not(self, *inputs: Any) -> str | None:
        """Why these inputs would run the reference, or None if they would run the kernel."""
        if _signature(inputs) not in self._runners:
            return self._unproven
        if self.reference.module.training != self._training:
            return "the module's training mode has changed"
        state = self._state()
        if len(state) != len(self.reference.state):
            return "the module has other parameters now"
        tensors = [*(x for x in inputs if isinstance(x, torch.Tensor)), *state]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return "a tensor is on another device"
        if torch.is_grad_enabled() and not self._backward and any(t.requires_grad for t in tensors):
            return "a gradient may be needed (call it under torch.no_grad() if not)"
        return None

    def _state(self) -> list[torch.Tensor]:
        """Parameters, then buffers, as they are now: in the order of ``reference.state``."""
        module = self.reference.module
        return [*module.parameters(), *module.buffers()]

    def _plain(self, inputs: Sequence[Any]) -> Any:
        return self.reference(*inputs) if self._backward else self.reference.module(*inputs)


def _signature(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What a plan was proven for: equal for inputs that it treats alike."""
    parts: list[Any] = []
    for value in inputs:
        if isinstance(value, torch.Tensor):
            spec = TensorSpec.of(value)
            stride = tuple(s for n, s in zip(spec.shape, spec.stride) if n != 1)
            parts.append(("tensor", spec.shape, stride, spec.dtype))
        else:
            parts.append((type(value).__name__, repr(value)))
    return tuple(parts)
