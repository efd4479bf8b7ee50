"""Rotary position embedding of queries: halves rotated by position-dependent angles."""

import torch
import torch.nn as nn

family = "pointwise"
BATCH, LENGTH, HEADS, DIM = 8, 512, 8, 64
shapes = {
    "cpu": {"BATCH": 8, "LENGTH": 512, "HEADS": 8, "DIM": 64},
    "gpu": {"BATCH": 8, "LENGTH": 4096, "HEADS": 32, "DIM": 128},
    "ragged": {"BATCH": 2, "LENGTH": 37, "HEADS": 3, "DIM": 22},
}


class Model(nn.Module):
    """Su et al., "RoFormer", 2021."""

    def forward(self, x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
        return x * cos[:, None, :] + rotated * sin[:, None, :]


def get_inputs():
    x = torch.randn(BATCH, LENGTH, HEADS, DIM)
    frequency = 10000 ** (-torch.arange(0, DIM, 2) / DIM)
    angle = torch.outer(torch.arange(LENGTH) + torch.rand(()), torch.cat([frequency, frequency]))
    return [x, angle.cos(), angle.sin()]
