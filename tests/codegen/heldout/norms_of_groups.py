"""A group that one thread may compute while it divides, and may not with reciprocals."""

import torch
import torch.nn as nn

backward = True


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x):
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight
        x = x.reshape(3, 8, 4, 4).sum(-1).repeat_interleave(4, -1) + x
        x = torch.cat([x[:, :4] * 2, x[:, 4:]], 1)
        return x.square().mean()


def get_inputs():
    return [torch.randn(3, 8, 16)]
