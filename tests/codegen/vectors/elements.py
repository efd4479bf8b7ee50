"""Elements in whole vectors of half precision, some of them of a repeated row or column."""

import torch
import torch.nn as nn

ROWS = 64
shapes = {"ragged": {"ROWS": 37}}


class Model(nn.Module):
    def forward(self, x, bias, gate):
        return torch.relu(x + bias) * gate


def get_inputs():
    x = torch.randn(ROWS, 64)
    return [x.bfloat16(), torch.randn(64).bfloat16(), torch.rand(ROWS, 1).bfloat16()]


def get_init_inputs():
    return []
