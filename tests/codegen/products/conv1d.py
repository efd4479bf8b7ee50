"""A convolution over time in half precision, its channels a multiple of 16."""

import torch
import torch.nn as nn

LENGTH = 64
shapes = {"ragged": {"LENGTH": 62}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(48, 40, 3, padding=1).half()

    def forward(self, x):
        return torch.relu(self.conv(x))


def get_inputs():
    return [torch.randn(3, 48, LENGTH).half()]


def get_init_inputs():
    return []
