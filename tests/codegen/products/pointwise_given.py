"""A convolution of one tap in fp32 whose weight is an input."""

import torch
import torch.nn as nn

BATCH, INPUTS, OUTPUTS, SIZE = 4, 32, 32, 8
shapes = {"ragged": {"BATCH": 3, "INPUTS": 19, "OUTPUTS": 21, "SIZE": 5}}


class Model(nn.Module):
    def forward(self, x, weight):
        return torch.nn.functional.conv2d(x, weight)


def get_inputs():
    return [torch.randn(BATCH, INPUTS, SIZE, SIZE), torch.randn(OUTPUTS, INPUTS, 1, 1)]


def get_init_inputs():
    return []
