"""A convolution in half precision, strided, with bias."""

import torch
import torch.nn as nn

LENGTH = 64
shapes = {"ragged": {"LENGTH": 53}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(24, 20, 3, stride=2, padding=1).half()

    def forward(self, x):
        return torch.relu(self.conv(x))


def get_inputs():
    return [torch.randn(3, 24, LENGTH).half()]


def get_init_inputs():
    return []
