import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x, mask):
        return (
            torch.cumsum(x, dim=1),
            torch.cumprod(x * 0.1 + 1.0, dim=0),
            torch.cumsum(x * mask, dim=1),
            x.flip(1).cumsum(1).flip(1),
        )


def get_inputs():
    return [torch.randn(31, 65), torch.randint(0, 2, (31, 65)).bool()]


def get_init_inputs():
    return []
