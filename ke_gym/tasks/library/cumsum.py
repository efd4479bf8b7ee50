"""Cumulative sum along each row."""

import torch
import torch.nn as nn

family = "scan"
ROWS, COLS = 4096, 1024
shapes = {
    "cpu": {"ROWS": 4096, "COLS": 1024},
    "gpu": {"ROWS": 16384, "COLS": 16384},
    "ragged": {"ROWS": 97, "COLS": 311},
}


class Model(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, dim=1)


def get_inputs():
    return [torch.randn(ROWS, COLS)]
