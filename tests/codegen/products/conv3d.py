"""A convolution over volumes in half precision: strides, padding and dilation of its own in every dimension."""

import torch
import torch.nn as nn

DEPTH = 8
shapes = {"ragged": {"DEPTH": 7}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(16, 24, 3, stride=(1, 2, 1), padding=(1, 0, 2), dilation=(1, 1, 2)).half()

    def forward(self, x):
        return torch.relu(self.conv(x))


def get_inputs():
    return [torch.randn(2, 16, DEPTH, 9, 7).half()]


def get_init_inputs():
    return []
