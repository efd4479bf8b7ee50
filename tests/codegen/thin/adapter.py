"""A linear layer with a low-rank adapter of ten columns and a scale that is no power of two, behind it a ReLU."""

import torch
import torch.nn as nn

ROWS = 64
shapes = {"ragged": {"ROWS": 37}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(72, 52)
        self.down = nn.Parameter(torch.randn(72, 10) / 8)
        self.up = nn.Parameter(torch.randn(10, 52) / 4)

    def forward(self, x):
        return torch.relu(self.linear(x) + (x @ self.down @ self.up) * 0.7)


def get_inputs():
    return [torch.randn(ROWS, 72)]


def get_init_inputs():
    return []
