"""Launch plans: what a kernel module does, as data.

A plan is the trace of ``forward`` on fake tensors: allocations, kernel launches, ATen calls and returns,
for one shape set. It holds no code, so a trusted executor can run it. Values are numbered; ``inputs`` take
the first numbers in order, every step defines further ones. (DESIGN section 4.)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

PLAN_VERSION = 1

DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """Shape (elements), stride (elements) and dtype (a key of ``DTYPES``) of one tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype).removeprefix("torch."))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def storage_bytes(self) -> int:
        """Bytes from the first to just past the last element."""
        if any(n == 0 for n in self.shape):
            return 0
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        return span * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Ref:
    """The value with this number."""

    value: int


# An argument is a Ref, a plain scalar (int, float, bool, str, None), a torch dtype/device/layout/memory
# format, or a tuple of arguments.
Arg = Any


@dataclass(frozen=True)
class PlanInput:
    """One tensor the caller provides.

    ``source`` says from where: the task's inputs (``name`` is the position), the reference's state (``name``
    is the mangled parameter name), or a constant the module computed when it was built (``name`` keys
    ``Artifact.constants``).
    """

    source: Literal["input", "state", "constant"]
    name: str
    spec: TensorSpec


@dataclass(frozen=True)
class Alloc:
    """Allocate an uninitialised tensor as value ``out``."""

    out: int
    spec: TensorSpec


@dataclass(frozen=True)
class Launch:
    """Call kernel ``kernel`` of binary ``binary``; ``args`` are Refs (data pointers) and scalars, in order.

    ``ctypes`` names each argument's C type, as declared (``"float*"``, ``"int64_t"``, ``"float"``).
    """

    binary: str
    kernel: str
    args: tuple[Arg, ...]
    ctypes: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """Call the ATen overload ``target`` (``"aten.mm.default"``); ``outs`` are the tensors it returns."""

    target: str
    args: tuple[Arg, ...]
    kwargs: dict[str, Arg]
    outs: tuple[int, ...]


Step = Alloc | Launch | Call


@dataclass(frozen=True)
class Plan:
    """Everything the executor needs to compute the returns from the inputs, for one shape set."""

    inputs: tuple[PlanInput, ...]
    steps: tuple[Step, ...]
    returns: tuple[int, ...]
    return_specs: tuple[TensorSpec, ...]
    version: int = PLAN_VERSION

    def to_json(self) -> str:
        return json.dumps(_encode_plan(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse and validate; raises ``ValueError`` on anything that is not a well-formed plan.

        The text may come from an untrusted process: nothing in it is evaluated.
        """
        try:
            return _decode_plan(json.loads(text))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a launch plan: {error!r}") from error


_ENUMS = (torch.device, torch.layout, torch.memory_format)


def _encode_arg(arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return {"ref": arg.value}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": repr(arg)}
    if arg is None or isinstance(arg, (bool, int, float, str)):
        return arg
    if isinstance(arg, torch.dtype):
        return {"dtype": str(arg).removeprefix("torch.")}
    if isinstance(arg, torch.device):
        return {"device": str(arg)}
    if isinstance(arg, (torch.layout, torch.memory_format)):
        return {"enum": str(arg).removeprefix("torch.")}
    if isinstance(arg, (list, tuple)):
        return [_encode_arg(a) for a in arg]
    raise ValueError(f"a plan cannot hold a {type(arg).__name__} argument")


_NAMED = {
    "strided": torch.strided,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def _decode_arg(data: Any) -> Arg:
    if isinstance(data, list):
        return tuple(_decode_arg(a) for a in data)
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "ref":
        return Ref(_index(value))
    if kind == "float":
        return float(value)
    if kind == "dtype":
        return getattr(torch, value) if value in ("complex64", "complex128") else DTYPES[value]
    if kind == "device":
        return torch.device(value)
    if kind == "enum":
        return _NAMED[value]
    raise ValueError(f"unknown argument kind {kind!r}")


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no value number")
    return value


def _encode_spec(spec: TensorSpec) -> list[Any]:
    return [list(spec.shape), list(spec.stride), spec.dtype]


def _decode_spec(data: list[Any]) -> TensorSpec:
    shape, stride, dtype = data
    if len(shape) != len(stride) or dtype not in DTYPES:
        raise ValueError(f"not a tensor: {data!r}")
    return TensorSpec(tuple(_index(n) for n in shape), tuple(_index(s) for s in stride), dtype)


def _encode_step(step: Step) -> dict[str, Any]:
    if isinstance(step, Alloc):
        return {"op": "alloc", "out": step.out, "spec": _encode_spec(step.spec)}
    if isinstance(step, Launch):
        return {
            "op": "launch",
            "binary": step.binary,
            "kernel": step.kernel,
            "args": _encode_arg(step.args),
            "ctypes": list(step.ctypes),
        }
    return {
        "op": "call",
        "target": step.target,
        "args": _encode_arg(step.args),
        "kwargs": {k: _encode_arg(v) for k, v in step.kwargs.items()},
        "outs": list(step.outs),
    }


def _decode_step(data: dict[str, Any]) -> Step:
    op = data["op"]
    if op == "alloc":
        return Alloc(_index(data["out"]), _decode_spec(data["spec"]))
    if op == "launch":
        args, types = _decode_arg(data["args"]), tuple(str(t) for t in data["ctypes"])
        if len(args) != len(types):
            raise ValueError(f"launch of {data['kernel']!r}: {len(args)} arguments, {len(types)} types")
        return Launch(str(data["binary"]), str(data["kernel"]), args, types)
    if op == "call":
        kwargs = {str(k): _decode_arg(v) for k, v in data["kwargs"].items()}
        outs = tuple(_index(o) for o in data["outs"])
        return Call(str(data["target"]), _decode_arg(data["args"]), kwargs, outs)
    raise ValueError(f"unknown step {op!r}")


def _encode_plan(plan: Plan) -> dict[str, Any]:
    return {
        "version": plan.version,
        "inputs": [[i.source, i.name, _encode_spec(i.spec)] for i in plan.inputs],
        "steps": [_encode_step(s) for s in plan.steps],
        "returns": list(plan.returns),
        "return_specs": [_encode_spec(s) for s in plan.return_specs],
    }


def _refs(arg: Arg) -> list[int]:
    if isinstance(arg, Ref):
        return [arg.value]
    if isinstance(arg, tuple):
        return [v for a in arg for v in _refs(a)]
    return []


def _decode_plan(data: dict[str, Any]) -> Plan:
    if data["version"] != PLAN_VERSION:
        raise ValueError(f"plan version {data['version']!r}, this is version {PLAN_VERSION}")
    inputs = []
    for source, name, spec in data["inputs"]:
        if source not in ("input", "state", "constant"):
            raise ValueError(f"unknown input source {source!r}")
        inputs.append(PlanInput(source, str(name), _decode_spec(spec)))
    steps = tuple(_decode_step(s) for s in data["steps"])
    returns = tuple(_index(r) for r in data["returns"])
    defined = set(range(len(inputs)))
    for step in steps:
        used: list[int] = []
        made: tuple[int, ...] = ()
        if isinstance(step, Alloc):
            made = (step.out,)
        elif isinstance(step, Launch):
            used = _refs(step.args)
        else:
            used, made = _refs(step.args) + _refs(tuple(step.kwargs.values())), step.outs
        if missing := set(used) - defined:
            raise ValueError(f"step {step!r} uses undefined values {sorted(missing)}")
        if again := set(made) & defined:
            raise ValueError(f"step {step!r} defines values {sorted(again)} again")
        defined |= set(made)
    if missing := set(returns) - defined:
        raise ValueError(f"the plan returns undefined values {sorted(missing)}")
    return_specs = tuple(_decode_spec(s) for s in data["return_specs"])
    if len(return_specs) != len(returns):
        raise ValueError("as many return_specs as returns are needed")
    return Plan(tuple(inputs), steps, returns, return_specs)
