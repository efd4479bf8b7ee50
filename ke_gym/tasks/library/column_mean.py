"""Mean and mean square of each column (the statistics of a batch norm)."""

import torch
import torch.nn as nn

family = "reduction"
ROWS, COLS = 8192, 768
shapes = {
    "cpu": {"ROWS": 8192, "COLS": 768},
    "gpu": {"ROWS": 262144, "COLS": 1024},
    "ragged": {"ROWS": 601, "COLS": 67},
}


class Model(nn.Module):
    def forward(self, x):
        return x.mean(dim=0), (x * x).mean(dim=0)


def get_inputs():
    return [torch.randn(ROWS, COLS)]
