"""Languages, what a compile sandbox may know of a task, and `build`: kernel module → artifact."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ke_gym.errors import UserError
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.errors import BuildError
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks.task import Task

__all__ = ["BuildError", "BuildOptions", "Language", "Signature", "build", "get_language", "languages"]


@dataclass(frozen=True)
class Signature:
    """What the compile sandbox may know of a task: shapes and dtypes, never the contents of inputs.

    Every mapping is by shape set. ``inputs`` holds a spec per tensor and plain values as they are; ``state``
    the specs of the reference's parameters and buffers, ``digests`` hashes of their contents under ``seed``,
    so that what a ``ModelNew`` built from ``init_inputs`` under that seed holds can be recognized. The
    ``hidden`` shape sets are traced only for modules that claim to be general.
    """

    task: str
    inputs: Mapping[str, tuple[Any, ...]]
    outputs: Mapping[str, tuple[TensorSpec, ...]]
    state: Mapping[str, Mapping[str, TensorSpec]]
    digests: Mapping[str, Mapping[str, str]]
    init_inputs: Mapping[str, tuple[Any, ...]]
    seed: int = 0
    hidden: tuple[str, ...] = ()

    @property
    def shape_sets(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @classmethod
    def of(cls, task: Task, shape_sets: Sequence[str] | None = None, target: str = "cpu") -> Signature:
        """The signature of a task for some shape sets (default: the public ones); runs its reference."""
        inputs, outputs, state, digests, initial = {}, {}, {}, {}, {}
        for name in task.public_shapes(target) if shape_sets is None else shape_sets:
            drawn = task.inputs(name, seed=0)
            reference = task.reference(name, seed=0)
            inputs[name] = tuple(TensorSpec.of(v) if isinstance(v, Tensor) else v for v in drawn)
            outputs[name] = tuple(TensorSpec.of(tensor) for tensor in reference(*drawn))
            state[name] = {key: TensorSpec.of(tensor) for key, tensor in reference.state.items()}
            digests[name] = {key: digest(tensor) for key, tensor in reference.state.items()}
            initial[name] = tuple(task.init_inputs(name))
        hidden = tuple(name for name in task.hidden_shapes() if name in inputs and name != next(iter(inputs)))
        return cls(task.name, inputs, outputs, state, digests, initial, hidden=hidden)

    def to_bytes(self) -> bytes:
        """For the compile sandbox: from trusted to untrusted, never back (``from_bytes`` unpickles)."""
        buffer = io.BytesIO()
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Signature:
        """The signature that ``to_bytes`` packed."""
        return cls(**torch.load(io.BytesIO(data), weights_only=False))


def digest(tensor: Tensor) -> str:
    """A hash of shape, dtype and contents."""
    plain = tensor.detach().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tuple(plain.shape)} {plain.dtype}".encode() + content).hexdigest()


@dataclass(frozen=True)
class BuildOptions:
    """``target`` the artifact is for; ``seconds`` the compiler may take for one source.

    For a GPU: ``arch`` ("" takes the default one), and how many ``multiprocessors`` the device has, which
    grids may depend on (0: as many as the largest product).
    """

    target: str = "cpu"
    seconds: float = 60.0
    arch: str = ""
    multiprocessors: int = 0


class Language(Protocol):
    """How a kernel module becomes an artifact. Plug-ins: entry-point group ``ke_gym.languages``."""

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    def build(self, source: str, signature: Signature, options: BuildOptions) -> Artifact:
        """Runs the module's Python: only ever called inside the compile sandbox. Raises ``BuildError``."""
        ...


@cache
def languages() -> dict[str, Language]:
    """The languages at hand, by name: the built-in ones and those of installed plug-ins."""
    from ke_gym.languages.cuda import Cuda
    from ke_gym.languages.module import Cpp
    from ke_gym.languages.triton import Triton

    found: dict[str, Language] = {"cpp": Cpp(), "triton": Triton(), "cuda": Cuda()}
    for entry in entry_points(group="ke_gym.languages"):
        found[entry.name] = cast(Language, entry.load()())
    return found


def get_language(name: str) -> Language:
    """The language of that name. Raises ``UserError`` with the nearest name."""
    known = languages()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
        raise UserError(f"unknown language {name!r}; {hint}")
    return known[name]


def build(
    source: str, signature: Signature, language: str = "cpp", options: BuildOptions | None = None
) -> Artifact:
    """Trace and compile a kernel module for every shape set of the signature.

    Runs the module's Python, so it is only ever called inside the compile sandbox. Raises ``BuildError``
    whose ``outcome`` is "compile" (its Python or its kernels do not run or compile), "constraints" (it does
    what a module must not) or "correctness" (outputs missing, or of the wrong shape or dtype).
    """
    return get_language(language).build(source, signature, options or BuildOptions())
