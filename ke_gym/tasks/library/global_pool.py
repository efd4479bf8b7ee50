"""Global average and maximum of every channel, concatenated."""

import torch
import torch.nn as nn

family = "pooling"
BATCH, CHANNELS, HEIGHT, WIDTH = 40, 256, 32, 32
shapes = {
    "cpu": {"BATCH": 40, "CHANNELS": 256, "HEIGHT": 32, "WIDTH": 32},
    "gpu": {"BATCH": 256, "CHANNELS": 1024, "HEIGHT": 32, "WIDTH": 32},
    "ragged": {"BATCH": 5, "CHANNELS": 29, "HEIGHT": 13, "WIDTH": 17},
}


class Model(nn.Module):
    def forward(self, x):
        return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


def get_inputs():
    return [torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)]
