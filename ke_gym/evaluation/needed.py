"""What masks leave needed of a task's products: no kernel has to compute a score that is hidden, or to read its key.

A bound, and in doubt too low: right kernels must not be refused for being too fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# A Winograd or FFT convolution legally does fewer multiplications than the direct count; attention that is causal half.
_SLACK = {"conv": 0.25, "attention": 0.5}
# Operators that leave every element what it was, or zero if it was.
_KEEPING = ("mul", "div", "neg", "clone", "_to_copy")
# ... and where it was, the matrices of a batch counted anew.
_ELEMENTWISE = (*_KEEPING, "view", "_unsafe_view", "unsqueeze", "squeeze", "detach", "alias")
_MOVING = ("clone", "copy", "expand", "repeat", "view", "unsqueeze")
_HIDDEN = -1e4
"""What a score is replaced by, or added to it, to hide it is at most this."""


@dataclass(eq=False)
class Product:
    """One product: its FLOPs, the share of them that any algorithm needs, and the inputs that its operands are.

    ``seen``: which of its elements no mask hides. ``whole``: all of them are needed elsewhere.
    """

    flops: float
    slack: float
    sources: tuple[int | None, ...]
    share: float = 1.0
    seen: Tensor | None = None
    whole: bool = False


@dataclass(frozen=True)
class Mask:
    """Where elements are ``seen``; the others are ``hidden`` by huge negative numbers, or zero. ``depends``: on inputs."""

    seen: Tensor
    hidden: bool
    depends: bool


class Needed:
    """Follows tensors through a task's operators, each of which has to be told of once, in order.

    Tensors are known by their ``id``: whoever tells of them keeps them.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self._products: list[Product] = []
        self._made: dict[int, Product] = {}  # tensors whose elements are a product's, one each
        self._used: set[int] = set()  # of those, the ones that something reads
        self._hidden: dict[int, float] = {}  # tensors that hold a huge negative number in all but this share
        self._zero: dict[int, float] = {}  # ... or zeros
        self._sources = {id(tensor): number for number, tensor in enumerate(inputs)}
        self._readers = [0] * len(inputs)
        self._given = {id(tensor) for tensor in inputs}  # what depends on inputs

    @property
    def flops(self) -> float:
        """FLOPs that any algorithm needs."""
        return sum(p.flops * p.slack * (1.0 if p.whole else p.share) for p in self._products)

    def read(self, number: int) -> float:
        """The share of an input that any algorithm has to read."""
        least = 1.0
        for product in self._products:
            for source, axis in zip(product.sources, (-1, -2)):
                if source == number and self._readers[number] == 1 and not product.whole:
                    least = min(least, _lines(product, axis))
        return least

    def product(self, func: Any, args: Any, results: list[Tensor], flops: float) -> None:
        """Tell of a product."""
        operands = [a for a in args if isinstance(a, Tensor)]
        self._use(operands, results, moving=False)
        slack = min((share for kind, share in _SLACK.items() if kind in str(func)), default=1.0)
        if "attention" in str(func) and len(operands) > 3:
            slack = 0.0  # who knows what its mask hides
        slack = min([slack, *(self._zero.get(id(t), 1.0) for t in operands)])
        made = Product(flops, slack, tuple(self._sources.get(id(t)) for t in operands[-2:]))
        self._products.append(made)
        self._made |= {id(tensor): made for tensor in results}

    def other(self, func: Any, name: str, args: Any, results: list[Tensor]) -> None:
        """Tell of an operator that is none."""
        given = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
        moving = func.is_view or any(word in name for word in _MOVING)
        self._use(given, results, moving)
        if len(results) != 1:
            return
        (result,) = results
        for tensor in given:
            if moving and id(tensor) in self._sources and _keeps_matrix(tensor, result):
                self._sources[id(result)] = self._sources[id(tensor)]
        same = [t for t in given if t.numel() == result.numel() and t.dtype != torch.bool]
        held = next((t for t in same if id(t) in self._made), same[0] if same else None)
        if held is None:
            return
        mask, made = self._mask(name, args, held), self._made.get(id(held))
        if made is not None and (mask is not None or name.startswith(_ELEMENTWISE)):
            self._made[id(result)] = made
            self._used.discard(id(result))  # of what is changed in place
            if mask is not None:
                _hide(made, mask)
        if mask is not None:
            share = 0.0 if mask.depends else _share(mask.seen)
            known = self._hidden if mask.hidden else self._zero
            known[id(result)] = share if made is None else min(share, made.share)
        elif "softmax" in name and id(held) in self._hidden:
            self._zero[id(result)] = self._hidden[id(held)]
        elif func.is_view or name.startswith(_KEEPING):
            for known in (self._hidden, self._zero):
                if id(held) in known:
                    known[id(result)] = known[id(held)]

    def _use(self, given: list[Tensor], results: list[Tensor], moving: bool) -> None:
        """Note who reads what; a product of which two read something is needed whole."""
        for tensor in {id(t): t for t in given}:
            if (made := self._made.get(tensor)) is not None:
                made.whole = made.whole or tensor in self._used
                self._used.add(tensor)
            if not moving and (source := self._sources.get(tensor)) is not None:
                self._readers[source] += 1
        if any(id(t) in self._given for t in given):
            self._given |= {id(t) for t in results}

    def _mask(self, name: str, args: Any, held: Tensor) -> Mask | None:
        """Where an operator leaves elements of ``held`` be, if it makes the others zero, or huge negative numbers."""
        seen: Tensor | None = None
        hidden, other = False, None
        if name.startswith("masked_fill") and args[0] is held:
            other, hidden = args[1], _huge(args[2])
            if hidden or _is_zero(args[2]):
                seen = torch.logical_not(args[1])
        elif name.startswith("where") and len(args) == 3:
            first = args[1] is held
            other, hidden = args[0], _huge(args[2 if first else 1])
            if hidden or _is_zero(args[2 if first else 1]):
                seen = args[0].bool() if first else torch.logical_not(args[0])
        elif name.startswith(("tril", "triu")) and id(held) not in self._made:
            seen = getattr(torch, name[:4])(held.new_ones(held.shape[-2:], dtype=torch.bool), *args[1:2])
        elif name.startswith(("add", "sub", "mul")) and id(held) in self._made and len(args) > 1:
            other = args[1] if args[0] is held else args[0]
            if not isinstance(other, Tensor) or not other.is_floating_point() or id(other) in self._made:
                return None
            if name.startswith("mul"):
                seen = other != 0
            elif args[0] is held or name.startswith("add"):
                seen, hidden = (other if name.startswith("add") else -other) > _HIDDEN, True
            if seen is not None and bool(seen.all()):
                return None
        if seen is None:
            return None
        return Mask(seen, hidden, isinstance(other, Tensor) and id(other) in self._given)


def _hide(product: Product, mask: Mask) -> None:
    """Of a product's elements only those that are seen are needed. A mask that depends on inputs may hide any of them."""
    if mask.depends:
        product.share, product.seen = 0.0, torch.zeros(1, 1, dtype=torch.bool, device=mask.seen.device)
        return
    seen = mask.seen if mask.seen.dim() > 1 else mask.seen.expand(1, -1)
    if product.seen is not None:
        try:
            seen = torch.logical_and(seen, product.seen)
        except RuntimeError:  # seen in another shape
            seen = min(seen, product.seen, key=_share)
    product.seen, product.share = seen, _share(seen)


def _lines(product: Product, axis: int) -> float:
    """The share of an operand's rows or columns of which any element of the product is seen."""
    return 1.0 if product.seen is None else _share(product.seen.any(dim=axis))


def _keeps_matrix(before: Tensor, after: Tensor) -> bool:
    """Whether the last two dimensions are the same still, or each other's."""
    return min(before.dim(), after.dim()) >= 2 and {*before.shape[-2:]} == {*after.shape[-2:]}


def _huge(value: Any) -> bool:
    return float(value) <= _HIDDEN if _is_number(value) else False


def _is_zero(value: Any) -> bool:
    return float(value) == 0.0 if _is_number(value) else False


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float))


def _share(mask: Tensor) -> float:
    return float(torch.count_nonzero(mask)) / max(1, mask.numel())
