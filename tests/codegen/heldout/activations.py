import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def forward(self, x):
        y = F.selu(x) + F.hardsigmoid(x) * F.softsign(x)
        y = y + F.elu(x, alpha=0.7) - F.leaky_relu(x, 0.03) + F.softplus(x)
        return y * F.hardtanh(x, -0.8, 1.2) + F.logsigmoid(x) + F.mish(x) + F.hardswish(x)


def get_inputs():
    return [torch.randn(33, 70)]


def get_init_inputs():
    return []
