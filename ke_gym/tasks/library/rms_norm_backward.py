"""RMSNorm, forward and backward."""

import torch
import torch.nn as nn

family = "norm"
backward = True
ROWS, COLS = 1024, 1024
shapes = {
    "cpu": {"ROWS": 1024, "COLS": 1024},
    "gpu": {"ROWS": 16384, "COLS": 4096},
    "ragged": {"ROWS": 31, "COLS": 251},
}


class Model(nn.Module):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019."""

    def __init__(self, cols):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(cols))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * self.weight


def get_inputs():
    return [torch.randn(ROWS, COLS)]


def get_init_inputs():
    return [COLS]
