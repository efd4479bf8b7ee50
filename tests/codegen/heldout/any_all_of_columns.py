import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return (x > 0.5).any(0), (x > -3).all(0)


def get_inputs():
    return [torch.randn(700, 70)]
