"""RMSNorm over the last dimension with a learned weight."""

import torch
import torch.nn as nn

family = "norm"
ROWS, COLS = 2048, 2048
shapes = {
    "cpu": {"ROWS": 2048, "COLS": 2048},
    "gpu": {"ROWS": 16384, "COLS": 8192},
    "ragged": {"ROWS": 43, "COLS": 389},
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
