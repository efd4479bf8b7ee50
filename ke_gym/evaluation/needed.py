"""What masks leave needed of a task's products: no kernel has to compute a score that is hidden, or to read its key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# A Winograd or FFT convolution legally does fewer multiplications than the direct count; attention that is causal half.
_SLACK = {"conv": 0.25, "attention": 0.5}
# Operators, besides pointwise ones and views, after which an element is still the one that was masked.
_KEEPING = ("softmax", "clone", "copy", "view")
# ... and after which a tensor holds nothing but an input's elements.
_MOVING = ("clone", "copy", "expand", "repeat", "transpose", "permute", "view")
_HIDDEN = -1e4
"""What is added to a score to hide it is at most this."""


@dataclass
class Product:
    """One product: its FLOPs and the share of them that any algorithm needs, and the inputs that its operands are."""

    flops: float
    share: float
    sources: tuple[int | None, ...]


class Needed:
    """Follows tensors through a task's operators, each of which has to be told of once, in order.

    Tensors are known by their ``id``: whoever tells of them keeps them.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self.products: list[Product] = []
        self.read = [1.0] * len(inputs)
        """The share of each input that any algorithm has to read."""
        self._made: dict[int, Product] = {}  # tensors whose elements are a product's, one each
        self._shares: dict[int, float] = {}  # tensors that were masked: the share that was not
        self._sources = {id(tensor): number for number, tensor in enumerate(inputs)}

    @property
    def flops(self) -> float:
        return sum(product.flops * product.share for product in self.products)

    def product(self, func: Any, args: Any, results: list[Tensor], flops: float) -> None:
        """Tell of a product."""
        operands = [a for a in args if isinstance(a, Tensor)]
        slack = min((share for kind, share in _SLACK.items() if kind in str(func)), default=1.0)
        share = min([slack, *(self._shares.get(id(t), 1.0) for t in operands)])
        made = Product(flops, share, tuple(self._sources.get(id(t)) for t in operands[-2:]))
        self.products.append(made)
        self._made |= {id(tensor): made for tensor in results}

    def other(self, func: Any, name: str, args: Any, results: list[Tensor]) -> None:
        """Tell of an operator that is none."""
        for result in results[:1]:
            given = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
            self._follow(func, name, given, result)
            added = name.startswith("add")  # what is added to anything but scores hides nothing
            mask = (
                None if added and not any(id(t) in self._made for t in given) else _mask(name, args, result)
            )
            pointwise = torch.Tag.pointwise in func.tags
            if mask is None and not (pointwise or func.is_view or any(word in name for word in _KEEPING)):
                continue
            same = [t for t in given if t.numel() == result.numel()]
            share = 1.0 if mask is None else _share(mask)
            if (least := min([share, *(self._shares.get(id(t), 1.0) for t in same)])) < 1.0:
                self._shares[id(result)] = least
            product = next((self._made[id(t)] for t in same if id(t) in self._made), None)
            if product is not None and "softmax" not in name:
                self._made[id(result)] = product
                if mask is not None:
                    self._hide(product, mask, share)

    def _follow(self, func: Any, name: str, given: list[Tensor], result: Tensor) -> None:
        source = next((self._sources[id(t)] for t in given if id(t) in self._sources), None)
        if source is not None and (func.is_view or any(word in name for word in _MOVING)):
            self._sources[id(result)] = source

    def _hide(self, product: Product, seen: Tensor, share: float) -> None:
        """Of a product's elements only those ``seen`` are needed: fewer FLOPs, and whole rows and columns of operands."""
        product.share = min(product.share, share)
        for source, axis in zip(product.sources, (-1, -2)):
            if source is not None:
                line = seen.any(dim=axis) if seen.dim() >= -axis else seen
                self.read[source] = min(self.read[source], _share(line))


def _mask(name: str, args: Any, result: Tensor) -> Tensor | None:
    """Where an operator leaves elements be that it elsewhere replaces by a constant, or hides by a huge negative number."""
    if name.startswith("masked_fill"):
        return torch.logical_not(args[1])
    if name.startswith("where") and len(args) == 3:
        full = [isinstance(a, Tensor) and 1 < a.numel() == result.numel() for a in args[1:]]
        if full[0] != full[1]:
            return torch.logical_not(args[0]) if full[1] else args[0].bool()
    if name.startswith("add") and isinstance(args[1], Tensor) and args[1].is_floating_point():
        hiding = [a > _HIDDEN for a in args[:2] if isinstance(a, Tensor) and a.numel()]
        return min(hiding, key=_share, default=None)
    if name.startswith(("tril", "triu")):
        return result != 0
    return None


def _share(mask: Tensor) -> float:
    return float(torch.count_nonzero(mask)) / max(1, mask.numel())
