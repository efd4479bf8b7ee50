import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, a, b):
        return torch.einsum("bijl,lk->bijk", a, b)


def get_inputs():
    return [torch.randn(2, 3, 5, 16), torch.randn(16, 11)]


def get_init_inputs():
    return []
