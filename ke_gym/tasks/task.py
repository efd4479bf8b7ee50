"""`Task`: a PyTorch reference to be made faster, with everything an evaluation must know about it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import cloudpickle
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ke_gym.errors import UserError
from ke_gym.tasks import live
from ke_gym.tasks.inputs import drawing, seeded
from ke_gym.tasks.reference import Reference, check_dtypes, plain_tensors
from ke_gym.tasks.source import blame, execute, line_of, nearest

__all__ = ["Precision", "Reference", "Task"]

Precision = Literal["strict", "tf32", "bf16"]
"""How far below the dtype of the data a kernel may compute: not at all, TF32 products, bfloat16 products."""

DEFAULT = "default"
"""The shape set of the file as it stands."""


@dataclass(frozen=True)
class Task:
    """A reference as a KernelBench-format file (`Model`, `get_inputs`, `get_init_inputs`) or a live module.

    Optional module-level attributes of a task file: `family`, `precision` ("strict", "tf32", "bf16"),
    `tolerance` (relative, overrides the calibrated one), `backward`, and `shapes`: shape set -> the globals
    it overrides. They are overridden after the file has run, so sizes that `Model` and `get_inputs` use must
    not be computed from them at module level.
    """

    name: str
    source: str
    path: str
    family: str = "user"
    description: str = ""
    precision: Precision = "strict"
    tolerance: float | None = None
    backward: bool = False
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    payload: bytes = field(default=b"", repr=False)

    @staticmethod
    def load(spec: str | Path) -> Task:
        """The one task that a suite name or a file names. Raises `UserError` with the nearest names."""
        from ke_gym.tasks.loader import resolve

        found = resolve(spec)
        if len(found) != 1:
            raise UserError(f"{spec} names {len(found)} tasks ({found[0].name}, …); choose one of them")
        return found[0]

    @classmethod
    def from_file(cls, path: str | Path) -> Task:
        """Read one task file. Raises `UserError` naming file, line and reason if it is broken."""
        path = Path(path).absolute()
        try:
            source = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); give a readable Python file") from error
        module = execute(source, str(path), f"ke_gym_task_{_digest(source)}", {})
        return cls(name=path.stem, source=source, path=str(path), **_attributes(module, source, str(path)))

    @classmethod
    def from_module(cls, module: nn.Module, example_inputs: Any, name: str | None = None) -> Task:
        """A task from a live module: its weights and mode as they are, inputs like the example.

        `example_inputs` is a tensor or a sequence of the positional arguments. Floating tensors are redrawn
        with the example's shape, mean and standard deviation; everything else is kept as it is.
        """
        source, payload = live.pack(module, example_inputs)
        kind = type(module).__name__
        return cls(
            name=name or kind,
            source=source,
            path=f"<{kind}>",
            description=f"The live module {kind}",
            payload=payload,
        )

    @cached_property
    def id(self) -> str:
        """Hash of the content: source (or pickled module) and attributes, whatever the task is called."""
        attributes = [
            self.precision,
            self.tolerance,
            self.backward,
            {k: dict(v) for k, v in self.shapes.items()},
        ]
        content = json.dumps([self.source, attributes], sort_keys=True, default=repr).encode()
        return _digest(content + self.payload)

    def to_bytes(self) -> bytes:
        """For trusted processes only: what `from_bytes` unpickles runs."""
        return cast(bytes, cloudpickle.dumps({f.name: getattr(self, f.name) for f in fields(self)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Task:
        """The task that `to_bytes` packed."""
        return cls(**cloudpickle.loads(data))

    def contract(self, target: str = "cpu") -> str:
        """The shape set that is timed on a target: "cpu" on CPUs, "gpu" elsewhere; "default" if not given."""
        name = "cpu" if target == "cpu" else "gpu"
        return name if name in self.shapes else DEFAULT

    def public_shapes(self, target: str = "cpu") -> tuple[str, ...]:
        """Shape sets a kernel is told of and must be right on: the contract first, then the file's extras."""
        extras = (name for name in self.shapes if name not in ("cpu", "gpu") and not _is_hidden(name))
        return (self.contract(target), *extras)

    def hidden_shapes(self) -> tuple[str, ...]:
        """Shape sets tried on kernels that claim to be general: those whose names start with "ragged"."""
        return tuple(name for name in self.shapes if _is_hidden(name))

    def reference(self, shape_set: str = DEFAULT, seed: int = 0, device: str = "cpu") -> Reference:
        """The reference, built under `seed` as KernelBench does; a live module keeps its own parameters.

        On another `device` parameters and buffers are drawn there, and have other values than on the CPU; other tensors
        that the modules hold have the same, since kernels have them as constants.
        """
        if self.payload:
            module = live.unpack(self.payload)[0].to("cpu" if device == "fake" else device)
        else:
            program = self._program(shape_set)
            initial = self.init_inputs(shape_set, seed)
            place = contextlib.nullcontext() if device in ("cpu", "fake") else torch.device(device)
            with seeded(seed), place, blame(self.path, "building Model"):
                module = program.Model(*initial)
        if not isinstance(module, nn.Module):
            raise UserError(f"{self.path}: Model is not a torch.nn.Module; derive it from nn.Module")
        if device not in ("cpu", "fake") and not self.payload and (held := plain_tensors(module)):
            with torch.device("cpu"):  # where a judge has its GPU by default, too
                like = plain_tensors(self.reference(shape_set, seed).module)
            for (owner, name), (drawn, _) in zip(held, like, strict=True):
                owner[name] = drawn[name].to(owner[name].device)
        return Reference(module, self.path, self._arity(shape_set, device) if self.backward else None)

    def init_inputs(self, shape_set: str = DEFAULT, seed: int = 0) -> list[Any]:
        """What `Model` is built with: `get_init_inputs()` under `seed`, or nothing."""
        if self.payload:
            return []
        make = getattr(self._program(shape_set), "get_init_inputs", list)
        with seeded(seed), blame(self.path, "get_init_inputs"):
            return list(make())

    def inputs(
        self, shape_set: str = DEFAULT, seed: int = 0, distribution: str = "task", device: str = "cpu"
    ) -> list[Any]:
        """Fresh inputs, a function of (shape set, seed, distribution, kind of device): tensors, and plain values.

        `distribution` is one of `inputs.DISTRIBUTIONS`. With `backward`, the grad_outputs come last, normal.
        """
        gradients = self._grad_outputs(shape_set, device) if self.backward else []
        with drawing(seed, distribution, device) as draw, blame(self.path, "get_inputs"):
            drawn = self._draw(shape_set, device)
            fresh = (torch.empty(g.shape, dtype=g.dtype) for g in gradients)
            return drawn + [draw.fill(gradient, lambda d, values: d.normal(values)) for gradient in fresh]

    def _draw(self, shape_set: str, device: str = "cpu") -> list[Any]:
        drawn = self._drawn(shape_set, device)
        for index, value in enumerate(drawn):
            if not isinstance(value, Tensor) and any(
                isinstance(v, Tensor) for v in pytree.tree_leaves(value)
            ):
                raise UserError(
                    f"{self.path}: input {index} is a {type(value).__name__} that holds tensors; pass them as"
                    " inputs of their own"
                )
        check_dtypes(((f"input {index}", value) for index, value in enumerate(drawn)), self.path)
        return drawn

    def _drawn(self, shape_set: str, device: str) -> list[Any]:
        if self.payload:
            drawn = live.draw(self._recipe)
            if device in ("cpu", "fake"):
                return drawn
            return [value.to(device) if isinstance(value, Tensor) else value for value in drawn]
        drawn = self._program(shape_set).get_inputs()
        if isinstance(drawn, Mapping):
            raise UserError(
                f"{self.path}: get_inputs returns a {type(drawn).__name__}; return a list of the forward's"
                " positional arguments"
            )
        return [drawn] if isinstance(drawn, Tensor) else list(drawn)

    @cached_property
    def _recipe(self) -> Sequence[Any]:
        return live.unpack(self.payload)[1]

    def _program(self, shape_set: str) -> ModuleType:
        """The executed file under a shape set: a module each, since `Model` may read globals when called."""
        programs = self._programs
        if shape_set not in programs:
            if shape_set != DEFAULT and shape_set not in self.shapes:
                known = [DEFAULT, *self.shapes]
                raise UserError(f"task {self.name} has no shape set {shape_set!r}; it has {', '.join(known)}")
            programs[shape_set] = execute(
                self.source, self.path, f"ke_gym_task_{self.id}_{shape_set}", self.shapes.get(shape_set, {})
            )
        return programs[shape_set]

    @cached_property
    def _programs(self) -> dict[str, ModuleType]:
        return {}

    @cached_property
    def _gradients(self) -> dict[str, list[Tensor]]:
        return {}

    def _arity(self, shape_set: str, device: str) -> int:
        with drawing(0, device=device), blame(self.path, "get_inputs"):
            return len(self._draw(shape_set, device))

    def _grad_outputs(self, shape_set: str, device: str = "cpu") -> list[Tensor]:
        """Meta tensors like the differentiable outputs, found by one forward pass per shape set."""
        if shape_set not in self._gradients:
            with drawing(0, device=device), blame(self.path, "get_inputs"):
                drawn = self._draw(shape_set, device)
            outputs = self.reference(shape_set, device=device).differentiable(*drawn)
            self._gradients[shape_set] = [torch.empty_like(output, device="meta") for output in outputs]
        return self._gradients[shape_set]


def _is_hidden(shape_set: str) -> bool:
    return shape_set.startswith("ragged")


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _attributes(module: ModuleType, source: str, path: str) -> dict[str, Any]:
    """The optional attributes of a task file, checked."""

    def broken(name: str, problem: str) -> UserError:
        return UserError(f"{path}:{line_of(source, name)}: {problem}")

    for name in ("Model", "get_inputs"):
        if not callable(getattr(module, name, None)):
            raise broken(
                name, f"no {name} found; a task file defines Model and get_inputs (KernelBench format)"
            )
    found = {name: getattr(module, name) for name in _CHECKS if hasattr(module, name)}
    for name, value in found.items():
        accepts, wanted = _CHECKS[name]
        if not accepts(value):
            raise broken(name, f"{name} = {value!r} is not {wanted}")
    for shape_set, overrides in found.get("shapes", {}).items():
        for name in overrides:
            if not hasattr(module, name):
                hint = nearest(name, [key for key in vars(module) if key.isupper()])
                raise broken(
                    "shapes", f"shape set {shape_set!r} sets {name}, which is no global of the file{hint}"
                )
    text = module.__doc__ or module.Model.__doc__ or ""
    if not isinstance(text, str):
        raise broken("__doc__", f"__doc__ = {text!r} is not a text")
    return {**found, "description": text.strip().split("\n")[0].rstrip(".")}


_CHECKS: dict[str, tuple[Any, str]] = {
    "family": (lambda v: isinstance(v, str) and v, "a name"),
    "precision": (lambda v: v in ("strict", "tf32", "bf16"), 'one of "strict", "tf32", "bf16"'),
    "tolerance": (
        lambda v: v is None or (isinstance(v, int | float) and 0 < v < 1),
        "a number between 0 and 1",
    ),
    "backward": (lambda v: isinstance(v, bool), "True or False"),
    "shapes": (
        lambda v: (
            isinstance(v, dict)
            and all(isinstance(k, str) and isinstance(w, dict) for k, w in v.items())
            and all(isinstance(name, str) for w in v.values() for name in w)
        ),
        'a dict like {"cpu": {"ROWS": 4096}}',
    ),
}
