"""A linear layer in half precision with more tiles than there are multiprocessors, the last of them cut off."""

import torch
import torch.nn as nn

ROWS = 64
shapes = {"ragged": {"ROWS": 760}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(72, 1480).half()

    def forward(self, x):
        return torch.relu(self.linear(x))


def get_inputs():
    return [torch.randn(ROWS, 72).half()]


def get_init_inputs():
    return []
