import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, channels, features):
        super().__init__()
        self.conv = nn.Conv3d(channels, features, (3, 3, 1), padding=(1, 0, 0))
        self.transposed = nn.ConvTranspose3d(features, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.transposed(F.leaky_relu(self.conv(x)))


def get_inputs():
    return [torch.randn(1, 3, 6, 9, 8)]


def get_init_inputs():
    return [3, 5]
