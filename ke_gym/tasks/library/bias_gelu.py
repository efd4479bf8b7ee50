"""Bias and exact GELU over the rows of a projection's output."""

import torch
import torch.nn as nn
import torch.nn.functional as F

family = "pointwise"
ROWS, COLS = 2048, 2048
shapes = {
    "cpu": {"ROWS": 2048, "COLS": 2048},
    "gpu": {"ROWS": 16384, "COLS": 8192},
    "ragged": {"ROWS": 37, "COLS": 131},
}


class Model(nn.Module):
    def __init__(self, cols):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(cols))

    def forward(self, x):
        return F.gelu(x + self.bias)


def get_inputs():
    return [torch.randn(ROWS, COLS)]


def get_init_inputs():
    return [COLS]
