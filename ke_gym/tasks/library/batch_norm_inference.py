"""BatchNorm with its running statistics, residual and ReLU (the tail of a ResNet block)."""

import torch
import torch.nn as nn

family = "norm"
BATCH, CHANNELS, HEIGHT, WIDTH = 10, 128, 56, 56
shapes = {
    "cpu": {"BATCH": 10, "CHANNELS": 128, "HEIGHT": 56, "WIDTH": 56},
    "gpu": {"BATCH": 64, "CHANNELS": 256, "HEIGHT": 56, "WIDTH": 56},
    "ragged": {"BATCH": 3, "CHANNELS": 17, "HEIGHT": 13, "WIDTH": 11},
}


class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels).eval()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x, residual):
        return torch.relu(self.norm(x) + residual)


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH), torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)]


def get_init_inputs():
    return [CHANNELS]
