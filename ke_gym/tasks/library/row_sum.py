"""Sum of squares over each row."""

import torch
import torch.nn as nn

family = "reduction"
ROWS, COLS = 8192, 1024
shapes = {
    "cpu": {"ROWS": 8192, "COLS": 1024},
    "gpu": {"ROWS": 65536, "COLS": 4096},
    "ragged": {"ROWS": 59, "COLS": 613},
}


class Model(nn.Module):
    def forward(self, x):
        return (x * x).sum(dim=1)


def get_inputs():
    return [torch.randn(ROWS, COLS)]
