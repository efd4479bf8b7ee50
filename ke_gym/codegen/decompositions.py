"""Into what operations the generator has others taken apart before it lowers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

from ke_gym.languages.plan import memory_order

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
# Operations the generator calls as they are: what the last one makes of infinities depends on its order of dimensions.
KEPT = (ATTENTION, aten.upsample_trilinear3d.vec)
EXTRA = (
    aten._log_softmax_backward_data,
    aten._softmax_backward_data,
    aten.native_layer_norm_backward,
    aten.native_group_norm_backward,
    aten.native_batch_norm_backward,
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten._fused_rms_norm,
    aten._fused_rms_norm_backward,
    aten.nll_loss_forward,
    aten.nll_loss_backward,
    aten.nll_loss2d_forward,
    aten.gelu_backward,
    aten.silu_backward,
    aten.sigmoid_backward,
    aten.tanh_backward,
    aten.hardtanh,
    aten.hardswish,
    aten.hardsigmoid,
    aten.leaky_relu,
    aten.leaky_relu_backward,
    aten.elu,
    aten.mish,
    aten.softplus,
    aten.threshold_backward,
    aten.addcmul,
    aten.addcdiv,
    aten.lerp,
    aten.logit,
    aten.log_sigmoid_forward,
    aten.glu,
    aten.huber_loss,
    aten.smooth_l1_loss,
    aten.mse_loss,
    aten.binary_cross_entropy,
    aten.binary_cross_entropy_with_logits,
    aten.soft_margin_loss,
    aten.celu,
    aten._prelu_kernel,
    aten.rsub,
    aten.std,
    aten.std_mean,
    aten.logsumexp,
    aten.masked_fill,
    aten.tril,
    aten.triu,
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.replication_pad1d,
    aten.replication_pad2d,
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.select_backward,
    aten.slice_backward,
    aten.diagonal_backward,
    aten.trace,
    aten.linspace,
    aten.frac,
    aten.xlogy,
    aten.nan_to_num,
    aten.masked_fill_,
    aten.linalg_vector_norm,
    aten.dot,
    aten.mv,
    aten.addmv,
    aten.count_nonzero,
    aten.unfold_copy,
    aten._trilinear,
)


def decompositions(language: str) -> dict[Any, Callable[..., Any]]:
    """By operation, what computes the same by simpler ones, for kernels in a language ("cpp": on a CPU)."""
    table = dict(torch.export.default_decompositions().items())  # type: ignore[no-untyped-call]
    table.update(get_decompositions(list(EXTRA)))
    for op in KEPT:
        table.pop(op, None)
    table |= OWN
    return table | VECTORIZED if language == "cpp" else table


def _smooth_l1_loss_backward(grad: Tensor, x: Tensor, y: Tensor, reduction: int, beta: float) -> Tensor:
    """With NaN where the difference is NaN, which torch's own decomposition takes for a large one of no sign."""
    away = x - y
    share = 1.0 / away.numel() if reduction == 1 else 1.0
    steep = torch.where(away <= -beta, -share * grad, share * grad)
    return torch.where((away <= -beta) | (away >= beta), steep, share * away * grad / beta)


def _lstm(inputs: Tensor, hidden: tuple[Tensor, Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own, whose last states have an axis too many in torch 2.11 where the batch is larger than one."""
    from torch._decomp.decompositions import lstm_impl

    made, last, cell = lstm_impl(inputs, hidden, *rest)
    return made, last.reshape(hidden[0].shape), cell.reshape(hidden[1].shape)


def _as_strided_scatter(
    x: Tensor, written: Tensor, size: list[int], stride: list[int], offset: int | None = None
) -> Tensor:
    """By the places in the memory of ``x``, which is dense, that ``written`` goes to."""
    order, back = memory_order(x.stride())
    dense = x.permute(order)
    places = torch.full((), offset or 0, device=x.device)
    for count, step in zip(size, stride):
        places = places.unsqueeze(-1) + torch.arange(count, device=x.device) * step
    flat = dense.reshape(-1).index_put((places.reshape(-1),), written.reshape(-1))
    return flat.view(dense.shape).permute(back)


# ``_conj`` only marks a tensor, which a library call's argument, a place in memory, is not.
OWN: dict[Any, Callable[..., Any]] = {
    aten.as_strided_scatter.default: _as_strided_scatter,
    aten.lstm.input: _lstm,
    aten.smooth_l1_loss_backward.default: _smooth_l1_loss_backward,
    aten._conj.default: aten._conj_physical.default,
}

# What torch's vectorized loops on a CPU make of NaN, unlike its decompositions, its GPU kernels, and what is left over of
# a loop, fewer elements than a vector has: ATen/native/cpu/Activation.cpp.


def _hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return torch.where((x > low) & (x < high), grad, 0.0)


def _hardswish_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.where(x <= -3.0, 0.0, torch.where(x >= 3.0, grad, grad * (x / 3.0 + 0.5)))


def _elu_backward(
    grad: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor
) -> Tensor:
    if is_result:
        below = grad * input_scale * (x + alpha * scale)
    else:
        below = grad * input_scale * alpha * scale * torch.exp(x * input_scale)
    return torch.where(x > 0, grad * scale, below)


VECTORIZED: dict[Any, Callable[..., Any]] = {
    aten.hardtanh_backward.default: _hardtanh_backward,
    aten.hardswish_backward.default: _hardswish_backward,
    aten.elu_backward.default: _elu_backward,
}
