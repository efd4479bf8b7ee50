"""A convolution over images in fp32, every other row, behind it a norm and an activation; then one of one tap."""

import torch
import torch.nn as nn

HEIGHT = 16
shapes = {"ragged": {"HEIGHT": 11}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(24, 20, (3, 2), stride=(2, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(20).eval()
        self.down = nn.Conv2d(20, 36, 1, stride=2, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.norm(self.conv(x))))


def get_inputs():
    return [torch.randn(2, 24, HEIGHT, 9)]


def get_init_inputs():
    return []
