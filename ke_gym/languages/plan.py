"""Launch plans: what a kernel module does, as data.

A plan is the trace of ``forward`` on fake tensors: allocations, kernel launches, ATen calls and returns,
for one shape set. It holds no code, so a trusted executor can run it. Values are numbered; ``inputs`` take
the first numbers in order, every step defines further ones.

A plan for the CPU calls functions of shared libraries. A plan for a GPU (``device`` "cuda") launches kernels of
device binaries (cubins): its launches carry a ``Geometry``, and what the executor promises is this.

- Every tensor of the plan lies on one GPU, whichever the executor uses: device ordinals in the arguments of
  ATen calls mean that one. Steps run in order on one stream.
- Storages are aligned to 256 bytes, so a tensor is as aligned as its storage offset: Triton kernels are
  specialized on that: memory that a caller brings must be aligned likewise.
- Arguments are packed by ``ctypes``: a ``Ref`` is a device pointer, ``None`` a null pointer, ``Scratch`` a pointer
  to memory of the launch's own, ``TensorMap`` a 128-byte ``CUtensorMap`` by value, the rest scalars.
- A launch may carry ``alternatives``: launches of which any one does the same work (autotune configurations).
  Executors run the launch itself; who races picks others with ``Plan.choose``.

Work that depends on weights alone may be declared a ``preparation``: a plan of its own, that is given no inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

PLAN_VERSION = 2

DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128,
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


@dataclass(frozen=True)
class Scratch:
    """Uninitialised device memory of ``size`` bytes (aligned to 256) that lives for one launch."""

    size: int


@dataclass(frozen=True)
class TensorMap:
    """What ``cuTensorMapEncodeTiled`` makes a TMA descriptor from; dimensions outermost first, as in torch.

    ``shape`` (elements), ``stride`` (elements, the last is 1) and ``dtype`` describe the tensor at ``value``,
    ``box`` the tile that one copy moves. ``swizzle`` is 0, 32, 64 or 128 bytes; out of bounds reads give zeros,
    with ``nan_fill`` NaN.
    """

    value: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    box: tuple[int, ...]
    swizzle: int = 0
    nan_fill: bool = False


# An argument is a Ref, a Scratch, a TensorMap, a plain scalar (int, float, complex, bool, str, None), a torch
# dtype/device/layout/memory format, or a tuple of arguments.
Arg = Any


@dataclass(frozen=True)
class PlanInput:
    """One tensor the caller provides.

    ``source`` says from where: the task's inputs (``name`` is the position), the reference's state (``name``
    is the mangled parameter name), a constant the module computed when it was built (``name`` keys
    ``Artifact.constants``), or what the plan's preparation returns (``name`` is the position).
    """

    source: Literal["input", "state", "constant", "prepared"]
    name: str
    spec: TensorSpec


@dataclass(frozen=True)
class Alloc:
    """Allocate an uninitialised tensor as value ``out``."""

    out: int
    spec: TensorSpec


Dim3 = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """How a device kernel is launched.

    ``grid`` in blocks, ``block`` in threads, ``cluster`` in blocks ((1, 1, 1): none), each along x, y, z;
    ``shared`` bytes of dynamic shared memory per block. ``cooperative``: all blocks run at once.
    ``programmatic``: may start before the kernel before it has ended (programmatic dependent launch).
    """

    grid: Dim3
    block: Dim3
    cluster: Dim3 = (1, 1, 1)
    shared: int = 0
    cooperative: bool = False
    programmatic: bool = False


@dataclass(frozen=True)
class Launch:
    """Call kernel ``kernel`` of binary ``binary``; ``args`` are Refs (data pointers) and scalars, in order.

    ``ctypes`` names each argument's C type, as declared (``"float*"``, ``"int64_t"``, ``"float"``, for a GPU also
    ``"void*"`` and ``"CUtensorMap"``). ``geometry`` is for kernels of a GPU. ``alternatives`` are other launches
    that do the same, without alternatives of their own; ``label`` says what sets this one apart.
    """

    binary: str
    kernel: str
    args: tuple[Arg, ...]
    ctypes: tuple[str, ...]
    geometry: Geometry | None = None
    alternatives: tuple[Launch, ...] = ()
    label: str = ""


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
    """Everything the executor needs to compute the returns from the inputs, for one shape set.

    ``graph``: the launches are enqueued as one CUDA graph (plans for a GPU without library calls).
    ``preparation``: what is computed from state and constants alone, anew for new weights but not in every call. Its
    returns are inputs of the plan; it has none itself, so that nothing can depend on those of a call.
    """

    inputs: tuple[PlanInput, ...]
    steps: tuple[Step, ...]
    returns: tuple[int, ...]
    return_specs: tuple[TensorSpec, ...]
    device: Literal["cpu", "cuda"] = "cpu"
    graph: bool = False
    preparation: Plan | None = None
    version: int = PLAN_VERSION

    @property
    def choices(self) -> dict[int, int]:
        """How many launches there are to choose from, by index of the step, where there is more than one."""
        return {
            index: 1 + len(step.alternatives)
            for index, step in enumerate(self.steps)
            if isinstance(step, Launch) and step.alternatives
        }

    def choose(self, picks: Mapping[int, int]) -> Plan:
        """The plan without alternatives: at step ``i`` number ``picks[i]`` (from 0, the launch itself)."""
        steps = list(self.steps)
        for index, step in enumerate(steps):
            if isinstance(step, Launch) and step.alternatives:
                pick = (replace(step, alternatives=()), *step.alternatives)[picks.get(index, 0)]
                steps[index] = pick
        return replace(self, steps=tuple(steps))

    @property
    def scratch_bytes(self) -> int:
        """The most that one launch takes as ``Scratch``, the preparation's left aside."""
        launches = [one for s in self.steps if isinstance(s, Launch) for one in (s, *s.alternatives)]
        return max((sum(a.size for a in one.args if isinstance(a, Scratch)) for one in launches), default=0)

    def to_json(self) -> str:
        return json.dumps(_encode_plan(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse and validate; raises ``ValueError`` on anything that is not a well-formed plan.

        The text may come from an untrusted process: nothing in it is evaluated.
        """
        try:
            return _decode_plan(strict_json(text))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a launch plan: {error!r}") from error


def strict_json(text: str) -> Any:
    """What a JSON text of unknown origin says. Raises ``ValueError`` for what could not be written again: numbers beyond
    all bounds, halves of characters."""
    found = json.loads(text, parse_constant=_finite, parse_float=_finite)
    if "\\ud" in text.lower():
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return number


def _encode_arg(arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return {"ref": arg.value}
    if isinstance(arg, Scratch):
        return {"scratch": arg.size}
    if isinstance(arg, TensorMap):
        spec = _encode_spec(TensorSpec(arg.shape, arg.stride, arg.dtype))
        return {"map": [arg.value, spec, list(arg.box), arg.swizzle, arg.nan_fill]}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": repr(arg)}
    if isinstance(arg, complex):
        return {"complex": [repr(arg.real), repr(arg.imag)]}
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
    if kind == "scratch":
        return Scratch(_index(value))
    if kind == "map":
        return _decode_map(*value)
    if kind == "float":
        return float(value)
    if kind == "complex":
        return complex(*map(float, value))
    if kind == "dtype":
        return DTYPES[value]
    if kind == "device":
        return torch.device(value)
    if kind == "enum":
        return _NAMED[value]
    raise ValueError(f"unknown argument kind {kind!r}")


def _decode_map(value: Any, spec: Any, box: Any, swizzle: Any, nan_fill: Any) -> TensorMap:
    tensor = _decode_spec(spec)
    size = tuple(_index(n) for n in box)
    rank = len(tensor.shape)
    if not 1 <= rank <= 5 or len(size) != rank or any(not 1 <= n <= 256 for n in size):
        raise ValueError(f"a TMA box of {list(size)} elements over {rank} dimensions; up to 256 over 1 to 5")
    if tensor.torch_dtype.is_complex:
        raise ValueError("a TMA descriptor of complex numbers")
    if tensor.stride[-1] != 1 or any(s * tensor.torch_dtype.itemsize % 16 for s in tensor.stride[:-1]):
        raise ValueError("a TMA descriptor needs a last stride of 1 and others of whole 16 bytes")
    if swizzle not in (0, 32, 64, 128) or type(nan_fill) is not bool:
        raise ValueError(f"unknown TMA swizzle {swizzle!r}")
    return TensorMap(_index(value), tensor.shape, tensor.stride, tensor.dtype, size, swizzle, nan_fill)


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
        return _encode_launch(step)
    return {
        "op": "call",
        "target": step.target,
        "args": _encode_arg(step.args),
        "kwargs": {k: _encode_arg(v) for k, v in step.kwargs.items()},
        "outs": list(step.outs),
    }


def _encode_launch(step: Launch) -> dict[str, Any]:
    data: dict[str, Any] = {
        "op": "launch",
        "binary": step.binary,
        "kernel": step.kernel,
        "args": _encode_arg(step.args),
        "ctypes": list(step.ctypes),
    }
    if step.geometry is not None:
        data["geometry"] = asdict(step.geometry)
    if step.alternatives:
        data["alternatives"] = [_encode_launch(other) for other in step.alternatives]
    if step.label:
        data["label"] = step.label
    return data


def _decode_launch(data: dict[str, Any]) -> Launch:
    args, types = _decode_arg(data["args"]), tuple(str(t) for t in data["ctypes"])
    if len(args) != len(types):
        raise ValueError(f"launch of {data['kernel']!r}: {len(args)} arguments, {len(types)} types")
    geometry = _decode_geometry(data["geometry"]) if "geometry" in data else None
    others = tuple(_decode_launch(other) for other in data.get("alternatives", ()))
    if any(other.alternatives or (other.geometry is None) != (geometry is None) for other in others):
        raise ValueError(f"launch of {data['kernel']!r}: alternatives of another kind")
    label = str(data.get("label", ""))
    return Launch(str(data["binary"]), str(data["kernel"]), args, types, geometry, others, label)


GRID_LIMITS = ((1 << 31) - 1, 65535, 65535)
BLOCK_LIMITS = (1024, 1024, 64)
THREADS, CLUSTER_BLOCKS, SHARED_BYTES = 1024, 16, 1 << 18


def _decode_geometry(data: dict[str, Any]) -> Geometry:
    """Within what any CUDA device takes; what one device takes is checked when a kernel is built for it."""
    grid, block, cluster = (_dim3(data[key]) for key in ("grid", "block", "cluster"))
    flags = data["cooperative"], data["programmatic"]
    if any(n > limit for n, limit in zip((*grid, *block), (*GRID_LIMITS, *BLOCK_LIMITS))):
        raise ValueError(f"no device takes a grid of {grid} blocks of {block} threads")
    if math.prod(block) > THREADS or math.prod(cluster) > CLUSTER_BLOCKS:
        raise ValueError(f"no device takes {math.prod(block)} threads a block, {cluster} blocks a cluster")
    if any(n % c for n, c in zip(grid, cluster)):
        raise ValueError(f"a grid of {grid} blocks cannot be cut into clusters of {cluster}")
    if _index(data["shared"]) > SHARED_BYTES or any(type(flag) is not bool for flag in flags):
        raise ValueError(f"no device takes {data['shared']} bytes of shared memory per block")
    return Geometry(grid, block, cluster, data["shared"], *flags)


def _dim3(data: Any) -> Dim3:
    x, y, z = data
    if any(type(n) is not int or n < 1 for n in (x, y, z)):
        raise ValueError(f"{data!r} are no sizes along x, y, z")
    return x, y, z


def _decode_step(data: dict[str, Any]) -> Step:
    op = data["op"]
    if op == "alloc":
        return Alloc(_index(data["out"]), _decode_spec(data["spec"]))
    if op == "launch":
        return _decode_launch(data)
    if op == "call":
        kwargs = {str(k): _decode_arg(v) for k, v in data["kwargs"].items()}
        outs = tuple(_index(o) for o in data["outs"])
        return Call(str(data["target"]), _decode_arg(data["args"]), kwargs, outs)
    raise ValueError(f"unknown step {op!r}")


def _encode_plan(plan: Plan) -> dict[str, Any]:
    return {
        "version": plan.version,
        "device": plan.device,
        "inputs": [[i.source, i.name, _encode_spec(i.spec)] for i in plan.inputs],
        "steps": [_encode_step(s) for s in plan.steps],
        "returns": list(plan.returns),
        "return_specs": [_encode_spec(s) for s in plan.return_specs],
        **({"graph": True} if plan.graph else {}),
        **({"preparation": _encode_plan(plan.preparation)} if plan.preparation is not None else {}),
    }


def refs(arg: Arg) -> list[int]:
    """The values an argument, or a tuple of arguments, refers to."""
    if isinstance(arg, (Ref, TensorMap)):
        return [arg.value]
    if isinstance(arg, tuple):
        return [v for a in arg for v in refs(a)]
    return []


def memory_order(stride: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes from the farthest steps in memory to the nearest, and what permutes axes in that order back."""
    axes = range(len(stride))
    order = sorted(axes, key=lambda axis: -stride[axis])
    return tuple(order), tuple(order.index(axis) for axis in axes)


def uses(step: Step) -> list[int]:
    """The values a step reads or writes, without those it makes."""
    if isinstance(step, Alloc):
        return []
    if isinstance(step, Call):
        return refs((*step.args, *step.kwargs.values()))
    return refs((*step.args, *(other.args for other in step.alternatives)))


def makes(step: Step) -> tuple[int, ...]:
    """The values a step defines."""
    if isinstance(step, Alloc):
        return (step.out,)
    return step.outs if isinstance(step, Call) else ()


def _decode_plan(data: dict[str, Any]) -> Plan:
    if data["version"] != PLAN_VERSION:
        raise ValueError(f"plan version {data['version']!r}, this is version {PLAN_VERSION}")
    inputs = []
    for source, name, spec in data["inputs"]:
        if source not in ("input", "state", "constant", "prepared"):
            raise ValueError(f"unknown input source {source!r}")
        inputs.append(PlanInput(source, str(name), _decode_spec(spec)))
    steps = tuple(_decode_step(s) for s in data["steps"])
    returns = tuple(_index(r) for r in data["returns"])
    defined = set(range(len(inputs)))
    device = data["device"]
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}")
    for step in steps:
        if missing := set(uses(step)) - defined:
            raise ValueError(f"step {step!r} uses undefined values {sorted(missing)}")
        if again := set(makes(step)) & defined:
            raise ValueError(f"step {step!r} defines values {sorted(again)} again")
        if isinstance(step, Launch) and (step.geometry is None) != (device == "cpu"):
            raise ValueError(f"launch of {step.kernel!r}: kernels of a GPU, and only they, have a geometry")
        defined |= set(makes(step))
    if missing := set(returns) - defined:
        raise ValueError(f"the plan returns undefined values {sorted(missing)}")
    return_specs = tuple(_decode_spec(s) for s in data["return_specs"])
    if len(return_specs) != len(returns):
        raise ValueError("as many return_specs as returns are needed")
    graph = data.get("graph", False)
    if type(graph) is not bool or (graph and device == "cpu"):
        raise ValueError(f"a plan for {device} with graph {graph!r}")
    preparation = _decode_plan(data["preparation"]) if "preparation" in data else None
    plan = Plan(tuple(inputs), steps, returns, return_specs, device, graph, preparation)
    _check_preparation(plan)
    return plan


def _check_preparation(plan: Plan) -> None:
    """Whether what is prepared depends on state and constants alone, and is what the plan takes."""
    taken = [given for given in plan.inputs if given.source == "prepared"]
    made = plan.preparation
    if made is None:
        if taken:
            raise ValueError("a plan takes what no preparation makes")
        return
    if wrong := sorted({given.source for given in made.inputs} - {"state", "constant"}):
        raise ValueError(f"a preparation may read state and constants, not what is {wrong[0]}")
    if made.preparation is not None or made.graph or made.device != plan.device:
        raise ValueError("a preparation is a plain plan for the plan's own device")
    for given in taken:
        position = int(given.name) if given.name.isdecimal() else len(made.returns)
        if position >= len(made.returns) or made.return_specs[position] != given.spec:
            raise ValueError(f"a plan takes {given.name!r} of its preparation, which makes no such tensor")
