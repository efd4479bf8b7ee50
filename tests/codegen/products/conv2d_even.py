"""A convolution over images in half precision, dilated, of even width."""

import torch
import torch.nn as nn

HEIGHT = 16
shapes = {"ragged": {"HEIGHT": 11}}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3, stride=(2, 1), padding=(2, 3), dilation=(1, 3), bias=False).half()

    def forward(self, x):
        return self.conv(x) * 0.5


def get_inputs():
    return [torch.randn(2, 16, HEIGHT, 18).half()]


def get_init_inputs():
    return []
