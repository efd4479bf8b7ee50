"""``Kernel``: a proven artifact in place of the reference it was proven against."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ke_gym.errors import UserError
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import TensorSpec
from ke_gym.targets.executor import PlanRunner, matches
from ke_gym.tasks import Reference, Task

ALIGNMENT = 16
"""What kernels for a GPU rely on at the beginning of a tensor: Triton's and TMA's unit."""


class Kernel:
    """Call it like the reference: it runs the artifact's plan where that was proven, else the reference.

    Proven means: shapes, strides and dtypes of a public shape set and of the parameters, the same plain (non-tensor)
    arguments, the training mode of the evaluation, a forward that writes to no buffer, no autocast, and no gradient asked
    of it. ``why_not(*inputs)`` says what stands in the
    way, ``fallbacks`` counts the reasons met so far. Parameters are read at every call, so the kernel follows
    a module whose weights change; what it has prepared from them is made anew where torch has counted a change
    (writes through ``.data`` are not counted: call ``forget()``). Thread-safe. For a GPU, module and inputs are
    expected there; results are enqueued on the current stream, as torch's own are.

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
        self._artifact = artifact
        self._target = "cpu" if target == "cpu" else "cuda"
        self._shape_sets: dict[tuple[Any, ...], str] = {}
        self._runners: dict[tuple[tuple[Any, ...], torch.device], PlanRunner] = {}
        self._prepared: dict[tuple[tuple[Any, ...], torch.device], Edition | None] = {}
        self._structures: dict[tuple[Any, ...], tuple[list[bool], pytree.TreeSpec]] = {}
        self._backward = task.backward
        self._training = reference.module.training
        self._writes = False
        self._unproven = "no kernel was proven"
        if artifact is None:
            return
        if artifact.lane != "plan":
            self._unproven = "the kernel's Python could not be traced, so there is no plan to run"
            return
        self._unproven = "other shapes, strides, dtypes or plain arguments than the kernel was proven for"
        for shape_set in set(artifact.plans).difference(task.hidden_shapes()):
            self._shape_sets[_signature(_shapes(task, shape_set))] = shape_set

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
                before = [buffer.clone() for buffer in self.reference.module.buffers()]
                with torch.no_grad():
                    shown = self._plain(inputs)
                leaves, tree = pytree.tree_flatten(shown)
                self._structures[key] = [leaf is not None for leaf in leaves], tree
                self._writes = not all(
                    torch.equal(one, other) for one, other in zip(before, self.reference.module.buffers())
                )
                if self._writes:
                    return shown
            results = iter(self._run(key, inputs))
        present, tree = self._structures[key]
        return pytree.tree_unflatten([next(results) if there else None for there in present], tree)

    def _run(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        state = {name: tensor.detach() for name, tensor in zip(self.reference.state, self._state())}
        place = next((tensor.device for tensor in (*tensors, *state.values())), torch.device(self._target))
        runner = self._runners.get((key, place))
        if runner is not None:
            runner.bind(tensors, state)
        else:
            assert self._artifact is not None
            runner = _runner(self._artifact, self._shape_sets[key], tensors, state, place)
            self._runners[key, place] = runner
        if runner.plan.preparation is not None:
            weights = _edition(self._state())
            if weights is None or self._prepared.get((key, place)) != weights:
                runner.prepare()
                self._prepared[key, place] = weights
        return runner.run()

    def forget(self) -> None:
        """Prepare anew in the next call."""
        with self._lock:
            self._prepared.clear()

    def why_not(self, *inputs: Any) -> str | None:
        """Why these inputs would run the reference, or None if they would run the kernel."""
        key = _signature(inputs)
        if key not in self._shape_sets:
            return self._unproven
        if self.reference.module.training != self._training:
            return "the module's training mode has changed"
        state = self._state()
        if len(state) != len(self.reference.state):
            return "the module has other parameters now"
        tensors = [*(x for x in inputs if isinstance(x, torch.Tensor)), *state]
        if any(tensor.device.type != self._target for tensor in tensors):
            return "a tensor is on another device"
        if any(tensor.is_conj() or tensor.is_neg() for tensor in tensors):
            return "a tensor is a view that torch has yet to conjugate or negate"
        if not self._laid_out(key, state):
            return "a parameter has another shape, stride or dtype than the kernel was proven for"
        if torch.is_autocast_enabled(self._target):
            return "autocast is on, under which the reference computes in another precision"
        if self._writes:
            return "the module's forward writes to its buffers, which the kernel does not"
        if len({tensor.device for tensor in tensors}) > 1:
            return "the tensors are on several devices"
        if self._target != "cpu" and any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
            return f"a tensor does not begin at a multiple of {ALIGNMENT} bytes"
        if torch.is_grad_enabled() and not self._backward and any(t.requires_grad for t in tensors):
            return "a gradient may be needed (call it under torch.no_grad() if not)"
        return None

    def _laid_out(self, key: tuple[Any, ...], state: Sequence[torch.Tensor]) -> bool:
        """Whether the module's state is what the plan for these inputs takes."""
        assert self._artifact is not None
        plan = self._artifact.plans[self._shape_sets[key]]
        named = dict(zip(self.reference.state, state))
        entries = [*plan.inputs, *(plan.preparation.inputs if plan.preparation else ())]
        return all(matches(named[e.name], e.spec) for e in entries if e.source == "state" and e.name in named)

    def _state(self) -> list[torch.Tensor]:
        """Parameters, then buffers, as they are now: in the order of ``reference.state``."""
        module = self.reference.module
        return [*module.parameters(), *module.buffers()]

    def _plain(self, inputs: Sequence[Any]) -> Any:
        return self.reference(*inputs) if self._backward else self.reference.module(*inputs)


Edition = tuple[tuple[int, int], ...]
"""Of every weight, where it lies and how often torch has written to it."""


def _edition(weights: Sequence[torch.Tensor]) -> Edition | None:
    """None where torch does not count."""
    if any(weight.is_inference() for weight in weights):
        return None
    return tuple((weight.data_ptr(), weight._version) for weight in weights)


def _shapes(task: Task, shape_set: str) -> list[Any]:
    """Inputs of the shapes of a shape set: of fake tensors where the task can be drawn without memory."""
    if task.payload:
        return task.inputs(shape_set)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return Task.from_bytes(task.to_bytes()).inputs(shape_set, device="fake")
    except (UserError, RuntimeError):
        return task.inputs(shape_set)


def _runner(
    artifact: Artifact,
    shape_set: str,
    inputs: Sequence[torch.Tensor],
    state: dict[str, torch.Tensor],
    place: torch.device,
) -> PlanRunner:
    if place.type == "cpu":
        return PlanRunner(artifact, shape_set, inputs, state)
    from ke_gym.targets.cuda_driver import Driver
    from ke_gym.targets.cuda_executor import CudaRunner

    return CudaRunner(artifact, shape_set, inputs, state, driver=Driver(), device=place)


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
