"""The host lane inside its sandbox: a module's ``forward`` or ``ModelNew``, run for real."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ke_gym.evaluation.arms import OPEN_TIMEOUT, attach
from ke_gym.evaluation.arms import serve as serve_commands
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.shared import Layout
from ke_gym.languages import cpp, extensions, launch, module
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import Signature
from ke_gym.languages.plan import TensorSpec


def serve(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of a host arm."""
    torch.set_grad_enabled(False)
    buffers = attach(args, fds)
    _, blob = channel.recv(OPEN_TIMEOUT)
    _, signature = channel.recv(OPEN_TIMEOUT)
    layout = Layout.from_dict(args["layout"])
    inputs, state = layout.split(buffers[0])
    outputs = Layout.from_dict(args["outputs"]).views(buffers[1])
    try:
        artifact = Artifact.from_bytes(blob)
        _use_binaries(artifact)
        forward = _instantiate(
            artifact.source, Signature.from_bytes(signature), args["shape_set"], inputs, state
        )
    except Exception as error:
        channel.send({"error": f"{type(error).__name__}: {error}"})
        return
    channel.send({})

    def run() -> None:
        _store(forward(), outputs)

    serve_commands(channel, run, run, lambda: _profile(run))


def _use_binaries(artifact: Artifact) -> None:
    """Kernels were built in the compile sandbox; here there is no compiler."""
    folder = tempfile.mkdtemp()
    paths = {}
    for name, binary in artifact.binaries.items():
        path = Path(folder, f"{name}.so")
        path.write_bytes(binary)
        paths[name] = str(path)

    def cached(unit: cpp.Unit) -> str:
        if unit.name not in paths:
            raise launch.KernelError("these kernels were not there when the module was built")
        return paths[unit.name]

    cpp.cached = cached
    if extensions.mentioned(artifact.source):
        extensions.prebuilt(paths)


def _instantiate(
    source: str,
    signature: Signature,
    shape_set: str,
    tensors: Sequence[torch.Tensor],
    state: dict[str, torch.Tensor],
) -> Callable[[], Any]:
    """``forward`` bound to its inputs and state; a ``ModelNew`` gets the state where it stands for it."""
    given = iter(tensors)
    inputs = [next(given) if isinstance(v, TensorSpec) else v for v in signature.inputs[shape_set]]
    specs = signature.state[shape_set]
    loaded = module.load(source)
    model = module.construct(loaded, signature.init_inputs[shape_set], signature.seed)
    if model is not None:
        for name, tensor in module._bindings(model, specs, signature.digests[shape_set]):
            tensor.data = state[name]
        return lambda: model(*inputs)
    held = {name: state[name] for name in module.named(loaded, len(inputs), specs)}
    return lambda: loaded.forward(*inputs, **held)


def _store(result: Any, outputs: Sequence[torch.Tensor]) -> None:
    """Copy what ``forward`` returned to where it is read from; nothing lazy, nothing of the wrong shape."""
    tensors = tree_leaves(result)
    if len(tensors) != len(outputs):
        raise ValueError(f"forward returned {len(tensors)} tensors, the reference returns {len(outputs)}")
    for index, (tensor, output) in enumerate(zip(tensors, outputs)):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"output {index} is a {type(tensor).__name__}, not a torch.Tensor")
        if tensor.shape != output.shape or tensor.dtype != output.dtype:
            got, want = TensorSpec.of(tensor), TensorSpec.of(output)
            raise ValueError(f"output {index} is {got.dtype} {got.shape}, expected {want.dtype} {want.shape}")
        output.copy_(tensor)


def _profile(run: Callable[[], None]) -> list[tuple[str, str, float]]:
    """Seconds in each kernel, and in everything else."""
    spent: dict[str, float] = {}
    plain = launch.Library.call

    def call(library: launch.Library, kernel: Any, args: Any) -> None:
        start = time.perf_counter()
        plain(library, kernel, args)
        spent[kernel.name] = spent.get(kernel.name, 0.0) + time.perf_counter() - start

    launch.Library.call = call  # type: ignore[assignment,method-assign]
    start = time.perf_counter()
    try:
        run()
    finally:
        launch.Library.call = plain  # type: ignore[method-assign]
    rest = time.perf_counter() - start - sum(spent.values())
    return [*(("kernel", name, seconds) for name, seconds in spent.items()), ("host", "forward", rest)]
