"""Softmax over the last dimension."""

import torch
import torch.nn as nn

family = "softmax"
ROWS, COLS = 2048, 2048
shapes = {
    "cpu": {"ROWS": 2048, "COLS": 2048},
    "gpu": {"ROWS": 16384, "COLS": 32768},
    "ragged": {"ROWS": 61, "COLS": 509},
}


class Model(nn.Module):
    def forward(self, x):
        return torch.softmax(x, dim=-1)


def get_inputs():
    return [torch.randn(ROWS, COLS)]
