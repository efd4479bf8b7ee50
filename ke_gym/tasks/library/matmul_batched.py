"""Many small matrix products with a bias and ReLU (experts, or heads)."""

import math

import torch
import torch.nn as nn

family = "matmul"
BATCH, ROWS, INNER, COLS = 192, 64, 96, 128
shapes = {
    "cpu": {"BATCH": 192, "ROWS": 64, "INNER": 96, "COLS": 128},
    "gpu": {"BATCH": 4096, "ROWS": 128, "INNER": 128, "COLS": 256},
    "ragged": {"BATCH": 7, "ROWS": 13, "INNER": 29, "COLS": 31},
}


class Model(nn.Module):
    def __init__(self, batch, inner, cols):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(batch, inner, cols) / math.sqrt(inner))
        self.bias = nn.Parameter(torch.randn(batch, 1, cols))

    def forward(self, x):
        return torch.relu(torch.bmm(x, self.weight) + self.bias)


def get_inputs():
    return [torch.randn(BATCH, ROWS, INNER)]


def get_init_inputs():
    return [BATCH, INNER, COLS]
