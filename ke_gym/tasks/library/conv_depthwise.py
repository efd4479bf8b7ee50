"""Depthwise 3x3 convolution with bias and ReLU6 (MobileNet)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

family = "conv"
BATCH, CHANNELS, HEIGHT, WIDTH = 8, 96, 56, 56
shapes = {
    "cpu": {"BATCH": 8, "CHANNELS": 96, "HEIGHT": 56, "WIDTH": 56},
    "gpu": {"BATCH": 128, "CHANNELS": 192, "HEIGHT": 112, "WIDTH": 112},
    "ragged": {"BATCH": 3, "CHANNELS": 13, "HEIGHT": 17, "WIDTH": 19},
}


class Model(nn.Module):
    """Howard et al., "MobileNets", 2017."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, x):
        return F.relu6(self.conv(x))


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)]


def get_init_inputs():
    return [CHANNELS]
