"""A filter in the frequency domain and its gradient, which autograd writes in place, piece by piece."""

import torch
import torch.nn as nn

backward = True


class Model(nn.Module):
    def forward(self, x, weight):
        return torch.fft.irfft(torch.fft.rfft(x * 2.0) * 0.5, n=200) * weight


def get_inputs():
    return [torch.randn(24, 200), torch.randn(24, 200)]


def get_init_inputs():
    return []
