"""GroupNorm followed by SiLU, as between the convolutions of a diffusion model."""

import torch
import torch.nn as nn

family = "norm"
BATCH, CHANNELS, HEIGHT, WIDTH = 8, 128, 48, 48
shapes = {
    "cpu": {"BATCH": 8, "CHANNELS": 128, "HEIGHT": 48, "WIDTH": 48},
    "gpu": {"BATCH": 32, "CHANNELS": 320, "HEIGHT": 64, "WIDTH": 64},
    "ragged": {"BATCH": 3, "CHANNELS": 24, "HEIGHT": 13, "WIDTH": 11},
}


class Model(nn.Module):
    """Wu and He, "Group Normalization", 2018."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, x):
        x = self.norm(x)
        return x * torch.sigmoid(x)


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)]


def get_init_inputs():
    return [CHANNELS]
