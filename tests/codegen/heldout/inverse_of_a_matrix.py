"""Inverses, of which the library looks at whether there are any."""

import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(torch.tanh(x) * 0.01 + torch.eye(64)) * 2.0


def get_inputs():
    return [torch.randn(3, 64, 64)]


def get_init_inputs():
    return []
