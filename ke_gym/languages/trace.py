"""``forward`` → launch plan: run once on fake tensors, with launches and ATen calls recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch._dynamo.config  # fake tensors import it on first use, which takes a second: better done here
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ke_gym.languages.allow import refusal
from ke_gym.languages.artifact import span_bytes
from ke_gym.languages.errors import BuildError
from ke_gym.languages.plan import (
    DTYPES,
    Alloc,
    Arg,
    Call,
    Launch,
    Plan,
    PlanInput,
    Ref,
    Step,
    TensorMap,
    TensorSpec,
    makes,
    memory_order,
    uses,
)
from ke_gym.languages.recording import Request, Tile, Unit, recording

CONSTANT_BYTES = 64 << 20
"""How much a module may carry in tensors it made when it was loaded."""

_ALLOCATIONS = {
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.empty_strided.default",
    "aten.empty_permuted.default",
    "aten.new_empty.default",
    "aten.new_empty_strided.default",
}
# Writes that the schema does not tell of: positions of the arguments written.
_HIDDEN_WRITES = {"aten.native_batch_norm.default": (3, 4), "aten.cudnn_batch_norm.default": (3, 4)}
# They answer Python, so none of them becomes a step.
_QUESTIONS = {
    "aten._local_scalar_dense.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
    "aten.item.default",
}
_ATTENTION = torch.ops.aten.scaled_dot_product_attention
_SAME = {"aten.detach.default", "aten.alias.default", "aten.lift_fresh.default", "aten.lift.default"}
_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
# What torch says when Python reaches for the memory of a fake tensor (data_ptr, numpy, tolist).
_FAKE_ACCESS = ("data pointer of", ".numpy() is not supported", ".tolist() is not supported", "no storage")


_NAMES = {"cpu": "a CPU", "cuda": "a GPU (give device=x.device)"}


class NotTraceable(Exception):
    """The module's Python depends on the contents of tensors; the message says where."""


@dataclass(frozen=True)
class Traced:
    """A plan, the constants it names, and remarks on it."""

    plan: Plan
    constants: dict[str, Tensor]
    units: tuple[Unit, ...]
    warnings: tuple[str, ...]


def trace(
    function: Callable[..., Any],
    inputs: Sequence[TensorSpec | Any],
    state: Mapping[str, TensorSpec],
    bound: Sequence[tuple[str, Tensor]] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    prepared: Mapping[str, TensorSpec] | None = None,
) -> Traced:
    """Run ``function(*inputs, **state, **prepared)`` on fake tensors of ``device`` (which need not be there).

    ``inputs`` are specs, or plain values passed as they are. ``bound`` says which real tensors that the
    module holds stand for entries of the reference's state; ``prepared`` are its preparation's. Raises
    ``BuildError`` for what a plan must not do, and ``NotTraceable`` if the Python depends on data.
    """
    recorder = _Recorder([(name, tensor) for name, tensor in bound], device)
    with recorder.fakes:
        arguments = [recorder.task_input(i) if isinstance(i, TensorSpec) else i for i in inputs]
        given = {name: recorder.state_input(name, spec) for name, spec in state.items()}
        for position, (name, spec) in enumerate((prepared or {}).items()):
            given[name] = recorder.prepared_input(name, str(position), spec)
    try:
        with torch.no_grad(), recorder.fakes, recorder, recording(recorder), _WholeAttention(recorder):
            result = function(*arguments, **given)
    except Exception as error:
        recorder.raise_first(error)
        raise
    recorder.raise_first(None)
    return recorder.finish(result)


class _Fakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors of a GPU that need none and use none: what ``torch.tensor`` makes begins on the CPU, as a constant of the
    plan, whether or not this process sees a GPU."""

    avoid_device_init = True


class _WholeAttention(TorchFunctionMode):
    """Has a GPU's attention recorded as the one call it is: which of the library's kernels computes it is decided on the device.

    Where no GPU is seen, torch would take it apart.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.scaled_dot_product_attention, _ATTENTION, _ATTENTION.default):
            return self._recorder.attention(args, kwargs)
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers tensors in the order they appear; ``finish`` renumbers them so that inputs come first."""

    def __init__(self, bound: list[tuple[str, Tensor]], device: Literal["cpu", "cuda"]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.fakes = _Fakes() if device == "cuda" else FakeTensorMode()
        self._bound = {id(tensor): name for name, tensor in bound}
        self._numbers: dict[int, int] = {}
        self._next = 0
        self._inputs: list[tuple[int, PlanInput]] = []
        self._tensor_inputs = 0
        self._steps: list[Step] = []
        self._constants: dict[str, Tensor] = {}
        self._real: dict[int, tuple[Tensor, FakeTensor]] = {}
        self._contents: dict[int, Tensor] = {}
        self._held: set[int] = set()  # stand-ins for the module's own tensors, which a copy may replace
        self._units: dict[str, Unit] = {}
        self._origin: dict[int, str] = {}  # storage -> what it is, if it must not be written
        self._empty: set[int] = set()  # storages that nothing has written
        self._keep: list[Any] = []  # identities are looked up, so nothing may be freed and reused
        self._memory: dict[int, int] = {}  # number -> storage
        self._effects: dict[int, set[int]] = {}  # step -> the storages it writes
        self._drawing: set[int] = set()  # steps that advance the random generator
        self._rejection: BuildError | None = None
        self._untraceable: str | None = None
        self._warnings: list[str] = []

    # -- tensors -------------------------------------------------------------------------------------------

    def task_input(self, spec: TensorSpec) -> Tensor:
        fake = self._fake(spec)
        name = str(self._tensor_inputs)
        self._tensor_inputs += 1
        self._adopt(fake, PlanInput("input", name, spec), f"input {name}")
        return fake

    def state_input(self, name: str, spec: TensorSpec) -> Tensor:
        fake = self._fake(spec)
        self._adopt(fake, PlanInput("state", name, spec), f"state {name!r}")
        return fake

    def prepared_input(self, name: str, position: str, spec: TensorSpec) -> Tensor:
        fake = self._fake(spec)
        self._adopt(fake, PlanInput("prepared", position, spec), f"prepared {name!r}")
        return fake

    def _fake(self, spec: TensorSpec) -> FakeTensor:
        with _disable_current_modes(), self.fakes:
            fake: Any = torch.empty_strided(
                spec.shape, spec.stride, dtype=spec.torch_dtype, device=self._device
            )
        return cast(FakeTensor, fake)

    def _adopt(self, fake: FakeTensor, source: PlanInput, origin: str) -> None:
        self._inputs.append((self._number(fake), source))
        self._origin[_storage(fake)] = origin

    def _number(self, tensor: Tensor | None) -> int:
        """A new number, from now on the tensor's."""
        number = self._next
        self._next += 1
        if tensor is not None:
            torch._C._set_throw_on_mutable_data_ptr(tensor)  # without it, the address of a fake tensor is 0
            self._numbers[id(tensor)] = number
            self._memory[number] = _storage(tensor)
            self._keep.append((tensor, tensor.untyped_storage()))
        return number

    def _another(self, tensor: Tensor) -> int:
        """A new number for what lies in a tensor's memory; the tensor keeps its own."""
        number = self._next
        self._next += 1
        self._memory[number] = _storage(tensor)
        return number

    def _known(self, tensor: Tensor) -> FakeTensor:
        """The fake tensor that stands for an argument: itself, or a constant for a real one."""
        if isinstance(tensor, FakeTensor):
            if id(tensor) not in self._numbers:
                raise self.rejection(
                    "constraints",
                    "a tensor from an earlier call is used; forward must make or take every tensor it uses",
                )
            return tensor
        if id(tensor) in self._real:
            return self._real[id(tensor)][1]
        return self._constant(tensor)

    def _constant(self, tensor: Tensor) -> FakeTensor:
        spec = TensorSpec.of(tensor)
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or spec.dtype not in DTYPES:
            raise self.rejection(
                "constraints", f"a {spec.dtype} tensor on {tensor.device} cannot be a constant of a plan"
            )
        fake = self._fake(spec)
        name = self._bound.get(id(tensor))
        if name is not None:
            self._adopt(fake, PlanInput("state", name, spec), f"state {name!r}")
        else:
            with _disable_current_modes():
                content, kept = span_bytes(tensor), tensor.detach()
            name = f"c{hashlib.sha256(repr(spec).encode() + content).hexdigest()[:16]}"
            self._constants[name] = kept
            self._adopt(fake, PlanInput("constant", name, spec), "a tensor made outside forward")
            self._contents[id(fake)] = tensor
            held = sum(TensorSpec.of(c).storage_bytes for c in self._constants.values())
            if held > CONSTANT_BYTES:
                raise self.rejection(
                    "constraints",
                    f"tensors made outside forward take {held} bytes; {CONSTANT_BYTES} are allowed",
                )
        self._held.add(id(fake))
        self._real[id(tensor)] = (tensor, fake)
        return fake

    # -- what goes wrong -------------------------------------------------------------------------------------

    def rejection(self, outcome: str, message: str) -> BuildError:
        """Keep the first rejection: catching it in ``forward`` must not undo it."""
        error = BuildError(outcome, message)
        self._rejection = self._rejection or error
        return error

    def reject(self, outcome: str, message: str) -> None:
        """Note that the module is refused; the caller raises."""
        self.rejection(outcome, message)

    def raise_first(self, error: Exception | None) -> None:
        """Raise what the trace ends with, if anything: a rejection, or that it cannot go on."""
        if self._rejection is not None:
            raise self._rejection
        if error is None:
            return
        if self._untraceable is not None:
            raise NotTraceable(self._untraceable) from error
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _FAKE_ACCESS):
            raise NotTraceable(
                f"forward reads the memory of a tensor in Python: {str(error)[:160]}"
            ) from error

    def _writes(self, tensor: Tensor, where: str) -> None:
        origin = self._origin.get(_storage(tensor))
        if origin is not None:
            raise self.rejection("constraints", f"{where} writes to {origin}, which is read-only")
        self._empty.discard(_storage(tensor))

    def _own(self, tensor: Tensor) -> None:
        """Before ATen writes to a buffer that the module holds (running statistics): a copy takes its place.

        Every call of a plan starts from the same state, as every call of the reference does.
        """
        if id(tensor) not in self._held:
            return
        number = self._numbers[id(tensor)]
        copy = self._numbers[id(tensor)] = self._another(tensor)
        self._steps.append(Call("aten.clone.default", (Ref(number),), {}, (copy,)))
        self._held.discard(id(tensor))
        self._contents.pop(id(tensor), None)
        del self._origin[_storage(tensor)]

    # -- recording -------------------------------------------------------------------------------------------

    def launch(self, requests: Sequence[Request]) -> None:
        """Record a launch; arguments are checked already."""
        launches: list[Launch] = []
        written: list[tuple[FakeTensor, str]] = []
        for request in requests:
            recorded: list[Arg] = []
            for position, argument in enumerate(request.arguments, 1):
                tensor = argument.value.tensor if isinstance(argument.value, Tile) else argument.value
                if not isinstance(tensor, Tensor):
                    recorded.append(argument.value)
                    continue
                fake = self._known(tensor)
                where = f"kernel {request.kernel!r}, argument {position} ({argument.name!r}),"
                if argument.writes:
                    written.append((fake, where))
                elif _storage(fake) in self._empty:
                    self._warnings.append(f"{where} is read before anything wrote it")
                number = self._numbers[id(fake)]
                tile = argument.value
                recorded.append(tile.map(number) if isinstance(tile, Tile) else Ref(number))
            self._units[request.unit.name] = request.unit
            ctypes = tuple(argument.ctype for argument in request.arguments)
            geometry, label = request.geometry, request.label
            launches.append(
                Launch(request.unit.name, request.kernel, tuple(recorded), ctypes, geometry, label=label)
            )
        for fake, where in written:
            self._writes(fake, where)
        self._steps.append(replace(launches[0], alternatives=tuple(launches[1:])))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = str(func)
        if func.namespace == "prim":  # device and layout, asked of fake tensors
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(Tensor, self._known, (args, kwargs or {}))
        if target == "aten._local_scalar_dense.default" and id(args[0]) in self._contents:
            with _disable_current_modes():
                return self._contents[id(args[0])].item()
        if target not in _ALLOCATIONS and target not in _QUESTIONS and (why := refusal(target)):
            raise self.rejection("constraints", why)
        writes = self._written(func, target, args, kwargs)
        for tensor in writes:
            self._own(tensor)
            self._writes(tensor, f"operator {target}")
        try:
            result = func(*args, **kwargs)
        except _DATA_DEPENDENT as error:
            self._untraceable = f"forward depends on the contents of a tensor: operator {target}"
            raise error
        self._record(func, target, args, kwargs, result, {_storage(tensor) for tensor in writes})
        return result

    def attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The library's attention, whose result lies in memory as its queries do."""
        overload = _ATTENTION.default
        given = dict(zip((argument.name for argument in overload._schema.arguments), args)) | kwargs
        tensors = [leaf for leaf in given.values() if isinstance(leaf, Tensor)]
        if given.get("dropout_p") or any(tensor.device.type != "cuda" for tensor in tensors):
            return overload(*args, **kwargs)
        given = pytree.tree_map_only(Tensor, self._known, given)
        with _disable_current_modes(), self.fakes:
            made = overload(**given)  # raises what torch says of arguments that do not fit
            order, back = memory_order(given["query"].stride())
            laid: Any = made.new_empty([made.shape[axis] for axis in order]).permute(back)
        target = str(overload)
        encoded = {name: self._argument(target, value) for name, value in given.items()}
        leading = tuple(encoded.pop(name) for name in ("query", "key", "value"))
        whole, apart, dense = (self._another(laid) for _ in range(3))
        self._steps += [
            Call(target, leading, encoded, (whole,)),
            Call("aten.permute.default", (Ref(whole), order), {}, (apart,)),
            Call("aten.contiguous.default", (Ref(apart),), {}, (dense,)),
            Call("aten.permute.default", (Ref(dense), back), {}, (self._number(laid),)),
        ]
        return laid

    def _written(self, func: Any, target: str, args: Any, kwargs: Any) -> list[Tensor]:
        if target in _HIDDEN_WRITES and args[5]:  # training
            return [args[i] for i in _HIDDEN_WRITES[target] if isinstance(args[i], Tensor)]
        found: list[Tensor] = []
        for i, parameter in enumerate(func._schema.arguments):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(parameter.name)
                found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        return found

    def _record(self, func: Any, target: str, args: Any, kwargs: Any, result: Any, writes: set[int]) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(result) if leaf is None or isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in leaves if leaf is not None]
        for tensor in tensors:
            if tensor.device.type != self._device:
                raise self.rejection(
                    "constraints",
                    f"{target} gives a tensor on {tensor.device}; the target is {_NAMES[self._device]}",
                )
            if tensor.layout != torch.strided:
                raise self.rejection(
                    "constraints", f"{target} gives a {tensor.layout} tensor; a plan holds dense ones"
                )
        if target in _ALLOCATIONS:
            spec = TensorSpec.of(result)
            if spec.dtype not in DTYPES:
                raise self.rejection("constraints", f"a plan cannot allocate {spec.dtype} tensors")
            self._steps.append(Alloc(self._number(result), spec))
            self._empty.add(_storage(result))
            return
        if not tensors and not writes:
            return
        if len(tensors) == 1 and not writes and args and isinstance(args[0], Tensor):
            (result,) = tensors
            if target in _SAME or _identical(args[0], result):
                self._keep.append(result)
                self._numbers[id(result)] = self._numbers[id(args[0])]
                if id(args[0]) in self._contents:
                    self._contents[id(result)] = self._contents[id(args[0])]
                return
        encoded = [self._argument(target, a) for a in args]
        named = {k: self._argument(target, v) for k, v in kwargs.items()}
        # An operator that writes to its argument returns it: the tensor keeps its number. One that it leaves out has one,
        # too: on a device it may be another that is.
        outs = [self._number(None if id(leaf) in self._numbers else leaf) for leaf in leaves]
        self._effects[len(self._steps)] = writes
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._drawing.add(len(self._steps))
        self._steps.append(Call(target, tuple(encoded), named, tuple(outs)))

    def _argument(self, target: str, value: Any) -> Arg:
        if isinstance(value, Tensor):
            return Ref(self._numbers[id(value)])
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(target, v) for v in value)
        plain = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
        if value is None or isinstance(value, plain):
            return value
        raise self.rejection(
            "constraints", f"operator {target} takes a {type(value).__name__}, which a plan cannot hold"
        )

    # -- the plan --------------------------------------------------------------------------------------------

    def finish(self, result: Any) -> Traced:
        """The plan that returns the tensors in ``result`` (a tensor, or a tuple, list or dict of them)."""
        leaves = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
        returned: list[FakeTensor] = []
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                raise BuildError(
                    "correctness", f"output {index} is no tensor but of type {type(leaf).__name__}"
                )
            fake = self._known(leaf)
            if _storage(fake) in self._empty and fake.numel():
                raise BuildError("correctness", f"output {index} is allocated but never written")
            returned.append(fake)
        returns = [self._numbers[id(fake)] for fake in returned]
        steps = self._live(set(returns))
        used = {n for step in steps for n in uses(step)} | set(returns)
        inputs = [(n, i) for n, i in self._inputs if i.source == "input" or n in used]
        order = {n: i for i, (n, _) in enumerate(inputs)}
        for step in steps:
            for n in makes(step):
                order[n] = len(order)
        plan = Plan(
            tuple(i for _, i in inputs),
            tuple(_renumbered(step, order) for step in steps),
            tuple(order[n] for n in returns),
            tuple(TensorSpec.of(fake) for fake in returned),
            self._device,
        )
        constants = {i.name: self._constants[i.name] for _, i in inputs if i.source == "constant"}
        return Traced(plan, constants, tuple(self._units.values()), tuple(dict.fromkeys(self._warnings)))

    def _live(self, needed: set[int]) -> list[Step]:
        """Launches, draws of random numbers, and whatever these and the returns are computed from."""
        live = []
        read = {self._memory[n] for n in needed}
        for index in range(len(self._steps) - 1, -1, -1):
            step = self._steps[index]
            if (
                isinstance(step, Launch)
                or index in self._drawing
                or needed.intersection(makes(step))
                or read.intersection(self._effects.get(index, ()))
            ):
                live.append(step)
                needed.update(uses(step))
                read.update(self._memory[n] for n in uses(step))
        return live[::-1]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether a view shows the same elements in the same way."""
    return (
        a is not b
        and _storage(a) == _storage(b)
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
    )


def _renumbered(step: Step, order: Mapping[int, int]) -> Step:
    def arg(value: Arg) -> Arg:
        if isinstance(value, Ref):
            return Ref(order[value.value])
        if isinstance(value, TensorMap):
            return replace(value, value=order[value.value])
        return tuple(arg(v) for v in value) if isinstance(value, tuple) else value

    if isinstance(step, Alloc):
        return Alloc(order[step.out], step.spec)
    if isinstance(step, Launch):
        others = tuple(replace(other, args=arg(other.args)) for other in step.alternatives)
        return replace(step, args=arg(step.args), alternatives=others)
    kwargs = {name: arg(value) for name, value in step.kwargs.items()}
    return Call(step.target, arg(step.args), kwargs, tuple(order[n] for n in step.outs))
