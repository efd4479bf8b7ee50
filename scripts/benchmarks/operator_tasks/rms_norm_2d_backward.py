"""RMSNorm over the rows of a matrix, backward: the gradients of input and weight, written out."""

import torch
import torch.nn as nn

family = "norm"
ROWS, COLS = 2048, 1024
shapes = {
    "cpu": {"ROWS": 2048, "COLS": 1024},
    "gpu": {"ROWS": 32768, "COLS": 4096},
}


class Model(nn.Module):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019."""

    def forward(self, x, weight, grad):
        rstd = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        normed = x * rstd
        scaled = grad * weight
        mean = (normed * scaled).mean(dim=-1, keepdim=True)
        return (scaled - normed * mean) * rstd, (grad * normed).sum(dim=0)


def get_inputs():
    return [torch.randn(ROWS, COLS), 1 + 0.1 * torch.randn(COLS), torch.randn(ROWS, COLS)]
