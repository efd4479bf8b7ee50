"""LayerNorm over the last dimension, after a residual addition."""

import torch
import torch.nn as nn

family = "norm"
ROWS, COLS = 4096, 1024
shapes = {
    "cpu": {"ROWS": 4096, "COLS": 1024},
    "gpu": {"ROWS": 16384, "COLS": 8192},
    "ragged": {"ROWS": 53, "COLS": 331},
}


class Model(nn.Module):
    def __init__(self, cols):
        super().__init__()
        self.norm = nn.LayerNorm(cols)

    def forward(self, x, residual):
        return self.norm(x + residual)


def get_inputs():
    return [torch.randn(ROWS, COLS), torch.randn(ROWS, COLS)]


def get_init_inputs():
    return [COLS]
