import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, concept, int64_t, requires):
        return concept * int64_t + requires


def get_inputs():
    return [torch.randn(30, 20), torch.randn(30, 20), torch.randn(20)]
