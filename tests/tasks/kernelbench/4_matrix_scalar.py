import torch
import torch.nn as nn


class Model(nn.Module):
    """Multiplication of a matrix by a scalar."""

    def __init__(self):
        super().__init__()

    def forward(self, A: torch.Tensor, s: float, power: int) -> torch.Tensor:
        return A**power * s


M = 64
N = 16


def get_inputs():
    A = torch.randn(M, N)
    s = 3.14
    return [A, s, 2]
