"""Tasks made from live modules: how they travel to other processes, and how their inputs are redrawn."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from ke_gym.errors import UserError


@dataclass(frozen=True)
class _Like:
    """A floating tensor to redraw: normal with the example's moments, in its memory format."""

    example: Tensor  # on the meta device: shape, dtype and strides without data
    mean: float
    std: float


def pack(module: nn.Module, example_inputs: Any) -> tuple[str, bytes]:
    """(source text to show, pickled module and recipe). Raises `UserError` for what cannot travel."""
    if not isinstance(module, nn.Module):
        raise UserError(
            f"expected a torch.nn.Module, got {type(module).__name__}; wrap the function in a module"
        )
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, Sequence) or not example_inputs:
        raise UserError("example_inputs must be a tensor or a sequence of the forward's positional arguments")
    recipe = [_recipe(value) for value in example_inputs]
    own = _own_modules(module)
    for part in own:
        cloudpickle.register_pickle_by_value(part)
    try:
        payload = cloudpickle.dumps((module, recipe))
    except Exception as error:
        raise UserError(
            f"the module {type(module).__name__} cannot be sent to worker processes: {error}; "
            "keep open files, locks and lambdas over such things out of it"
        ) from error
    finally:
        for part in own:
            cloudpickle.unregister_pickle_by_value(part)
    return _source(module), payload


def unpack(payload: bytes) -> tuple[nn.Module, Sequence[Any]]:
    """A fresh copy of the module, on the CPU, and the recipe of its inputs."""
    module, recipe = cloudpickle.loads(payload)
    return module.cpu(), recipe


def draw(recipe: Sequence[Any]) -> list[Any]:
    """Inputs from a recipe; call it inside `inputs.drawing`."""
    return [_redraw(value) for value in recipe]


def _recipe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    if not value.is_floating_point() or not value.numel():
        return value
    finite = value[value.isfinite()].double()
    if not finite.numel():
        return value
    return _Like(value.to("meta"), finite.mean().item(), finite.std(correction=0).item())


def _redraw(value: Any) -> Any:
    if isinstance(value, _Like):
        return torch.randn_like(value.example, device="cpu").mul_(value.std).add_(value.mean)
    return value.clone() if isinstance(value, Tensor) else value


def _own_modules(module: nn.Module) -> list[ModuleType]:
    """The user's own importable modules: pickled by value, since workers may not find them on their path."""
    libraries = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
    found = {type(part).__module__ for part in module.modules()} - {"__main__"}
    modules = [sys.modules[name] for name in sorted(found) if name in sys.modules]
    return [m for m in modules if getattr(m, "__file__", None) and not str(m.__file__).startswith(libraries)]


def _source(module: nn.Module) -> str:
    """The text of the module's classes, parts first, for people and prompts; else its printed form."""
    texts: dict[type, str] = {}
    for part in reversed(list(module.modules())):
        kind = type(part)
        if kind not in texts and not kind.__module__.startswith("torch."):
            try:
                texts[kind] = inspect.getsource(kind)
            except (OSError, TypeError):
                texts[kind] = repr(part)
    return "\n\n".join(texts.values()) or repr(module)
