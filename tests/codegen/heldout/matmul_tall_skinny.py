import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, a, b):
        return torch.matmul(a, b)


def get_inputs():
    return [torch.randn(257, 5), torch.randn(5, 257)]


def get_init_inputs():
    return []
