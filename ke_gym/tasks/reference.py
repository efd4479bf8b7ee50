"""The PyTorch reference of a task, as a function of its inputs."""

from __future__ import annotations

import copyreg
import io
import keyword
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ke_gym.errors import UserError
from ke_gym.languages.plan import DTYPES
from ke_gym.tasks.inputs import drawing
from ke_gym.tasks.source import blame

_NARROW = {torch.float16, torch.bfloat16, torch.float32}
_KNOWN = frozenset(DTYPES.values())
_NARROWING = {Tensor.float, Tensor.half, Tensor.bfloat16}


class _InDouble(TorchFunctionMode):
    """Casts to narrower floats inside a forward become casts to float64: the oracle must not round."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _NARROWING:
            return args[0].double()
        args = tuple(torch.float64 if _is_narrow(value) else value for value in args)
        kwargs = {
            name: torch.float64 if _is_narrow(value) else value for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in _NARROW


class Reference:
    """`reference(*inputs) -> tuple[Tensor, ...]`: the outputs, flattened from tuple, list or dict.

    With `arity` (the number of forward inputs) it is forward and backward in one: the inputs after the first
    `arity` are the grad_outputs of the differentiable outputs, and the gradients of the floating inputs, then
    those of the parameters, follow the outputs.

    A call leaves no trace: buffers and tensor attributes that the forward writes (running statistics, hidden
    states, caches) are put back, so that every call computes the same function.
    """

    def __init__(
        self, module: nn.Module, path: str = "<module>", arity: int | None = None, wide: bool = False
    ) -> None:
        self.module = module
        self.state = _state(module)
        check_dtypes(self.state.items(), path)
        self._forward: Any = module
        self._path, self._arity, self._wide = path, arity, wide
        self._memory = _Memory(module)

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Run on the task's inputs in order. Raises `UserError` with file and line if its code fails."""
        try:
            with blame(self._path, "the forward pass"):
                if not self._wide:
                    return self._run(inputs)
                default = torch.get_default_dtype()
                torch.set_default_dtype(torch.float64)
                try:
                    with _InDouble():
                        return self._run([_widened(value) for value in inputs])
                finally:
                    torch.set_default_dtype(default)
        finally:
            self._memory.restore()

    def _run(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        if self._arity is None:
            with torch.no_grad():
                return _flat(self._forward(*inputs), self._path)
        leaves = [_leaf(value) for value in inputs[: self._arity]]
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            outputs = _flat(self._forward(*leaves), self._path)
            gradients = torch.autograd.grad(
                [output for output in outputs if output.requires_grad],
                [leaf for leaf in leaves if _is_float(leaf)] + parameters,
                list(inputs[self._arity :]),
                allow_unused=True,
                materialize_grads=True,
            )
        return tuple(output.detach() for output in outputs) + gradients

    def differentiable(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The outputs of the plain forward that take grad_outputs."""
        with blame(self._path, "the forward pass"), torch.enable_grad():
            outputs = _flat(self.module(*[_leaf(value) for value in inputs]), self._path)
        self._memory.restore()
        return tuple(output.detach() for output in outputs if output.requires_grad)

    def compiled(self, mode: str = "default") -> Reference:
        """The same function of the same tensors through `torch.compile`; `mode` is one of its modes."""
        twin = Reference(self.module, self._path, self._arity)
        twin._forward = torch.compile(self.module, mode=mode, dynamic=False)
        return twin

    def randomize(self, seed: int) -> None:
        """Give parameters and running statistics new values of their initial scale, in place.

        Constants (zero biases, unit scales) become random too, so that a candidate cannot skip them.
        """
        with torch.no_grad(), drawing(seed, device=self._device):
            for tensor, scale in self._scales:
                tensor.copy_(scale.draw(tensor))
        self._memory = _Memory(self.module)

    @cached_property
    def _device(self) -> str:
        return next((str(t.device) for t in self.state.values()), "cpu")

    @cached_property
    def _scales(self) -> list[tuple[Tensor, _Scale]]:
        norms = [part for part in self.module.modules() if isinstance(part, _NormBase)]
        statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        candidates = [*self.module.parameters(), *statistics]
        return [
            (t, _Scale.of(t)) for t in candidates if t is not None and t.is_floating_point() and t.numel()
        ]

    def double(self) -> Reference:
        """The float64 twin: parameters and buffers, and when called inputs and casts inside the forward.

        One twin is kept, and brought up to date by every call of `double()`.
        """
        pairs = zip(self.module.modules(), self._twin.module.modules(), strict=True)
        with torch.no_grad():
            for ours, theirs in pairs:
                for tensor, wide in zip(_tensors(ours), _tensors(theirs), strict=True):
                    wide.copy_(tensor)
        self._twin._memory = _Memory(self._twin.module)
        return self._twin

    @cached_property
    def _twin(self) -> Reference:
        # Not copy.deepcopy: a forward may go through lambdas that close over the module's parts.
        with io.BytesIO() as file:
            pickler = _WithoutTensors(file)
            pickler.dump(self.module)
            file.seek(0)
            module = _WithTensors(file, [_wide_copy(tensor) for tensor in pickler.tensors]).load().double()
        for part in module.modules():  # tensors that are plain attributes, which .double() does not know
            for name, value in vars(part).items():
                vars(part)[name] = _widened(value)
        return Reference(module, self._path, self._arity, wide=True)


class _WithoutTensors(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes numbers for tensors: gigabytes of parameters need not go through a pickle to be copied."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if type(value) not in (Tensor, nn.Parameter):
            return None
        number = self._numbers.setdefault(id(value), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(value)
        return number

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Module) and is_parametrized(value):  # it refuses, lest such files be kept
            return copyreg.__newobj__, (type(value),), vars(value)  # type: ignore[attr-defined]
        return super().reducer_override(value)


class _WithTensors(pickle.Unpickler):
    """Reads what ``_WithoutTensors`` wrote, with other tensors in their places."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:
        return self._tensors[int(number)]


def _wide_copy(tensor: Tensor) -> Tensor:
    with _disable_current_modes():
        copied = tensor.detach().to(torch.float64 if _is_float(tensor) else tensor.dtype, copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied.requires_grad_(tensor.requires_grad)


def _tensors(part: nn.Module) -> list[Tensor]:
    """The tensors a module holds itself: parameters, buffers, plain attributes."""
    held = [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]
    return [value for value in held if isinstance(value, Tensor)]


def plain_tensors(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where modules hold tensors that are neither parameters nor buffers, nor views of them: constants, to a kernel."""
    shared = {
        tensor.untyped_storage()._cdata
        for tensor in pytree.tree_leaves(dict(module.state_dict(keep_vars=True)))
    }
    return [
        (vars(part), name)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor) and value.untyped_storage()._cdata not in shared
    ]


class _Memory:
    """What a forward could write: tensors held by the modules, with their values."""

    def __init__(self, module: nn.Module) -> None:
        owners = [owner for part in module.modules() for owner in (part._buffers, part.__dict__)]
        self._names = [(owner, set(owner)) for owner in owners]
        self._held = [
            _Held(owner, name, value, value.detach().clone(), value._version)
            for owner in owners
            for name, value in owner.items()
            if isinstance(value, Tensor)
        ]

    def restore(self) -> None:
        for owner, names in self._names:
            if len(owner) != len(names):
                for name in set(owner) - names:
                    del owner[name]
        for held in self._held:
            held.restore()


@dataclass
class _Held:
    """One tensor that a module holds as a buffer or attribute."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor
    kept: Tensor
    version: int
    written: bool | None = None  # unknown before the first call

    def restore(self) -> None:
        if self.written is None:  # batch norm writes its statistics without raising their version
            with _disable_current_modes():  # a tracer must not see this
                empty = self.tensor.is_meta or isinstance(self.tensor, FakeTensor)
                self.written = not (empty or torch.equal(self.tensor, self.kept))
        if self.written or self.tensor._version != self.version:
            with torch.no_grad():
                self.tensor.copy_(self.kept)
            self.version = self.tensor._version
        self.owner[self.name] = self.tensor


def _state(module: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        state[_identifier(name, state)] = tensor.detach()
    return state


def _identifier(name: str, taken: Iterable[str]) -> str:
    """A state name as a Python parameter name: "0.weight" -> "_0_weight"; clashes are numbered."""
    plain = name.replace(".", "_")
    if plain[:1].isdigit() or keyword.iskeyword(plain):
        plain = f"_{plain}"
    chosen, number = plain, 2
    while chosen in taken:
        chosen, number = f"{plain}_{number}", number + 1
    return chosen


def check_dtypes(tensors: Iterable[tuple[str, Any]], path: str) -> None:
    """``UserError`` for a tensor of a dtype that no kernel is given; each comes with what it is."""
    for what, tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dtype not in _KNOWN:
            found = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {what} has the dtype {found}, which kernels are not given; choose one of"
                f" {', '.join(DTYPES)}"
            )


def _flat(result: Any, path: str) -> tuple[Tensor, ...]:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
    outputs = tuple(leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf) for leaf in leaves)
    if not outputs:
        raise UserError(f"{path}: the forward returns no tensor; return at least one")
    check_dtypes(((f"output {index}", output) for index, output in enumerate(outputs)), path)
    return outputs


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if _is_float(value) else value


def _widened(value: Any) -> Any:
    return value.double() if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class _Scale:
    """Mean and spread of a parameter's values; strictly positive ones (variances, scales) stay so."""

    mean: float
    spread: float
    positive: bool

    @staticmethod
    def of(tensor: Tensor) -> _Scale:
        values = tensor.detach().float()
        spread, mean = (value.item() for value in torch.std_mean(values, correction=0))
        return _Scale(mean, spread or 0.2 * (abs(mean) or 1.0), bool((values > 0).all()))

    def draw(self, like: Tensor) -> Tensor:
        values = torch.randn(like.shape, dtype=torch.float32, device=like.device)
        if self.positive:
            return values.mul_(self.spread / self.mean).exp_().mul_(self.mean)
        return values.mul_(self.spread).add_(self.mean)
