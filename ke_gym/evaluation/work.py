"""How much work a task is at the least: bytes and FLOPs counted on its own graph, and the floor they imply."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ke_gym.evaluation.needed import Needed
from ke_gym.tasks.task import Reference

# Operators that touch only part of an operand: the table is charged what is gathered, not its size.
_PARTIAL = ("index", "embedding", "gather", "searchsorted", "bucketize", "take", "slice", "select", "narrow")
# Operators that sum (or otherwise fold) many elements into one, so that rounding may accumulate.
_FOLDING = ("sum", "mean", "var", "std", "norm", "softmax", "logsumexp", "prod", "cumsum", "loss", "pool")
# Operators whose result is one number for many, besides those that accumulate.
_EXTREMES = ("max", "min")
# Operators that are tagged as pointwise but compute nothing.
_MOVING = ("clone", "copy", "fill", "zero")


@dataclass(frozen=True)
class Work:
    """Least bytes moved (each input read once, as far as masks do not hide it, each output written once) and FLOPs of one
    call.

    ``flops`` are those of products (matrices, convolutions, attention), ``floor_flops`` the least of them that
    any algorithm needs; ``arithmetic`` also counts one for every element of a pointwise operator or a reduction,
    which is no bound (a kernel may need fewer), but says how busy the processor is.
    """

    bytes: float
    flops: float
    floor_flops: float
    reduction_length: float
    """About how many input elements an output element depends on."""
    arithmetic: float = 0.0


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alias = {id(t): i for i, t in enumerate(inputs)}
        self.sizes = [t.numel() * t.element_size() for t in inputs]
        self.read: dict[int, float] = defaultdict(float)
        self.flops = 0.0
        self.needed = Needed(inputs)
        self.elementwise = 0.0
        self.reduction = 1.0
        self.keep: list[Any] = list(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.keep.append(results)  # ids must stay unique for as long as they are looked up
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = float(count(*_heads_alike(func, args), **(kwargs or {}), out_val=out))
            self.flops += flops
            self.needed.product(func, args, results, flops)
        name = func.__name__
        if count is None:
            self.needed.other(func, name, args, results)
            self.elementwise += _elements(func, name, args, results)
        self._fold(func, name, args, kwargs or {}, results)
        for tensor in tree_leaves((args, kwargs)):
            source = self.alias.get(id(tensor)) if isinstance(tensor, Tensor) else None
            if source is None:
                continue
            full = self.sizes[source]
            if func.is_view and results and results[0].numel() == tensor.numel():
                for result in results:
                    self.alias[id(result)] = source
            elif any(word in name for word in _PARTIAL):
                gathered = sum(float(t.numel() * tensor.element_size()) for t in results)
                self.read[source] += 0.0 if name.startswith(("searchsorted", "bucketize")) else gathered
            else:
                self.read[source] = full
        return out

    def _fold(self, func: Any, name: str, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Keep the longest reduction: elements in per element out, or the length of the folded dimension."""
        operand = next((a for a in tree_leaves(args) if isinstance(a, Tensor)), None)
        if operand is None or not any(word in name for word in _FOLDING) or not operand.numel():
            return
        least = min((t.numel() for t in results if t.numel()), default=operand.numel())
        length = operand.numel() / least
        dim = _dimension(func, args, kwargs)
        if least == operand.numel() and type(dim) is int and -operand.dim() <= dim < operand.dim():
            length = operand.shape[dim]
        self.reduction = max(self.reduction, length)


def _heads_alike(func: Any, args: Any) -> Any:
    """The arguments with keys and values of as many heads as the queries have: torch 2.11 counts for these alone."""
    if not func.__name__.startswith("_scaled_dot_product"):
        return args
    first = 1 if "backward" in func.__name__ else 0
    query, *shared = args[first : first + 3]
    alike = (t[:, :1].expand(-1, query.shape[1], *t.shape[2:]) for t in shared)
    return (*args[: first + 1], *alike, *args[first + 3 :])


def _dimension(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator's argument ``dim`` is given; None without one."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args))
    return {**named, **kwargs}.get("dim")


def _elements(func: Any, name: str, args: Any, results: list[Tensor]) -> float:
    """Elements that an operator on floating-point tensors computes with; 0 for one that only moves data."""
    operands = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()]
    if not operands or func.is_view or any(word in name for word in (*_PARTIAL, *_MOVING)):
        return 0.0
    if torch.Tag.pointwise in func.tags:
        return float(max((t.numel() for t in results), default=0))
    if any(word in name for word in (*_FOLDING, *_EXTREMES)):
        return float(max(t.numel() for t in operands))
    return 0.0


def count(reference: Reference, inputs: list[Any]) -> Work:
    """Run the reference once on real tensors and count what it cannot avoid."""
    tensors = [t for t in inputs if isinstance(t, Tensor)] + list(reference.state.values())
    with torch.no_grad(), _Counter(tensors) as counter:
        outputs = reference(*inputs)
    read = sum(min(counter.read[i], counter.sizes[i]) * counter.needed.read(i) for i in counter.read)
    written = sum(float(t.numel() * t.element_size()) for t in outputs)
    elements_out = max(1, min((t.numel() for t in outputs if t.is_floating_point()), default=1))
    reduction = max(counter.reduction, counter.flops / 2 / elements_out)
    arithmetic = counter.flops + counter.elementwise
    return Work(read + written, counter.flops, counter.needed.flops, reduction, arithmetic)
