"""ReLU and overlapping 3x3 max pooling with stride 2 (the stem of a ResNet)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

family = "pooling"
BATCH, CHANNELS, HEIGHT, WIDTH = 4, 64, 80, 80
shapes = {
    "cpu": {"BATCH": 4, "CHANNELS": 64, "HEIGHT": 80, "WIDTH": 80},
    "gpu": {"BATCH": 128, "CHANNELS": 64, "HEIGHT": 112, "WIDTH": 112},
    "ragged": {"BATCH": 3, "CHANNELS": 7, "HEIGHT": 23, "WIDTH": 19},
}


class Model(nn.Module):
    def forward(self, x):
        return F.max_pool2d(torch.relu(x), kernel_size=3, stride=2, padding=1)


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)]
