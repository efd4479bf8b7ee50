"""RMSNorm of bfloat16 rows, computed in float32 as language models do."""

import torch
import torch.nn as nn

family = "norm"
ROWS, COLS = 2048, 2048
shapes = {
    "cpu": {"ROWS": 2048, "COLS": 2048},
    "gpu": {"ROWS": 16384, "COLS": 8192},
    "ragged": {"ROWS": 47, "COLS": 383},
}


class Model(nn.Module):
    def __init__(self, cols):
        super().__init__()
        self.weight = nn.Parameter((1 + 0.1 * torch.randn(cols)).to(torch.bfloat16))

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        return normed.to(x.dtype) * self.weight


def get_inputs():
    return [torch.randn(ROWS, COLS, dtype=torch.bfloat16)]


def get_init_inputs():
    return [COLS]
