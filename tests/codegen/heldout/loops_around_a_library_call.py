"""Loops before a library call and behind it, between which others would have to run if they were one."""

import torch
import torch.nn as nn

backward = True


class Model(nn.Module):
    def forward(self, x, y):
        return torch.where(x.t() > 0, y, torch.lgamma(y.abs() + 1.0)) * 1.5


def get_inputs():
    return [torch.randn(96, 64), torch.randn(64, 96)]


def get_init_inputs():
    return []
