"""LayerNorm, forward and backward."""

import torch
import torch.nn as nn

family = "norm"
backward = True
ROWS, COLS = 2048, 1024
shapes = {
    "cpu": {"ROWS": 2048, "COLS": 1024},
    "gpu": {"ROWS": 16384, "COLS": 4096},
    "ragged": {"ROWS": 37, "COLS": 241},
}


class Model(nn.Module):
    def __init__(self, cols):
        super().__init__()
        self.norm = nn.LayerNorm(cols)

    def forward(self, x):
        return self.norm(x)


def get_inputs():
    return [torch.randn(ROWS, COLS)]


def get_init_inputs():
    return [COLS]
