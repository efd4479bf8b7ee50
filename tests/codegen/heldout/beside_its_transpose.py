import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return x.sum(0), torch.maximum(x, x.t()), x.mean(1, keepdim=True) + x.t(), x + x.t()


def get_inputs():
    return [torch.randn(48, 48)]
