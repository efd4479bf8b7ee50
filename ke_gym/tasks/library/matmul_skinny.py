"""A few rows through a large linear layer and SiLU (decoding one token per sequence)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

family = "matmul"
ROWS, INNER, COLS = 4, 2048, 2048
shapes = {
    "cpu": {"ROWS": 4, "INNER": 2048, "COLS": 2048},
    "gpu": {"ROWS": 8, "INNER": 8192, "COLS": 28672},
    "ragged": {"ROWS": 3, "INNER": 521, "COLS": 263},
}


class Model(nn.Module):
    def __init__(self, inner, cols):
        super().__init__()
        self.linear = nn.Linear(inner, cols, bias=False)

    def forward(self, x):
        return F.silu(self.linear(x))


def get_inputs():
    return [torch.randn(ROWS, INNER)]


def get_init_inputs():
    return [INNER, COLS]
