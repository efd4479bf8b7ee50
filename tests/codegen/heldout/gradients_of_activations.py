"""Gradients of activations and a loss, which for NaN are not what torch's own decompositions say."""

import torch
import torch.nn as nn
import torch.nn.functional as F

backward = True


class Model(nn.Module):
    def forward(self, x, y, z, u):
        return (
            F.hardtanh(x, -0.3, 0.7) * 2.0,
            F.elu(y) * 2.0,
            F.hardswish(z) * 2.0,
            F.smooth_l1_loss(u, x, reduction="none"),
        )


def get_inputs():
    return [torch.randn(64, 128) for _ in range(4)]


def get_init_inputs():
    return []
