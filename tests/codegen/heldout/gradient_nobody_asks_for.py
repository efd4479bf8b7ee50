"""Gradients of a convolution, of which the one of what it convolves is not asked for: the library call gives None for it."""

import torch
import torch.nn as nn

backward = True


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, bias=False)

    def forward(self, x):
        return self.conv(x.detach()) * x.mean(dim=1, keepdim=True)[..., 1:-1, 1:-1]


def get_inputs():
    return [torch.randn(4, 16, 18, 18)]


def get_init_inputs():
    return []
