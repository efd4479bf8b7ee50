"""The compile signature of a task at GPU sizes, found without a GPU and without the memory it would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ke_gym.errors import UserError
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.zygote import Zygote
from ke_gym.languages.base import Signature, digest
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks.task import Task

STATE_BYTES = 256 << 20
"""Parameters of at most this size are drawn, so that a ``ModelNew`` may hold them under other names."""
_SECONDS = 120.0


def signature(task: Task, shape_sets: Sequence[str]) -> Signature:
    """``Signature.of`` from fake tensors; for a task that reads their contents, from real ones on the CPU."""
    # A copy: what a task finds out about itself under fake tensors must not be kept.
    fresh = Task.from_bytes(task.to_bytes())
    try:
        return _of_fakes(fresh, shape_sets)
    except (UserError, RuntimeError):
        return Signature.of(task, shape_sets, "cuda")


def _of_fakes(task: Task, shape_sets: Sequence[str]) -> Signature:
    inputs: dict[str, tuple[Any, ...]] = {}
    outputs, state, digests, initial = {}, {}, {}, {}
    for name in shape_sets:
        with FakeTensorMode(allow_non_fake_inputs=True):
            drawn = task.inputs(name, seed=0, device="fake")
            reference = task.reference(name, seed=0, device="fake")
            inputs[name] = tuple(TensorSpec.of(v) if isinstance(v, Tensor) else v for v in drawn)
            outputs[name] = tuple(TensorSpec.of(tensor) for tensor in reference(*drawn))
            state[name] = {key: TensorSpec.of(tensor) for key, tensor in reference.state.items()}
        small = sum(spec.storage_bytes for spec in state[name].values()) <= STATE_BYTES
        real = Task.from_bytes(task.to_bytes()).reference(name, seed=0).state if small else {}
        digests[name] = {key: digest(tensor) for key, tensor in real.items()}
        initial[name] = tuple(task.init_inputs(name))
    hidden = tuple(name for name in task.hidden_shapes() if name in inputs and name != next(iter(inputs)))
    return Signature(task.name, inputs, outputs, state, digests, initial, hidden=hidden)


def found(zygote: Zygote, task: Task, shape_sets: Sequence[str]) -> bytes:
    """The signature as ``Builder.build`` takes it, found in a process of its own."""
    with zygote.spawn("ke_gym.evaluation.gpu_signature:serve", {"shape_sets": list(shape_sets)}) as worker:
        worker.channel.send({}, task.to_bytes())
        try:
            header, blob = worker.channel.recv(_SECONDS)
        except (EOFError, TimeoutError) as error:
            raise UserError(
                f"task {task.name}: its shapes cannot be found out: {worker.log(600).strip()}"
            ) from error
    if "user_error" in header:
        raise UserError(header["user_error"])
    return blob


def serve(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of a trusted worker."""
    _, blob = channel.recv(timeout=30.0)
    torch.set_grad_enabled(True)
    try:
        channel.send({}, signature(Task.from_bytes(blob), args["shape_sets"]).to_bytes())
    except UserError as error:
        channel.send({"user_error": str(error)})
