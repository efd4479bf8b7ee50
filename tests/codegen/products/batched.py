"""Products of a batch, the second operands transposed in memory."""

import torch
import torch.nn as nn

ROWS = 64
shapes = {"ragged": {"ROWS": 125}}


class Model(nn.Module):
    def forward(self, a, b):
        return torch.bmm(a, b.transpose(1, 2)) * 0.5


def get_inputs():
    return [torch.randn(3, ROWS, 108), torch.randn(3, 124, 108)]


def get_init_inputs():
    return []
