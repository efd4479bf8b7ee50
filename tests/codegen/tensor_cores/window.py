"""A convolution along one to three axes, with what follows it."""

import torch
import torch.nn as nn

BATCH, INPUTS, OUTPUTS, SIZES, TAPS, STRIDE, PADDING, DILATION = 2, 16, 40, (12, 20), 3, 1, 1, 1
BIAS, DTYPE = True, torch.float16
shapes = {"cpu": {}, "gpu": {}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(SIZES) - 1]
        self.conv = kind(
            INPUTS, OUTPUTS, TAPS, stride=STRIDE, padding=PADDING, dilation=DILATION, bias=BIAS, dtype=DTYPE
        )

    def forward(self, x):
        return torch.relu(self.conv(x)) * 0.5


def get_inputs():
    return [torch.randn(BATCH, INPUTS, *SIZES, dtype=DTYPE)]


def get_init_inputs():
    return []
