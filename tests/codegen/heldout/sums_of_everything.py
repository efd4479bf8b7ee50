"""A single number of many: its error is luck, and the one of a sum that nearly cancels is large beside it."""

import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return x.sum(), x.mean(0), x.var()


def get_inputs():
    return [torch.randn(1024, 8)]
