import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x, y, z):
        return torch.addmm(x / 0 * 0, y, z, beta=0) * 2


def get_inputs():
    return [torch.randn(24, 16), torch.randn(24, 32), torch.randn(32, 16)]
