"""Linear layer followed by tanh-approximated GELU (the first half of a transformer's FFN)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

family = "matmul"
ROWS, INNER, COLS = 384, 512, 1024
shapes = {
    "cpu": {"ROWS": 384, "INNER": 512, "COLS": 1024},
    "gpu": {"ROWS": 8192, "INNER": 4096, "COLS": 16384},
    "ragged": {"ROWS": 67, "INNER": 101, "COLS": 139},
}


class Model(nn.Module):
    def __init__(self, inner, cols):
        super().__init__()
        self.linear = nn.Linear(inner, cols)

    def forward(self, x):
        return F.gelu(self.linear(x), approximate="tanh")


def get_inputs():
    return [torch.randn(ROWS, INNER)]


def get_init_inputs():
    return [INNER, COLS]
