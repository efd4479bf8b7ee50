"""Instance normalization over the pixels of each image and channel."""

import torch
import torch.nn as nn

family = "norm"
BATCH, CHANNELS, HEIGHT, WIDTH = 12, 64, 64, 64
shapes = {
    "cpu": {"BATCH": 12, "CHANNELS": 64, "HEIGHT": 64, "WIDTH": 64},
    "gpu": {"BATCH": 32, "CHANNELS": 128, "HEIGHT": 128, "WIDTH": 128},
    "ragged": {"BATCH": 3, "CHANNELS": 7, "HEIGHT": 19, "WIDTH": 17},
}


class Model(nn.Module):
    """Ulyanov et al., "Instance Normalization", 2016."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x):
        return self.norm(x)


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)]


def get_init_inputs():
    return [CHANNELS]
