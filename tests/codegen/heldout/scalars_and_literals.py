import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x, y):
        z = x * y.softmax(0) + x.mean().sum()
        return -torch.full_like(x, -2.0) * z, torch.minimum(x * 1e40, z)


def get_inputs():
    return [torch.rand(30, 20) + 0.5, torch.randn(())]
