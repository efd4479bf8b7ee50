"""Softmax with a temperature in half precision."""

import torch
import torch.nn as nn

family = "softmax"
ROWS, COLS = 4096, 1024
shapes = {
    "cpu": {"ROWS": 4096, "COLS": 1024},
    "gpu": {"ROWS": 16384, "COLS": 16384},
    "ragged": {"ROWS": 53, "COLS": 379},
}


class Model(nn.Module):
    def forward(self, x):
        return torch.softmax(x / 0.7, dim=-1)


def get_inputs():
    return [torch.randn(ROWS, COLS, dtype=torch.float16)]
