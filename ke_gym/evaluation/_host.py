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
        use_binaries(artifact)
        specs = Signature.from_bytes(signature)
        forward = instantiate(artifact.source, specs, args["shape_set"], inputs, state, torch.device("cpu"))
    except Exception as error:
        channel.send({"error": f"{type(error).__name__}: {error}"})
        return
    channel.send({})

    def run() -> None:
        for tensor, output in zip(answers(forward(), outputs), outputs):
            output.copy_(tensor)

    serve_commands(channel, run, run, lambda: _profile(run))


def use_binaries(artifact: Artifact) -> None:
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


def instantiate(
    source: str,
    signature: Signature,
    shape_set: str,
    tensors: Sequence[torch.Tensor],
    state: dict[str, torch.Tensor],
    device: torch.device,
) -> Callable[[], Any]:
    """``forward`` bound to its inputs and state; a ``ModelNew`` gets the state where it stands for it, and whatever else it
    holds goes to ``device``."""
    given = iter(tensors)
    inputs = [next(given) if isinstance(v, TensorSpec) else v for v in signature.inputs[shape_set]]
    specs = signature.state[shape_set]
    loaded = module.load(source)
    model = module.construct(loaded, signature.init_inputs[shape_set], signature.seed)
    if model is not None:
        for name, tensor in module._bindings(model, specs, signature.digests[shape_set]):
            tensor.data = state[name]
        model.to(device)
        return lambda: model(*inputs)
    held = {name: state[name] for name in module.named(loaded, len(inputs), specs)}
    return lambda: loaded.forward(*inputs, **held)


def answers(result: Any, wanted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that ``forward`` returned: as many as ``wanted`` and like them, none lazy. Raises ``ValueError`` and
    ``TypeError``."""
    tensors = tree_leaves(result)
    if len(tensors) != len(wanted):
        raise ValueError(f"forward returned {len(tensors)} tensors, the reference returns {len(wanted)}")
    for index, (tensor, want) in enumerate(zip(tensors, wanted)):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"output {index} is a {type(tensor).__name__}, not a torch.Tensor")
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            got, expected = TensorSpec.of(tensor), TensorSpec.of(want)
            raise ValueError(
                f"output {index} is {got.dtype} {got.shape}, expected {expected.dtype} {expected.shape}"
            )
        if tensor.device != want.device:
            raise ValueError(f"output {index} is on {tensor.device}, expected {want.device}")
    return tensors


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
