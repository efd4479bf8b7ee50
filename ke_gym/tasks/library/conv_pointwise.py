"""Pointwise convolution, batch norm with running statistics and SiLU."""

import torch
import torch.nn as nn

family = "conv"
BATCH, CHANNELS, OUT_CHANNELS, HEIGHT, WIDTH = 8, 64, 128, 40, 40
shapes = {
    "cpu": {"BATCH": 8, "CHANNELS": 64, "OUT_CHANNELS": 128, "HEIGHT": 40, "WIDTH": 40},
    "gpu": {"BATCH": 64, "CHANNELS": 256, "OUT_CHANNELS": 512, "HEIGHT": 56, "WIDTH": 56},
    "ragged": {"BATCH": 3, "CHANNELS": 11, "OUT_CHANNELS": 23, "HEIGHT": 13, "WIDTH": 11},
}


class Model(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels).eval()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x * torch.sigmoid(x)


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)]


def get_init_inputs():
    return [CHANNELS, OUT_CHANNELS]
