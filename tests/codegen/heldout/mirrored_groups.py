"""Sums of groups, read from the far end: quotients of what counts down."""

import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(48)

    def forward(self, x):
        x = x.reshape(1, 8, 12, 4).sum(-1).repeat_interleave(4, -1) + x
        x = x.flip(2) + x
        return self.norm(x.transpose(1, 2))


def get_inputs():
    return [torch.randn(1, 8, 48)]
