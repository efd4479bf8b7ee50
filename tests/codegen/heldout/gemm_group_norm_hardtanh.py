import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, features, hidden, groups):
        super().__init__()
        self.gemm = nn.Linear(features, hidden)
        self.norm = nn.GroupNorm(groups, hidden)
        self.clip = nn.Hardtanh(-1.5, 1.0)

    def forward(self, x):
        return self.clip(self.norm(self.gemm(x)))


def get_inputs():
    return [torch.randn(20, 48)]


def get_init_inputs():
    return [48, 64, 8]
