"""A small product of long rows by long columns, as the gradient of a weight is."""

import torch
import torch.nn as nn

DEPTH = 4096
shapes = {"ragged": {"DEPTH": 1100}}


class Model(nn.Module):
    def forward(self, a, b):
        return a.t() @ b


def get_inputs():
    return [torch.randn(DEPTH, 40), torch.randn(DEPTH, 48)]


def get_init_inputs():
    return []
