"""A convolution of one tap in fp32: products that share their left operand."""

import torch
import torch.nn as nn

HEIGHT = 16
shapes = {"ragged": {"HEIGHT": 10}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(40, 24, 1)

    def forward(self, x):
        return self.conv(x)


def get_inputs():
    return [torch.randn(2, 40, HEIGHT, 12)]


def get_init_inputs():
    return []
