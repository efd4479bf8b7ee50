"""Convolution over time, kernel 3, half precision: KernelEvolve's showcase, at its shape."""

import torch
import torch.nn as nn

family = "conv"
BATCH, CHANNELS, LENGTH, DTYPE = 32, 96, 200, torch.float32
shapes = {
    "cpu": {"BATCH": 32},
    "gpu": {"BATCH": 2048, "DTYPE": torch.float16},
}


class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size=3, padding=1, dtype=DTYPE)

    def forward(self, x):
        return self.conv(x)


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, LENGTH, dtype=DTYPE)]


def get_init_inputs():
    return [CHANNELS]
