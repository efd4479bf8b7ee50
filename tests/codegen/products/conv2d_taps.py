"""A convolution over images in fp32 whose taps are whole blocks of channels."""

import torch
import torch.nn as nn

HEIGHT = 8
shapes = {"ragged": {"HEIGHT": 5}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 20, (3, 1), padding=(1, 0))

    def forward(self, x):
        return self.conv(x)


def get_inputs():
    return [torch.randn(2, 32, HEIGHT, 5)]


def get_init_inputs():
    return []
