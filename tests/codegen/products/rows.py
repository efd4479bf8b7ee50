"""Products of a batch in fp32, the second operands with their rows in memory."""

import torch
import torch.nn as nn

ROWS = 64
shapes = {"ragged": {"ROWS": 37}}


class Model(nn.Module):
    def forward(self, a, b):
        return torch.relu(a @ b)


def get_inputs():
    return [torch.randn(3, ROWS, 72), torch.randn(3, 72, 52)]


def get_init_inputs():
    return []
