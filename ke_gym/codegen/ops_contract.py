"""Lowering of contractions: the product stays a library call that a schedule may take over.

A bias is a pointwise node of its own, except in half precision: there the library rounds once, after the bias.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Expr, Index, cast
from ke_gym.codegen.graph import Tensor
from ke_gym.codegen.lower import Lowering, rule
from ke_gym.codegen.ops_window import MAX_TAPS, depthwise
from ke_gym.codegen.tensors import broadcast, element, literal, op, reshape


@rule("addmm.default", "baddbmm.default")
def addmm(low: Lowering, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """alpha a b + beta bias, as a product and a pointwise node."""
    assert low.current is not None
    target = "aten.mm.default" if len(a.shape) == 2 else "aten.bmm.default"
    shape, dtype = low.result()
    if dtype in ("bf16", "f16"):
        raise Illegal("the product would be rounded before the bias is added")
    product = low.extern(target, (a, b), {}, low.current.meta["val"])
    wide = broadcast(bias, shape)

    def value(index: tuple[Index, ...]) -> Expr:
        result, shift = element(product, index), cast(element(wide, index), dtype)
        result = result if alpha == 1 else op("mul", result, literal(alpha, dtype))
        if beta == 0:  # whatever the bias is, NaN included
            return result
        return op("add", result, shift if beta == 1 else op("mul", shift, literal(beta, dtype)))

    return low.compute(shape, dtype, value)


@rule("convolution.default")
def convolution(low: Lowering, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """A convolution without bias, then the bias; a small depthwise one is a stencil."""
    assert low.current is not None
    dtype = low.result()[1]
    result = low.current.meta["val"]
    stride, padding, dilation, transposed, _, groups = rest
    small = not transposed and groups == x.shape[1] and math.prod(weight.shape[2:]) <= MAX_TAPS
    if small and result.is_contiguous():
        return depthwise(low, x, weight, bias, stride, padding, dilation)
    if bias is None or dtype in ("bf16", "f16") or not result.is_contiguous():
        raise Illegal("called as it is")
    product = low.extern("aten.convolution.default", (x, weight, None, *rest), {}, torch.empty_like(result))
    return shifted(low, product, bias)


def shifted(low: Lowering, product: Tensor, bias: Tensor) -> Tensor:
    """``product`` plus one value a channel."""
    shape, dtype = low.result()
    wide = broadcast(reshape(bias, (1, shape[1], *(1 for _ in shape[2:]))), shape)
    return low.compute(shape, dtype, lambda i: op("add", element(product, i), element(wide, i)))
