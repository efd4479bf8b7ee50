"""Linear layer scaled per channel and added to its residual (the second half of an FFN)."""

import torch
import torch.nn as nn

family = "matmul"
ROWS, INNER, COLS = 512, 1024, 512
shapes = {
    "cpu": {"ROWS": 512, "INNER": 1024, "COLS": 512},
    "gpu": {"ROWS": 8192, "INNER": 16384, "COLS": 4096},
    "ragged": {"ROWS": 71, "INNER": 103, "COLS": 149},
}


class Model(nn.Module):
    def __init__(self, inner, cols):
        super().__init__()
        self.linear = nn.Linear(inner, cols)
        self.scale = nn.Parameter(0.1 * torch.randn(cols))

    def forward(self, x, residual):
        return residual + self.scale * self.linear(x)


def get_inputs():
    return [torch.randn(ROWS, INNER), torch.randn(ROWS, COLS)]


def get_init_inputs():
    return [INNER, COLS]
