"""Loops that rows of one norm and channels of another do not share."""

import torch
import torch.nn as nn
import torch.nn.functional as F

backward = True


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 1, bias=False)
        self.first = nn.InstanceNorm2d(8, affine=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.softmax(x, 1)
        x = self.first(x + self.mix(x))
        x = x + F.relu(self.second(self.conv(x)))
        return x.flatten(1).sum(-1)


def get_inputs():
    return [torch.randn(2, 8, 7, 10)]
