"""`Artifact`: what building a kernel module gives; binaries and data, no Python."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ke_gym.languages.allow import draws, refusal
from ke_gym.languages.declarations import POINTEES
from ke_gym.languages.launch import fits
from ke_gym.languages.plan import DTYPES, Call, Launch, Plan, Ref, Scratch, TensorMap, TensorSpec, strict_json

ARTIFACT_VERSION = 2
LIMIT_BYTES = 256 << 20
_HEADER_BYTES = 32 << 20
_MAGIC = b"KEGYM\0"


@dataclass(frozen=True)
class Artifact:
    """``lane`` "plan": ``plans`` per shape set call ``binaries`` and take ``constants``.

    Binaries are shared libraries for the CPU, where ``arch`` is "", or cubins for the GPUs that ``arch`` names
    ("sm_90a"; ``report["kernels"]`` says what each kernel takes of one).
    ``lane`` "host": the module's Python could not be traced (``report["host_reason"]``); only ``source`` and
    the binaries are there. ``report`` is JSON-able: compilers, flags, warnings, vectorization.
    """

    language: str
    lane: Literal["plan", "host"]
    source: str
    binaries: Mapping[str, bytes] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    general: bool = False
    """Whether the module claims shapes it was not traced for."""
    arch: str = ""

    @cached_property
    def binary_id(self) -> str:
        """16 hex digits, equal for artifacts that compute the same way: binaries, plans and constants."""
        names = {name: _digest(binary) for name, binary in self.binaries.items()}
        parts = [
            self.language,
            self.lane,
            self.source if self.lane == "host" else "",
            repr(sorted(names.values())),
        ]
        for shape_set, plan in sorted(self.plans.items()):
            parts += [shape_set, _nameless(plan, names).to_json()]
        parts += [f"{name} {_digest(span_bytes(tensor))}" for name, tensor in sorted(self.constants.items())]
        return _digest("\0".join(parts).encode())

    def to_bytes(self) -> bytes:
        """A JSON header and blobs; see ``from_bytes``."""
        constants = {
            name: (TensorSpec.of(tensor), span_bytes(tensor)) for name, tensor in self.constants.items()
        }
        blobs = [*self.binaries.values(), *(blob for _, blob in constants.values())]
        header = {
            "version": ARTIFACT_VERSION,
            "language": self.language,
            "lane": self.lane,
            "source": self.source,
            "general": self.general,
            "arch": self.arch,
            "binaries": [[name, len(binary)] for name, binary in self.binaries.items()],
            "plans": {name: plan.to_json() for name, plan in self.plans.items()},
            "constants": [
                [name, list(spec.shape), list(spec.stride), spec.dtype, len(blob)]
                for name, (spec, blob) in constants.items()
            ],
            "report": dict(self.report),
        }
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        return b"".join([_MAGIC, len(text).to_bytes(8, "little"), text, *blobs])

    @classmethod
    def from_bytes(cls, data: bytes) -> Artifact:
        """Parse and validate; raises ``ValueError`` on anything odd. Nothing in the bytes is run."""
        start = len(_MAGIC) + 8
        if len(data) > LIMIT_BYTES or len(data) < start or data[: len(_MAGIC)] != _MAGIC:
            raise ValueError("not an artifact")
        length = int.from_bytes(data[len(_MAGIC) : start], "little")
        if length > min(_HEADER_BYTES, len(data) - start):
            raise ValueError("an artifact's header is cut off or too long")
        try:
            header = strict_json(data[start : start + length].decode())
            return _decode(header, data, start + length)
        except (
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            OverflowError,
            RuntimeError,
            RecursionError,
        ) as error:
            raise ValueError(f"not an artifact: {error!r}") from error


def _decode(header: dict[str, Any], data: bytes, position: int) -> Artifact:
    if header["version"] != ARTIFACT_VERSION:
        raise ValueError(f"artifact version {header['version']!r}, this is version {ARTIFACT_VERSION}")
    if header["lane"] not in ("plan", "host") or type(header["general"]) is not bool:
        raise ValueError(f"unknown lane {header['lane']!r}")
    sizes = [size for _, size in header["binaries"]] + [entry[4] for entry in header["constants"]]
    if any(type(size) is not int or size < 0 for size in sizes) or position + sum(sizes) != len(data):
        raise ValueError("an artifact's blobs do not fill it")
    binaries: dict[str, bytes] = {}
    for name, size in header["binaries"]:
        binaries[_text(name)] = data[position : position + size]
        position += size
    constants: dict[str, Tensor] = {}
    for name, shape, stride, dtype, size in header["constants"]:
        constants[_text(name)] = _tensor(shape, stride, dtype, data[position : position + size])
        position += size
    plans = {_text(name): Plan.from_json(_text(text)) for name, text in header["plans"].items()}
    for plan in plans.values():
        _check(plan, binaries, constants)
    report = header["report"]
    if not isinstance(report, dict):
        raise ValueError("an artifact's report is an object")
    return Artifact(
        _text(header["language"]),
        header["lane"],
        _text(header["source"]),
        binaries,
        plans,
        constants,
        report,
        header["general"],
        _text(header["arch"]),
    )


def _check(plan: Plan, binaries: Mapping[str, bytes], constants: Mapping[str, Tensor]) -> None:
    """Whether the executor can take the plan: known binaries, allowed operators, arguments that fit."""
    if (made := plan.preparation) is not None:
        _check(made, binaries, constants)
        drawing = (s.target for s in made.steps if isinstance(s, Call) and draws(s.target))
        if (target := next(drawing, None)) is not None:
            raise ValueError(f"a preparation draws random numbers ({target}), which every call does anew")
    for source in plan.inputs:
        constant = constants.get(source.name)
        if source.source == "constant" and (constant is None or TensorSpec.of(constant) != source.spec):
            raise ValueError(f"a plan names constant {source.name!r}, which the artifact has not")
    for step in plan.steps:
        if isinstance(step, Call) and (why := refusal(step.target)):
            raise ValueError(why)
        if isinstance(step, Launch):
            for launch in (step, *step.alternatives):
                _check_launch(launch, binaries)


def _check_launch(step: Launch, binaries: Mapping[str, bytes]) -> None:
    if step.binary not in binaries:
        raise ValueError(f"a plan launches from {step.binary!r}, which the artifact has not")
    for ctype, value in zip(step.ctypes, step.args):
        known = ctype.removeprefix("const ").removesuffix("*") in POINTEES
        if isinstance(value, Ref):
            right = ctype.endswith("*") and (known or step.geometry is not None)
        elif step.geometry is not None and (value is None or isinstance(value, (Scratch, TensorMap))):
            right = ctype == "CUtensorMap" if isinstance(value, TensorMap) else ctype.endswith("*")
        else:
            right = fits(ctype, value)
        if not right:
            raise ValueError(f"kernel {step.kernel!r} cannot take {value!r} as {ctype}")


def _nameless(plan: Plan, names: Mapping[str, str]) -> Plan:
    """The plan with its binaries' contents for their names."""
    made = _nameless(plan.preparation, names) if plan.preparation is not None else None
    steps = (_renamed(step, names) if isinstance(step, Launch) else step for step in plan.steps)
    return replace(plan, steps=tuple(steps), preparation=made)


def _renamed(step: Launch, names: Mapping[str, str]) -> Launch:
    others = tuple(_renamed(other, names) for other in step.alternatives)
    return replace(step, binary=names[step.binary], alternatives=others)


def _tensor(shape: Any, stride: Any, dtype: Any, blob: bytes) -> Tensor:
    numbers = [*shape, *stride]
    if dtype not in DTYPES or len(shape) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("an artifact's constant is no tensor")
    spec = TensorSpec(tuple(shape), tuple(stride), dtype)
    if spec.storage_bytes != len(blob) or math.prod(shape) > LIMIT_BYTES:
        raise ValueError("an artifact's constant has the wrong size")
    flat = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.empty(0, dtype=torch.uint8)
    return flat.view(spec.torch_dtype).as_strided(spec.shape, spec.stride)


def span_bytes(tensor: Tensor) -> bytes:
    """The memory from the tensor's first to its last element."""
    spec = TensorSpec.of(tensor)
    flat = tensor.detach().as_strided((spec.storage_bytes // spec.torch_dtype.itemsize,), (1,))
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
