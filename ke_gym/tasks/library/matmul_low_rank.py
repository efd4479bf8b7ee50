"""Linear layer with a low-rank adapter (LoRA); TF32 products are permitted."""

import math

import torch
import torch.nn as nn

family = "matmul"
precision = "tf32"
ROWS, INNER, COLS = 512, 768, 768
shapes = {
    "cpu": {"ROWS": 512, "INNER": 768, "COLS": 768},
    "gpu": {"ROWS": 8192, "INNER": 4096, "COLS": 4096},
    "ragged": {"ROWS": 61, "INNER": 97, "COLS": 113},
}


class Model(nn.Module):
    """Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021."""

    def __init__(self, inner, cols):
        super().__init__()
        self.linear = nn.Linear(inner, cols)
        self.down = nn.Parameter(torch.randn(inner, 16) / math.sqrt(inner))
        self.up = nn.Parameter(torch.randn(16, cols) / 4)

    def forward(self, x):
        return self.linear(x) + 2.0 * ((x @ self.down) @ self.up)


def get_inputs():
    return [torch.randn(ROWS, INNER)]


def get_init_inputs():
    return [INNER, COLS]
