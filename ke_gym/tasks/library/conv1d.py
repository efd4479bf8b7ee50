"""Convolution over time, kernel 3, 96 channels, length 200 (KernelEvolve's showcase)."""

import torch
import torch.nn as nn

family = "conv"
BATCH, CHANNELS, LENGTH = 32, 96, 200
shapes = {
    "cpu": {"BATCH": 32, "CHANNELS": 96, "LENGTH": 200},
    "gpu": {"BATCH": 2048, "CHANNELS": 96, "LENGTH": 200},
    "ragged": {"BATCH": 3, "CHANNELS": 24, "LENGTH": 53},
}


class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x):
        return self.conv(x)


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, LENGTH)]


def get_init_inputs():
    return [CHANNELS]
