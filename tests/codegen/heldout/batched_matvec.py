import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, a, v):
        return torch.bmm(a, v.unsqueeze(-1)).squeeze(-1) * 0.5


def get_inputs():
    return [torch.randn(6, 17, 31), torch.randn(6, 31)]


def get_init_inputs():
    return []
