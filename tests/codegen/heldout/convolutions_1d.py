import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, channels, features):
        super().__init__()
        self.dilated = nn.Conv1d(channels, features, 3, stride=2, dilation=3, bias=False)
        self.transposed = nn.ConvTranspose1d(features, channels, 5, stride=2, padding=1, output_padding=1)

    def forward(self, x):
        return self.transposed(torch.relu(self.dilated(x)))


def get_inputs():
    return [torch.randn(3, 6, 61)]


def get_init_inputs():
    return [6, 8]
