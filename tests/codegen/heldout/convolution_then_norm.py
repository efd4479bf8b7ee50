"""The gradient of the convolution's bias is zero: what is computed of it is nothing but rounding."""

import torch
import torch.nn as nn

backward = True


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


def get_inputs():
    return [torch.randn(4, 8, 16, 16)]
